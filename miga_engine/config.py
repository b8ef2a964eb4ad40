"""Options of a run as frozen dataclasses, and the presets as data (ALGORITHM: the paper, the release, ours)."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miga_engine._version import __version__
from miga_engine.errors import ConfigError

ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "onednn", "cudnn", "xformers", "flash", "sage", "reference")
"""Who may compute attention; `miga_engine.ops.frame_attention` says what each needs."""


MAX_OPTION = 10_000
"""Of every count in MigaConfig: buffers are sized by them."""


def _option(default: Any, text: str, *, least: int = 0, choices: tuple[str, ...] = ()) -> Any:
    """A field that carries its description and the values it may take; the command line is made from them."""
    return field(default=default, metadata={"help": text, "least": least, "choices": choices})


@dataclass(frozen=True)
class MigaConfig:
    """How short windows become an endless video (MIGA, arXiv 2605.18233; symbols of the paper in brackets).

    All counts are latent frames unless the text says otherwise; None means a default that follows from the rest.
    """

    zigzag_width: int = _option(7, "latent frames that share one noise level in Stage 1 [L_zig]", least=1)
    stage2_steps: int = _option(
        10, "unified passes after Stage 1: the hand-off is this many steps before clean [tau_e]"
    )
    refine_steps: int = _option(0, "steps of the release's refine pass, which noises clean latents once more; 0 = off")
    guidance_frames: int = _option(4, "distant cleaner frames put before a Stage-1 window, read only [m_guid]")
    guidance_offset: int | None = _option(
        None, "distance of the nearest guidance frame (half the zigzag width)", least=1
    )
    guidance_anchor: bool = _option(False, "let the farthest guidance frame be the prompt's first frame, clean, "
                                    "and let searches read it too: it holds what the prompt leaves open")  # fmt: skip
    stride: int | None = _option(None, "latent frames between window starts (half the model's window)", least=1)
    moving_phase: bool = _option(True, "shift the cuts by one frame a pass, so that no seam stays in one place")
    commit: str = _option("leading", "which end of a window is kept (trailing: FIFO-Diffusion's look-ahead)",
                          choices=("leading", "trailing"))  # fmt: skip
    window_order: str = _option("parallel", "whether later windows of a pass see earlier commits (sequential) or not",
                                choices=("parallel", "sequential"))  # fmt: skip
    window_batch: int | None = _option(
        None, "windows that go through the network together (on a GPU what fits its memory, on a CPU 1)", least=1
    )
    warmup: str = _option("grow", "the first queue: grown behind the seed clip, or copies of its first frame (FIFO)",
                          choices=("grow", "copies"))  # fmt: skip
    self_reflection: bool = _option(True, "watch the consistency score, and search again where it falls [DCE]")
    score_drop: float = _option(0.01, "fall of the score that triggers a search [delta_adju]")
    judge_step: int = _option(10, "step index at which a group of latent frames is judged", least=1)
    reference_groups: int = _option(2, "groups just before the judged one that it is compared with", least=1)
    candidates: int = _option(3, "continuations tried by one search [K]", least=1)
    judge: str = _option("latent", "what is compared: latents (paper), or x0 predictions, which carry far less noise",
                         choices=("latent", "x0"))  # fmt: skip
    channels: str = _option("mean", "whether channels are averaged before the comparison (paper) or all count",
                            choices=("mean", "all"))  # fmt: skip
    prompt_blend_frames: int = _option(0, "video frames over which the text runs from one prompt to the next")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _check_option(option.name, getattr(self, option.name), option.default, option.metadata)

    def check(self, num_steps: int, window_frames: int) -> None:
        """Refuse what cannot run with this many steps and this native window; ConfigError names the option."""
        handoff_step = num_steps - self.stage2_steps
        local_frames = window_frames - self.guidance_frames
        problems = (
            (handoff_step < 2, f"stage2_steps {self.stage2_steps} leaves Stage 1 {handoff_step} of {num_steps} steps"
             f"; use at most {num_steps - 2}"),
            (self.refine_steps > num_steps - 1, f"refine_steps {self.refine_steps} must be less than {num_steps}"),
            (self.zigzag_width > window_frames, f"zigzag_width {self.zigzag_width} exceeds the model's window of "
             f"{window_frames} latent frames"),
            (local_frames < 1, f"guidance_frames {self.guidance_frames} leaves no room in the model's window of "
             f"{window_frames} latent frames"),
            (self.stride is not None and self.stride > local_frames, f"stride {self.stride} exceeds the "
             f"{local_frames} local frames of a window (window {window_frames} − guidance_frames "
             f"{self.guidance_frames})"),
            (self.self_reflection and self.judge_step + self.reference_groups > handoff_step, f"judge_step "
             f"{self.judge_step} with {self.reference_groups} reference_groups reaches past the hand-off at step "
             f"{handoff_step}; lower one, or switch self_reflection off"),
            (self.commit == "trailing" and self.guidance_frames > 0, "commit 'trailing' needs guidance_frames 0"),
        )  # fmt: skip
        for is_wrong, sentence in problems:
            if is_wrong:
                raise ConfigError(sentence)


def _check_option(name: str, value: Any, default: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {reprlib.repr(value)}")
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{name} must be a number, got {reprlib.repr(value)}")
    elif isinstance(default, str):
        if value not in metadata["choices"]:
            raise ConfigError(
                f"{name} must be {' or '.join(map(repr, metadata['choices']))}, got {reprlib.repr(value)}"
            )
    elif value is None and default is None:
        return
    elif isinstance(value, bool) or not isinstance(value, int) or value < metadata["least"]:
        raise ConfigError(f"{name} must be a whole number of at least {metadata['least']}, got {reprlib.repr(value)}")
    elif value > MAX_OPTION:
        raise ConfigError(f"{name} must be at most {MAX_OPTION}, got {reprlib.repr(value)}")


@dataclass(frozen=True)
class SamplingConfig:
    """How one latent frame goes from noise to clean."""

    solver: str = "unipc"
    num_inference_steps: int = 54
    shift: float = 5.0
    guidance_scale: float = 5.0
    eta: float = 1.0
    """DDIM only: share of fresh noise in a step."""
    use_scale_array: bool = False
    """DDIM only: VideoCrafter2's scale of x0 by level (1 → 0.7 over 400 timesteps)."""


