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
    """What a video follows beside its prompts: a kind of `models.bundle.ModelFacts.conditions`, and its tensors."""

    kind: str
    tensors: Mapping[str, torch.Tensor]


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
        None, "an image or a clip that the video follows, of a kind that the model takes; so far none takes any",
        kind=object, is_hosted=False, is_recorded=False,
    )  # fmt: skip

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
        return cls(**{**record, "prompt": prompt, "miga": MigaConfig(**record["miga"])})

    def metadata(self, model: str, **made_of: Any) -> dict[str, Any]:
        """JSON-able record: model and what else it was made of, prompt, seed, configuration, version."""
        prompt = self.timeline
        record = {**self._recorded(), "prompt": prompt[0] if len(prompt) == 1 else prompt}
        return {"model": model, **made_of, **record, "miga_engine": __version__}

    def _recorded(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        is_left_out = {name: name in _RECORDED_IF_GIVEN and values[name] == defaults[name] for name in _RECORDED}
        return {name: values[name] for name in _RECORDED if not is_left_out[name]}


_RECORDED_IF_GIVEN = ("guidance", "guidance_scale_end", "sigmas", "denoising_steps")
"""Without them a record is what it was before there were these options, and such a record is understood."""
_SAMPLING = {option.name for option in dataclasses.fields(SamplingConfig)}
_RECORDED = sorted(
    (option.name for option in dataclasses.fields(Request) if option.metadata["is_recorded"]),
    key=lambda name: (name == "miga", name in _SAMPLING),
)
