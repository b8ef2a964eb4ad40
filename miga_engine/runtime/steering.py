"""What a run is told while it goes on: other prompts, another scale of guidance (docs/method.md §7).

It is taken up between two ticks and recorded as a `request.Change` with their number: a run that finds the same change
at the same tick makes the same frames, bit for bit.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miga_engine.config import MAX_FRAME
from miga_engine.errors import ConfigError, SessionError
from miga_engine.prompts import MAX_CHANGES, PromptEmbeddings, check_text
from miga_engine.request import Change
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.network import PromptedTransformer
from miga_engine.runtime.stages import DONE, FLUSH, STAGE1, WARMUP, VideoRun

TAKES_ABOVE = 0.8
"""Noise level from which on latent frames of the queue take a new prompt at once, unless asked otherwise."""


class Ask(NamedTuple):
    """A change as it is asked for, from video frame `at` on, None = as soon as can be; see `Stream.set_prompt`."""

    prompt: str | None = None
    guidance_scale: float | None = None
    at: int | None = None
    blend_frames: int = 0
    above: float = TAKES_ABOVE
    restarts: bool = False


def asked_prompt(prompt: object, at: object, blend: object, above: object, restart: bool) -> Ask:
    """What `Stream.set_prompt` asks for; ConfigError where that cannot be asked."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("the prompt is empty or no text: describe in a few words what the video is to show")
    check_text("the prompt", prompt)
    if restart and at != "now":
        raise ConfigError(f"restart is for a change at 'now', and at is {reprlib.repr(at)}: leave one of the two out")
    if isinstance(blend, bool) or not isinstance(blend, int) or not 0 <= blend <= MAX_FRAME:
        raise ConfigError(f"blend must be a whole number of at least 0 (video frames), got {reprlib.repr(blend)}")
    if isinstance(above, bool) or not isinstance(above, int | float) or not 0 <= above <= 1:
        raise ConfigError(f"above must be a noise level from 0 to 1, got {reprlib.repr(above)}")
    return Ask(prompt, at=_frame(at), blend_frames=blend, above=float(above), restarts=bool(restart))


def asked_scale(guidance_scale: object, at: object) -> Ask:
    """What `Stream.set_guidance_scale` asks for; ConfigError where that cannot be asked."""
    is_number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not is_number or not 0 <= guidance_scale <= MAX_FRAME:  # type: ignore[operator]
        raise ConfigError(f"guidance_scale must be a finite number of at least 0, got {reprlib.repr(guidance_scale)}")
    return Ask(guidance_scale=float(guidance_scale), at=_frame(at))  # type: ignore[arg-type]


def _frame(at: object) -> int | None:
    if at == "now":
        return None
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= MAX_FRAME:
        raise ConfigError(f"at must be 'now' or a video frame from 0 to {MAX_FRAME}, got {reprlib.repr(at)}")
    return at


class LivePrompts:
    """The prompts of a run, which change while it goes on.

    num_slots: how many rows of a timeline the network is to hold at a time; `encode` a text's embedding `[1,T,D]`.
    """

    def __init__(
        self,
        network: PromptedTransformer,
        texts: PromptEmbeddings,
        encode: Callable[[list[str]], Tensor],
        num_slots: Callable[[PromptEmbeddings], int],
    ) -> None:
        self.texts = texts
        self._network, self._encode, self._num_slots = network, encode, num_slots

    def row(self, latent_frame: int) -> int:
        """Row of the embedding that this latent frame is denoised with."""
        return self.texts.timeline.prompt_row(latent_frame)

    def changed(self, changes: Sequence[Change], run: VideoRun) -> Callable[[], None]:
        """What makes changes of the prompt of a run; all that can fail is done here."""
        first = max(run.first_kept - run.layout.commit_offset, 0)  # which Stage 2 may still read as it was
        first_frame = self.texts.timeline.first_video_frame(first)
        with torch.no_grad():
            texts = self.texts.changed(entries(changes), self._encode, first_frame)
        with uninterrupted():
            if self._network.make_room(texts, self._num_slots(texts)):
                run.denoiser.forget_graphs()

        def commit() -> None:
            self.texts = texts
            self._network.change_prompts(texts)

        return commit