@dataclass(frozen=True)
class Request:
    """A run with every option resolved; what the metadata of a video and a session file record."""

    prompt: Mapping[int, str]
    negative_prompt: str
    num_frames: int | None
    seed: int
    height: int
    width: int
    fps: int | str
    """Whole, or a fraction as text: "24000/1001"."""
    solver: str
    num_inference_steps: int
    shift: float
    guidance_scale: float
    eta: float
    use_scale_array: bool
    miga: MigaConfig

    def to_record(self) -> dict[str, Any]:
        """JSON-able, for `from_record`."""
        return {**dataclasses.asdict(self), "prompt": {str(frame): text for frame, text in self.prompt.items()}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """What `to_record` gave; KeyError, TypeError or ConfigError where it did not."""
        prompt = {int(frame): text for frame, text in record["prompt"].items()}
        return cls(**{**record, "prompt": prompt, "miga": MigaConfig(**record["miga"])})

    def metadata(self, model: str) -> dict[str, Any]:
        """JSON-able record: prompt, seed, configuration, model, version."""
        record = dataclasses.asdict(self)
        record["prompt"] = self.prompt[0] if len(self.prompt) == 1 else dict(self.prompt)
        return {"model": model, **record, "miga_engine": __version__}


@dataclass(frozen=True)
class Preset:
    """Everything that has a default: sampling, method, picture."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    miga: MigaConfig = field(default_factory=MigaConfig)
    height: int = 480
    width: int = 832
    fps: int = 16


def fifo_config(base: MigaConfig, window_frames: int) -> MigaConfig:
    """FIFO-Diffusion (arXiv 2405.11473) as a configuration: one frame a level, look-ahead denoising, nothing else."""
    return dataclasses.replace(
        base, zigzag_width=1, stage2_steps=0, refine_steps=0, guidance_frames=0, guidance_anchor=False,
        self_reflection=False, commit="trailing", warmup="copies", moving_phase=False,
        stride=max(1, window_frames // 2),
    )  # fmt: skip


_WAN_PAPER = MigaConfig(stage2_steps=9, stride=10, window_order="sequential")
_WAN_RELEASED = MigaConfig(refine_steps=10, stride=10, guidance_offset=3)
_WAN = MigaConfig(stride=10)
_VC2_SAMPLING = SamplingConfig(solver="ddim", num_inference_steps=64, guidance_scale=12.0)
_VC2_SCALED = dataclasses.replace(_VC2_SAMPLING, use_scale_array=True)
_VC2_PAPER = MigaConfig(zigzag_width=4, stage2_steps=9, guidance_frames=6, stride=8, judge_step=13,
                        reference_groups=3, candidates=5, window_order="sequential")  # fmt: skip
# The release counts DDIM indices: it judges at index 50 of 63 and refines from index 10 on, the identity at 0 included.
_VC2_RELEASED = dataclasses.replace(_VC2_PAPER, stage2_steps=10, refine_steps=11, guidance_frames=4,
                                    self_reflection=False, score_drop=0.001)  # fmt: skip
_TINY = MigaConfig(zigzag_width=4, stage2_steps=5, guidance_frames=2, guidance_anchor=True, stride=6, judge_step=8,
                   reference_groups=2, judge="x0", channels="all", score_drop=0.2)  # fmt: skip

PRESETS: Mapping[str, Preset] = {
    "wan2.1": Preset(miga=_WAN),
    "wan2.1-paper": Preset(miga=_WAN_PAPER),
    "wan2.1-released": Preset(miga=_WAN_RELEASED),
    "videocrafter2": Preset(_VC2_SCALED, dataclasses.replace(_VC2_PAPER, window_order="parallel"), 320, 512, 10),
    "videocrafter2-paper": Preset(_VC2_SAMPLING, _VC2_PAPER, 320, 512, 10),
    "videocrafter2-released": Preset(_VC2_SAMPLING, _VC2_RELEASED, 320, 512, 10),
    "videocrafter2-fifo": Preset(_VC2_SAMPLING, fifo_config(MigaConfig(), 16), 320, 512, 10),
    "tiny": Preset(SamplingConfig(num_inference_steps=24, shift=3.0, guidance_scale=3.0), _TINY, 64, 96, 12),
}


def replace_options(config: MigaConfig, options: Mapping[str, Any]) -> MigaConfig:
    """``config`` with ``options`` changed; an unknown name raises ConfigError and lists the known ones."""
    known = {f.name for f in dataclasses.fields(MigaConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}")
    return dataclasses.replace(config, **options)
