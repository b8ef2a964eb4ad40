"""The pipeline as slow lists: whole-sequence passes, one window and one frame at a time; the runtime equals it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from miga_engine import ops
from miga_engine.config import MigaConfig
from miga_engine.noise import Purpose, normal
from miga_engine.prompts import PromptTimeline
from miga_engine.runtime.network import Batch
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.window_plan import guidance_indices, plan_windows
from miga_engine.schedule import Schedule, add_noise, make_schedule

SHAPE = (4, 2, 3)
"""Of a latent frame of the toy runs."""


def pseudo_network(latents: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The goldens' pseudo model: sees position, mean of the window, timestep and prompt (row 0 = unconditional)."""
    batch, _, frames = latents.shape[:3]
    position = torch.arange(frames).view(1, 1, frames, 1, 1) / frames
    conditional = (rows != 0).float().reshape(batch, 1, -1, 1, 1)
    mean = latents.mean(dim=2, keepdim=True)
    level = timesteps.view(batch, 1, frames, 1, 1) / 1000
    return torch.tanh(0.6 * latents + 0.3 * mean + 0.5 * level + 0.1 * position) + 0.05 * conditional


class PlainNetwork:
    """The `WindowNetwork` of a function: latents `[B,C,F,H,W]`, timesteps `[B,F]`, prompt rows `[B]`, `[B,F]` → output.

    Every guidance branch is computed whole, then the frames wanted are taken.
    """

    num_prompts = np.iinfo(np.int64).max

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def place_prompts(self, prompt_rows: np.ndarray) -> np.ndarray:
        return prompt_rows

    def __call__(self, batch: Batch) -> torch.Tensor:
        num_branches = batch.prompt_rows.shape[0] // batch.latents.shape[0]
        latents = torch.cat([batch.latents] * num_branches)
        output = self.function(latents, torch.cat([batch.timesteps] * num_branches), batch.prompt_rows)
        keep = torch.cat([batch.keep] * num_branches)
        return torch.stack([frames[:, index] for frames, index in zip(output, keep, strict=True)])