class Steering:
    """Makes the changes of one run: those on record as their ticks come, and what is asked for beside them."""

    def __init__(self, run: VideoRun, prompts: LivePrompts, changes: Sequence[Change] = ()) -> None:
        self.run = run
        self.prompts = prompts
        self.changes = list(changes)
        """On record, in order; `run.num_changes` of them have been taken up."""

    def check(self, ask: Ask, num_waiting: int) -> None:
        """ConfigError where the run cannot take this up, beside others that wait; from any thread."""
        if ask.prompt is None and not self.run.denoiser.guidance.is_on:
            raise ConfigError(
                "this stream runs without guidance, which cannot be switched on later: begin it with a guidance_scale "
                "other than 1"
            )
        if len(self.changes) + num_waiting >= MAX_CHANGES:
            raise ConfigError(f"this stream has been changed {MAX_CHANGES} times: go on in a new one")

    def load(self) -> None:
        """Of a run whose state was loaded: what it had taken up by then holds."""
        self._prepared(self.done)()

    @property
    def done(self) -> list[Change]:
        """Those that the run has taken up, in order."""
        return self.changes[: self.run.num_changes]

    def due(self) -> bool:
        """Take up the next change on record if its tick has come; whether it had."""
        number = self.run.num_changes
        if number == len(self.changes) or self.changes[number].tick > self.run.num_ticks:
            return False
        change = self.changes[number]
        if change.restarts and not can_restart(self.run):
            raise SessionError("the run was told to begin its queue anew where it has none: resume from another copy")
        self.run.change(self._prepared([change]), restarts=change.restarts)
        return True

    def ask(self, ask: Ask, then: Callable[[], object]) -> bool:
        """Take up what is asked for, and record it, as one with `then`; False where every frame that could take it is
        made already.

        Later changes on record stay, and what they say of later frames.
        """
        change = self.change_of(ask)
        if change is None:
            then()
            return False
        make = self._prepared([change])

        def commit() -> None:
            make()
            self.changes.insert(self.run.num_changes, change)
            then()

        self.run.change(commit, restarts=change.restarts)
        return True

    def change_of(self, ask: Ask) -> Change | None:
        """What would be recorded of it now."""
        run, timeline = self.run, self.prompts.texts.timeline
        if run.stage in (FLUSH, DONE):
            return None
        restarts = ask.restarts and can_restart(run)
        if ask.prompt is None:
            first = max(run.emitted, run.layout.num_still)
        else:
            first = run.head if restarts else first_free(run, ask.above)
        first = timeline.first_latent(max(timeline.first_video_frame(max(first, 0)), ask.at or 0))
        if run.num_frames is not None and first >= run.num_frames:
            return None
        frame = timeline.first_video_frame(first)
        return Change(run.num_ticks, frame, ask.prompt, ask.blend_frames, ask.guidance_scale, restarts)

    def _prepared(self, changes: Sequence[Change]) -> Callable[[], None]:
        """What makes these changes; all that can fail is done here."""
        timeline, commits = self.prompts.texts.timeline, list[Callable[[], None]]()
        if any(change.prompt is not None for change in changes):
            commits.append(self.prompts.changed(changes, self.run))
        scales = {
            timeline.first_latent(change.frame): change.guidance_scale
            for change in changes
            if change.guidance_scale is not None
        }
        if scales:
            commits.append(self.run.denoiser.guidance.changed(scales))

        def commit() -> None:
            for each in commits:
                each()

        return commit


def entries(changes: Sequence[Change]) -> list[tuple[int, str, int]]:
    """What `PromptTimeline.changed` is given of the changes of a prompt."""
    return [(change.frame, change.prompt, change.blend_frames) for change in changes if change.prompt is not None]


def first_free(run: VideoRun, sigma: float) -> int:
    """The first latent frame that has come no further than to this noise level, the next to enter if none has."""
    frames = range(max(run.head, run.layout.num_still), run.tail)
    sigmas = run.schedule.sigmas.numpy()[run.store.step_index[run.store.slots(frames)]]
    return next((frame for frame, level in zip(frames, sigmas, strict=True) if level >= sigma), run.tail)


def can_restart(run: VideoRun) -> bool:
    """Whether a run's queue can be grown anew: not of noise alone, and not while it holds frames that are still."""
    return run.stage in (WARMUP, STAGE1) and run.config.warmup != "noise" and run.head >= run.layout.num_still
