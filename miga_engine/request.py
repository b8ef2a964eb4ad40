"""A video as it is asked for: its options as one frozen record, which metadata and session files hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import TYPE_CHECKING, Any

from miga_engine._version import __version__
from miga_engine.config import MAX_FRAME, MigaConfig, SamplingConfig
from miga_engine.fields import FromPreset, option

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Condition:
    """What a video begins with: `num_frames` video frames of a `kind` of `models.bundle.ModelFacts.conditions`.

    `source` is the name of the file, if it is one, `digest` a short name of the frames, and `frames` they themselves,
    uint8 `[n,H,W,3]`, which a run that is resumed has no need of.
    """

    kind: str
    num_frames: int
    source: str = ""
    digest: str = ""
    frames: torch.Tensor | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_record(self) -> dict[str, Any]:
        """JSON-able, for `from_record`."""
        return {"kind": self.kind, "num_frames": self.num_frames, "source": self.source, "digest": self.digest}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Condition:
        """What `to_record` gave; TypeError or ValueError where it did not."""
        made, count = cls(**record), record["num_frames"]
        texts = all(isinstance(text, str) for text in (made.kind, made.source, made.digest))
        if not texts or isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_FRAME:
            raise ValueError("what a video begins with")
        return made


@dataclass(frozen=True)
class Change:
    """What a running stream was told: from video frame `frame` on another `prompt`, to which the text runs over
    `blend_frames` video frames, or another `guidance_scale`; one of the two is None.

    It took place once the run had done `tick` ticks, between two of them, which is all that a repetition must know.
    `restarts`: the queue was grown anew behind its head. Latent frames of the queue from `frame` on took it at once.
    """

    tick: int
    frame: int
    prompt: str | None = None
    blend_frames: int = 0
    guidance_scale: float | None = None
    restarts: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Change:
        """What `dataclasses.asdict` gave; TypeError or ValueError where it did not."""
        made = cls(**record)
        numbers = (made.tick, made.frame, made.blend_frames)
        are_whole = all(type(number) is int and 0 <= number <= MAX_FRAME for number in numbers)
        is_text = made.guidance_scale is None and isinstance(made.prompt, str)
        is_scale = made.prompt is None and type(made.guidance_scale) is float and 0 <= made.guidance_scale <= MAX_FRAME
        if not are_whole or is_text == is_scale or type(made.restarts) is not bool:
            raise ValueError("what a running stream was told")
        return made

    def told(self) -> dict[str, Any]:
        """What an event says of it."""
        if self.prompt is None:
            return {"frame": self.frame, "guidance_scale": self.guidance_scale, "passes": self.tick}
        names = ("frame", "prompt", "blend_frames", "restarts")
        return {**{name: getattr(self, name) for name in names}, "passes": self.tick}


@dataclass(frozen=True)
class Request(SamplingConfig):
    """A video, as it is asked for; once resolved, with every option filled in, as metadata and session files record it.

    None: the preset's, or that of the model.
    """

    prompt: str | Mapping[int, str] = option(MISSING, "what the video shows: a text, or a timeline {first frame: text}",
                                             kind=object, is_hosted=False)  # fmt: skip
    num_frames: int | None = option(
        None, "video frames, exactly", shown="endless", least=1, most=MAX_FRAME, unit="video frames"
    )
    _: KW_ONLY
    image: Any = option(
        None, "picture that the video begins with: a file, or in Python uint8 [H,W,3] or a PIL image; it is made to "
        "fill the video's size, and what is over is cut off evenly", kind=object, metavar="FILE", is_recorded=False,
    )  # fmt: skip
    video: Any = option(
        None, "clip that the video goes on with, brought to its size and rate: its last frames are the first ones; a "
        "file, or in Python uint8 [T,H,W,3]", kind=object, metavar="FILE", is_recorded=False,
    )  # fmt: skip
    video_frames: int | None = option(
        None, "last frames of the clip that the video begins with, a whole number of latent frames",
        shown="as many as the first queue holds", least=1, most=MAX_FRAME, unit="video frames", is_recorded=False,
    )  # fmt: skip
    seed: int = option(0, "same seed, same video", most=2**64 - 1, phrase="a whole number from 0 to 2^64 − 1")
    height: FromPreset[int] = option(None, "of the picture", least=1, most=16384, unit="pixels", metavar="PX")
    width: FromPreset[int] = option(None, "of the picture", least=1, most=16384, unit="pixels", metavar="PX")
    fps: FromPreset[int | str] = option(
        None, "frames per second, exact: 24, 29.97, 24000/1001", kind=object, metavar="RATE"
    )
    guidance: str = option(
        "cfg", "how guidance_scale acts: classifier-free guidance; CFG-Zero*, which fits the unconditional branch to "
        "the other and rests at the first step; adaptive projected guidance, against oversaturation at large scales",
        choices=("cfg", "cfg-zero", "apg"), group="sampling",
    )  # fmt: skip
    guidance_scale_end: float | None = option(
        None, "the scale at the last step, to which guidance_scale runs linearly in the noise level sigma",
        shown="guidance_scale", group="sampling", metavar="W",
    )  # fmt: skip
    guidance_scale_low: FromPreset[float] = option(
        None, "guidance_scale of the second network of a model of two, that for low noise (Wan2.2 A14B)",
        shown="that of the preset, or guidance_scale", group="sampling", metavar="W",
    )  # fmt: skip
    negative_prompt: FromPreset[str] = option(
        None, "what the video is not to show", shown="that of the model", group="sampling", metavar="TEXT"
    )
    method: str | None = option(None, "fifo: FIFO-Diffusion, for comparison", shown="miga", choices=("miga", "fifo"),
                                group="method", is_recorded=False)  # fmt: skip
    miga: FromPreset[MigaConfig] = option(
        None, "options of the method: a MigaConfig, or a mapping of those that differ from the preset's",
        kind=object, is_hosted=False,
    )  # fmt: skip
    condition: Condition | None = option(
        None, "what `image` or `video` was found to be, in a request that is resolved", kind=object, is_hosted=False
    )  # fmt: skip
    changes: tuple[Change, ...] = option(
        (), "what the stream was told while it ran (`Stream.set_prompt`), which a repetition does at the same moments",
        kind=object, is_hosted=False,
    )  # fmt: skip

    def without_frames(self) -> Request:
        """The same without the pictures that it begins with, of which a run holds what it needs."""
        if self.condition is None:
            return self
        return dataclasses.replace(self, condition=dataclasses.replace(self.condition, frames=None))

    @property
    def timeline(self) -> dict[int, str]:
        """The prompt as texts by their first video frame."""
        return {0: self.prompt} if isinstance(self.prompt, str) else dict(self.prompt)

    def to_record(self) -> dict[str, Any]:
        """JSON-able, for `from_record`."""
        return {**self._recorded(), "prompt": {str(frame): text for frame, text in self.timeline.items()}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """What `to_record` gave; KeyError, TypeError or ConfigError where it did not."""
        prompt = {int(frame): text for frame, text in record["prompt"].items()}
        if not set(_RECORDED) - set(_RECORDED_IF_GIVEN) <= set(record) <= set(_RECORDED):
            raise KeyError("options of a request are missing, or too many")
        condition = record.get("condition")
        condition = None if condition is None else Condition.from_record(condition)
        changes = tuple(map(Change.from_record, record.get("changes", ())))
        miga = MigaConfig(**record["miga"])
        return cls(**{**record, "prompt": prompt, "miga": miga, "condition": condition, "changes": changes})

    def metadata(self, model: str, **made_of: Any) -> dict[str, Any]:
        """JSON-able record: model and what else it was made of, prompt, seed, configuration, version."""
        prompt = self.timeline
        record = {**self._recorded(), "prompt": prompt[0] if len(prompt) == 1 else prompt}
        return {"model": model, **made_of, **record, "miga_engine": __version__}

    def _recorded(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _RECORDED}
        values |= {"miga": dataclasses.asdict(self.miga), "condition": self.condition and self.condition.to_record()}
        values |= {"changes": [dataclasses.asdict(change) for change in self.changes]}
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        defaults["changes"] = []
        is_left_out = {name: name in _RECORDED_IF_GIVEN and values[name] == defaults[name] for name in _RECORDED}
        return {name: values[name] for name in _RECORDED if not is_left_out[name]}


_RECORDED_IF_GIVEN = ("guidance", "guidance_scale_end", "guidance_scale_low", "sigmas", "denoising_steps", "condition",
                      "changes")  # fmt: skip
"""Without them a record is what it was before there were these options, and such a record is understood."""
_SAMPLING = {option.name for option in dataclasses.fields(SamplingConfig)}
_RECORDED = sorted(
    (option.name for option in dataclasses.fields(Request) if option.metadata["is_recorded"]),
    key=lambda name: (name == "miga", name in _SAMPLING),
)