def prompt_table(timeline: PromptTimeline, encode: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
    """All rows of embeddings of a timeline with an empty negative prompt, `[P,T,D]`, zeros behind each text."""
    texts = timeline.encode("", encode)
    return torch.stack([torch.nn.functional.pad(text, (0, 0, 0, texts.num_tokens - len(text))) for text in texts])


def counter_noise(seed: int, shape: tuple[int, ...]):
    def draw(purpose: Purpose, frames: np.ndarray, *, series: int | np.ndarray = 0) -> torch.Tensor:
        return normal(seed, purpose, torch.from_numpy(frames), shape, series=torch.as_tensor(series))

    return draw


@dataclass
class Frame:
    number: int
    sample: torch.Tensor
    step: int = 0
    history: list[torch.Tensor] = field(default_factory=list)  # newest first
    last: torch.Tensor | None = None
    is_given: bool = False

    def fresh(self, sample: torch.Tensor, step: int) -> Frame:
        return Frame(self.number, sample, step)


class Oracle:
    """`given` frames begin the video: no pass changes them, and they are read with the schedule's reference noise."""

    def __init__(
        self, network, schedule: Schedule, config: MigaConfig, window: int, noise, guidance_scale: float,
        given: Sequence[torch.Tensor] = (),
    ):  # fmt: skip
        self.given = given
        self.network, self.schedule, self.config, self.window = network, schedule, config, window
        self.noise, self.scale = noise, guidance_scale
        self.told: dict[tuple[int, int], list[Frame]] = {}  # what the windows behind the queue commit
        self.stride = config.stride or window // 2
        self.handoff = schedule.num_steps - config.stage2_steps
        self.series = 0  # of the solver's noise: seed clip 0, warm-up 1, Stage 1 2, Stage 2 3, refine 4

    def step(self, frame: Frame, conditional: torch.Tensor, unconditional: torch.Tensor) -> Frame:
        state = [frame.sample[None].clone()]
        state += [torch.zeros_like(state[0]) if t is None else t[None].clone() for t in (frame.last,)]
        state += [h[None].clone() for h in frame.history] + [torch.zeros_like(state[0])] * (2 - len(frame.history))
        noise = None
        if self.schedule.uses_noise:
            series = np.array([(self.series << 16) + frame.step])
            noise = self.noise(Purpose.SOLVER, np.array([frame.number]), series=series)
        ops.sampler_update(
            state[0], state[1], state[2], state[3].clone(), conditional[None], unconditional[None],
            slots=torch.tensor([0]), coefficients=self.schedule.coefficients.rows,
            step_index=torch.tensor([frame.step]), history_length=torch.tensor([len(frame.history)]),
            guidance_scale=self.scale, noise=noise,
        )  # fmt: skip
        history = [state[2][0], *frame.history][:2]
        return Frame(frame.number, state[0][0], frame.step + 1, history, state[1][0])

    def forward(self, frames: list[Frame], first: int, num_guidance: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both branches of a window that commits from its position `first` on."""
        num_masked = {"off": 0, "distant": num_guidance, "all": first}[self.config.history_guidance]
        unconditional, newer = list(frames), frames[first]
        for i, f in enumerate(frames[:num_masked]):
            if f.step > newer.step:
                series = np.array([(newer.step << 16) + i])
                unconditional[i] = f.fresh(self.noise(Purpose.PAST, np.array([newer.number]), series=series)[0], 0)
        latents = torch.stack([torch.stack([f.sample for f in branch], dim=1) for branch in (frames, unconditional)])
        told = [*self.schedule.timesteps.tolist(), self.schedule.timesteps[-1].item()]
        if self.schedule.reference_sigma is not None:
            told[-1] = 1000 * self.schedule.reference_sigma
        t = [[told[f.step] for f in branch] for branch in (frames, unconditional)]
        output = self.network(latents, torch.tensor(t), torch.tensor([1, 0]))
        return output[0].transpose(0, 1), output[1].transpose(0, 1)

    def window_step(self, read: list[Frame], first: int, stop: int, num_guidance: int = 0) -> list[Frame]:
        """The frames at positions `first … stop − 1` of a window, a step on."""
        while first < stop and read[first].is_given:
            return [read[first], *self.window_step(read, first + 1, stop, num_guidance)]
        if first == stop:
            return []
        conditional, unconditional = self.forward(read, first, num_guidance)
        return [self.step(read[i], conditional[i], unconditional[i]) for i in range(first, stop)]

    def queue_pass(self, frames: list[Frame], local: int, phase: int, num_past: int) -> list[Frame]:
        """The frames a step on, but for the first `num_past`, which are only read."""
        config, result, m = self.config, list(frames), self.config.guidance_frames
        plan = plan_windows(len(frames), local, self.stride, phase, offset=config.commit_offset_of(self.window))
        for start, commit_start, commit_stop in plan:
            guidance = guidance_indices(start, m, config.zigzag_width, config.guidance_offset, config.guidance_spacing)
            stop = start + (local if guidance else self.window)
            read = [frames[i] for i in guidance] + frames[start:stop]
            num_guidance = len(guidance)
            if guidance and config.guidance_anchor:
                read[0] = self.anchor
            elif (
                config.guidance_anchor
                and len(read) < self.window
                and self.anchor.number not in [f.number for f in read]
            ):
                read, num_guidance = [self.anchor, *read], 1
            first, offset = max(commit_start, num_past), num_guidance - start
            result[first:commit_stop] = self.window_step(read, first + offset, commit_stop + offset, num_guidance)
        return result

    def unified(self, popped: list[Frame], total: int) -> list[list[Frame]]:
        """Frames that have left the queue, before and behind each pass over a video of `total`, as far as they tell."""
        config, offset = self.config, self.config.commit_offset_of(self.window)
        numbers = [*range(config.stage2_steps), *range(config.refine_steps)]
        reached, before = [popped[:total]], self.series
        for level, number in enumerate(numbers):
            self.series = 3 + (level >= config.stage2_steps)
            if level == config.stage2_steps:
                reached[-1] = [self.renoised(frame) for frame in reached[-1]]
            made: list[Frame] = []
            plan = plan_windows(total, self.window, self.stride, number % self.stride, offset=offset)
            for start, first, stop in plan:
                read = reached[-1][start : start + self.window]
                if len(read) < min(self.window, total - start):
                    break
                if (level, start) not in self.told:
                    self.told[level, start] = self.window_step(read, first - start, stop - start)
                made += self.told[level, start]
            reached.append(made)
        self.series = before
        return reached

    def renoised(self, frame: Frame) -> Frame:
        if frame.is_given:
            return frame
        step = self.schedule.num_steps - self.config.refine_steps
        noise = self.draw(Purpose.REFINE, frame.number)
        return frame.fresh(add_noise(self.schedule, frame.sample[None], noise[None], step)[0], step)

    def shown(self, clean: torch.Tensor, number: int) -> torch.Tensor:
        sigma = self.schedule.reference_sigma or 0
        return (1 - sigma) * clean + sigma * self.draw(Purpose.REFERENCE, number) if sigma else clean

    def draw(self, purpose: Purpose, number: int) -> torch.Tensor:
        return self.noise(purpose, np.array([number]))[0]

    def run(self, num_frames: int) -> torch.Tensor:
        """Clean latents [num_frames, C, H, W] (no reflection)."""
        config, width, local = self.config, self.config.zigzag_width, self.window - self.config.guidance_frames
        last = self.schedule.num_steps
        clip = [Frame(k, self.shown(x, k), last, [x], is_given=True) for k, x in enumerate(self.given)]
        clip += [Frame(k, self.draw(Purpose.SEED_CLIP, k)) for k in range(len(clip), self.window)]
        self.series = 0
        for _ in range(self.schedule.num_steps):
            clip = self.window_step(clip, 0, self.window)
        self.anchor = clip[0] if len(self.given) else clip[0].fresh(self.shown(clip[0].sample, 0), last)
        apart = config.passes_per_advance
        groups = min(self.window // width, self.handoff // apart - 1)
        queue = []
        for k in range(groups * width):
            step = (groups - k // width) * apart
            noise = self.draw(Purpose.WARMUP, k)
            queue.append(
                clip[k]
                if k < len(self.given)
                else Frame(k, add_noise(self.schedule, clip[k].sample[None], noise[None], step)[0], step)
            )

        def push() -> None:
            first, head = queue[-1].number + 1, queue[0]
            clean = head.history[0] if head.history else clip[head.number].sample
            share = config.tail_signal
            queue.extend(
                Frame(k, share * clean + (1 - share) * self.draw(Purpose.PUSH, k)) for k in range(first, first + width)
            )

        total = max(num_frames, self.window)
        popped: list[Frame] = []
        num_past = config.commit_offset_of(self.window) if config.past_context else 0

        def advance(phase: int) -> list[Frame]:
            first = self.given[0] if len(self.given) else clip[0].sample
            past = [Frame(k, first, self.schedule.num_steps) for k in range(-num_past, 0)]
            if num_past:  # as the passes behind the queue have left them so far
                newest: dict[int, Frame] = {}
                for frames in self.unified(popped, total):
                    newest |= dict(enumerate(frames))
                past = [*past, *newest.values()][-num_past:]
            return self.queue_pass(past + queue, local, phase, num_past)[num_past:]

        push()
        self.series = 1
        while len(queue) < self.handoff // apart * width:
            length = num_past + len(queue)
            for _ in range(apart):
                queue = advance((length - local) % self.stride if length >= local else 0)
            push()
        passes, self.series = 0, 2
        while len(popped) < total:
            for _ in range(apart):
                queue = advance(passes % self.stride)
                passes += 1
            popped += [f if f.is_given else f.fresh(f.sample, f.step) for f in queue[:width]]
            del queue[:width]
            push()
        made = self.unified(popped, total)[-1][:num_frames]
        return torch.stack([*self.given, *(frame.sample for frame in made[len(self.given) :])])


def toy_config(**options) -> MigaConfig:
    """Of a run of 16 steps and windows of 9 frames."""
    defaults = {"zigzag_width": 3, "stage2_steps": 5, "guidance_frames": 2, "stride": 4, "self_reflection": False}
    return MigaConfig(**(defaults | options))


def toy_run(
    config: MigaConfig,
    num_frames: int | None,
    *,
    steps=16,
    window=9,
    seed=5,
    events=None,
    network=pseudo_network,
    guidance_scale=5.0,
    schedule=None,
    given=None,
):
    return VideoRun(
        PlainNetwork(network), schedule or make_schedule("unipc", steps, 5.0), config, window_frames=window,
        frame_shape=SHAPE, noise=counter_noise(seed, SHAPE), num_frames=num_frames, guidance_scale=guidance_scale,
        device=torch.device("cpu"), num_given=0 if given is None else len(given), given=given,
        emit=lambda kind, **data: events.append((kind, data)) if events is not None else None,
    )  # fmt: skip


def collect(run: VideoRun) -> torch.Tensor:
    """All latents of a run, each once and in order."""
    parts, expected = [], 0
    for clean in run:
        assert clean.first_frame == expected
        expected += len(clean.latents)
        parts.append(clean.latents)
    return torch.cat(parts)
