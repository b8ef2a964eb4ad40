"""Options of a run as frozen dataclasses, and the presets as data (ALGORITHM: the paper, the release, ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miga_engine.errors import ConfigError


@dataclass(frozen=True)
class MigaConfig:
    """How short windows become an endless video (MIGA, arXiv 2605.18233; symbols of the paper in brackets).

    All counts are latent frames unless the name says otherwise.
    """

    zigzag_width: int = 7
    """Latent frames that share one noise level in Stage 1 [L_zig]."""
    stage2_steps: int = 10
    """Unified passes after Stage 1; the hand-off is at num_steps − stage2_steps [τ_e]."""
    refine_steps: int = 0
    """Steps of the release's refine pass: noise added back to the clean latents and removed again; 0 = off."""
    guidance_frames: int = 4
    """Distant cleaner frames put before a Stage-1 window, read only [m_guid]."""
    guidance_offset: int | None = None
    """Distance of the nearest guidance frame; None = ⌊zigzag_width/2⌋ (the release has 3 throughout)."""
    stride: int | None = None
    """Latent frames between window starts; None = ⌊window/2⌋ of the model's native window."""
    moving_phase: bool = True
    """Shift the cuts by one frame a pass, so that no seam stays in one place."""
    commit: str = "leading"
    """Which end of a window is kept: "leading" (MIGA) or "trailing" (FIFO-Diffusion's look-ahead denoising)."""
    window_order: str = "parallel"
    """"parallel": all windows read the state before the pass; "sequential": later windows see earlier commits."""
    window_batch: int = 1
    """Windows that go through the network together."""
    warmup: str = "grow"
    """"grow": the queue grows behind the re-noised seed clip (MIGA); "copies": copies of frame 0 fill it (FIFO)."""
    self_reflection: bool = True
    """Dynamic consistency enhancement [DCE]: watch the consistency score, search again where it falls."""
    score_drop: float = 0.01
    """Fall of the score that triggers a search [δ_adju]."""
    judge_step: int = 10
    """Step index at which a group of latent frames is judged."""
    reference_groups: int = 2
    """Groups just before the judged one that it is compared with."""
    candidates: int = 3
    """Continuations tried by one search [K]."""
    judge: str = "latent"
    """What is compared: "latent" (paper) or "x0", the x0 prediction, which carries far less noise."""
    channels: str = "mean"
    """"mean": channels are averaged first (paper); "all": every channel counts."""
    prompt_blend_frames: int = 0
    """Video frames over which text embeddings are interpolated at a change of prompt."""

    def __post_init__(self) -> None:
        for name, least in (
            ("zigzag_width", 1),
            ("stage2_steps", 0),
            ("refine_steps", 0),
            ("guidance_frames", 0),
            ("window_batch", 1),
            ("judge_step", 1),
            ("reference_groups", 1),
            ("candidates", 1),
            ("prompt_blend_frames", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(repr(choice) for choice in choices)
                raise ConfigError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        for name in ("self_reflection", "moving_phase"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if isinstance(self.score_drop, bool) or not isinstance(self.score_drop, int | float):
            raise ConfigError(f"score_drop must be a number, got {self.score_drop!r}")
        if self.guidance_offset is not None and (not isinstance(self.guidance_offset, int) or self.guidance_offset < 1):
            raise ConfigError(f"guidance_offset must be a whole number of at least 1, got {self.guidance_offset!r}")
        if self.stride is not None and (not isinstance(self.stride, int) or self.stride < 1):
            raise ConfigError(f"stride must be a whole number of at least 1, got {self.stride!r}")

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
            (self.self_reflection and self.judge_step >= handoff_step, f"judge_step {self.judge_step} must lie before "
             f"the hand-off at step {handoff_step}; lower it or use self_reflection off"),
            (self.commit == "trailing" and self.guidance_frames > 0, "commit 'trailing' needs guidance_frames 0"),
        )  # fmt: skip
        for is_wrong, sentence in problems:
            if is_wrong:
                raise ConfigError(sentence)


_CHOICES = {
    "commit": ("leading", "trailing"),
    "window_order": ("parallel", "sequential"),
    "warmup": ("grow", "copies"),
    "judge": ("latent", "x0"),
    "channels": ("mean", "all"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How one latent frame goes from noise to clean."""

    solver: str = "unipc"
    num_inference_steps: int = 54
    shift: float = 5.0
    guidance_scale: float = 5.0
    eta: float = 1.0
    """DDIM only: share of fresh noise in a step."""


@dataclass(frozen=True)
class Preset:
    """Everything that has a default: sampling, method, picture."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    miga: MigaConfig = field(default_factory=MigaConfig)
    height: int = 480
    width: int = 832
    fps: int = 16


_WAN_PAPER = MigaConfig(stage2_steps=9, stride=10, window_order="sequential")
_WAN_RELEASED = MigaConfig(refine_steps=10, stride=10, guidance_offset=3)
_WAN = MigaConfig(stride=10)
_VC2_SAMPLING = SamplingConfig(solver="ddim", num_inference_steps=64, guidance_scale=12.0)
_VC2_PAPER = MigaConfig(zigzag_width=4, stage2_steps=9, guidance_frames=6, stride=8, judge_step=14,
                        reference_groups=3, candidates=5, window_order="sequential")  # fmt: skip
_VC2_RELEASED = dataclasses.replace(_VC2_PAPER, stage2_steps=10, refine_steps=10, guidance_frames=4,
                                    self_reflection=False, score_drop=0.001)  # fmt: skip
_TINY = MigaConfig(zigzag_width=4, stage2_steps=5, guidance_frames=2, stride=6, judge_step=8, reference_groups=2,
                   judge="x0", channels="all", score_drop=0.05)  # fmt: skip

PRESETS: Mapping[str, Preset] = {
    "wan2.1": Preset(miga=_WAN),
    "wan2.1-paper": Preset(miga=_WAN_PAPER),
    "wan2.1-released": Preset(miga=_WAN_RELEASED),
    "videocrafter2-paper": Preset(_VC2_SAMPLING, _VC2_PAPER, 320, 512, 10),
    "videocrafter2-released": Preset(_VC2_SAMPLING, _VC2_RELEASED, 320, 512, 10),
    "tiny": Preset(SamplingConfig(num_inference_steps=24, shift=3.0, guidance_scale=3.0), _TINY, 64, 96, 12),
}


def fifo_config(base: MigaConfig, window_frames: int) -> MigaConfig:
    """FIFO-Diffusion (arXiv 2405.11473) as a configuration: one frame a level, look-ahead denoising, nothing else."""
    return dataclasses.replace(
        base, zigzag_width=1, stage2_steps=0, refine_steps=0, guidance_frames=0, self_reflection=False,
        commit="trailing", warmup="copies", moving_phase=False, stride=max(1, window_frames // 2),
    )  # fmt: skip


def replace_options(config: MigaConfig, options: Mapping[str, Any]) -> MigaConfig:
    """``config`` with ``options`` changed; an unknown name raises ConfigError and lists the known ones."""
    known = {f.name for f in dataclasses.fields(MigaConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}")
    return dataclasses.replace(config, **options)
