"""Numbers of papers and releases, and ours, as data (docs/method.md §9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from miga_engine.config import MigaConfig, SamplingConfig, fifo_config


@dataclass(frozen=True)
class Preset:
    """Everything that has a default: sampling, method, picture.

    `history_guidance_scale` is the default of guidance_scale while history_guidance is "all"; None: that without it.
    `guidance_scale_low` is that of the network for low noise, where there are two; None: that of the other.
    """

    sampling: SamplingConfig
    miga: MigaConfig
    height: int = 480
    width: int = 832
    fps: int = 16
    history_guidance_scale: float | None = None
    guidance_scale_low: float | None = None

    def sampling_for(self, miga: MigaConfig) -> SamplingConfig:
        """The defaults of sampling by this method."""
        if self.history_guidance_scale is None or miga.history_guidance != "all":
            return self.sampling
        return dataclasses.replace(self.sampling, guidance_scale=self.history_guidance_scale)


_UNIPC = SamplingConfig(
    solver="unipc", num_inference_steps=54, shift=5.0, guidance_scale=5.0, eta=1.0, use_scale_array=False
)
_DDIM = dataclasses.replace(_UNIPC, solver="ddim", num_inference_steps=64, guidance_scale=12.0)
_DDIM_SCALED = dataclasses.replace(_DDIM, use_scale_array=True)
_WAN_PAPER = MigaConfig(stage2_steps=9, stride=10, window_order="sequential")
_WAN_RELEASED = MigaConfig(refine_steps=10, stride=10, guidance_offset=3)
_WAN = MigaConfig(stride=10)
# One frame a level, the noisier end of a window kept, the prompt's first frame held before it (docs/ablation.md).
_OURS = MigaConfig(zigzag_width=1, guidance_frames=1, guidance_anchor=True, commit_offset=-1, judge="x0",
                   channels="all", score_drop=0.2)  # fmt: skip
_WAN_OURS = dataclasses.replace(_OURS, stride=10)
# Few steps: all levels of the queue in one window, whose 21 frames the groups fill; no judge, one unified pass (§9).
_WAN_4_STEPS = MigaConfig(stage2_steps=1, guidance_frames=0, stride=10, self_reflection=False, judge_step=1)
_WAN_8_STEPS = dataclasses.replace(_WAN_4_STEPS, zigzag_width=3)
_DISTILLED = dataclasses.replace(
    _UNIPC, solver="euler", num_inference_steps=4, guidance_scale=1.0, denoising_steps=(1000, 750, 500, 250)
)
_DISTILLED_8 = dataclasses.replace(
    _DISTILLED, num_inference_steps=8, denoising_steps=(1000, 875, 750, 625, 500, 375, 250, 125)
)
# Rolling Forcing: a group a level in one window, behind its first block and the one before the queue, both clean.
_ROLLING = MigaConfig(
    zigzag_width=3, stage2_steps=0, guidance_frames=3, guidance_anchor=True, anchor_frames=3, reference_sigma=0.0,
    stride=15, commit_offset=3, past_context=True, moving_phase=False, warmup="noise", self_reflection=False,
)  # fmt: skip
_ROLLING_SAMPLING = dataclasses.replace(
    _DISTILLED, solver="lcm", num_inference_steps=5, denoising_steps=(1000, 800, 600, 400, 200)
)
# SkyReels-V2's asynchronous schedule as a queue, groups of 5 frames 5 steps apart, and its numbers (§9).
_SKYREELS_SAMPLING = dataclasses.replace(_UNIPC, num_inference_steps=30, shift=8.0, guidance_scale=6.0)
_SKYREELS = dataclasses.replace(_OURS, zigzag_width=5, passes_per_advance=5, stage2_steps=0, stride=15, judge_step=10,
                                past_context=True, moving_phase=False, reference_sigma=0.02)  # fmt: skip
_TI2V_SAMPLING = dataclasses.replace(_UNIPC, num_inference_steps=50)
_TI2V = dataclasses.replace(_OURS, stride=15, reference_sigma=0.0)  # its first frame was clean in training
_A14B_SAMPLING = dataclasses.replace(_UNIPC, num_inference_steps=40, shift=12.0, guidance_scale=4.0)
_A14B = dataclasses.replace(_WAN_OURS, stage2_steps=8, judge_step=8)
_PUSA_SAMPLING = dataclasses.replace(_UNIPC, solver="euler", num_inference_steps=10, guidance_scale=3.0)
_PUSA = dataclasses.replace(_WAN_OURS, zigzag_width=2, stage2_steps=2, judge_step=2, reference_sigma=0.0)
_VC2_OURS = dataclasses.replace(_OURS, stage2_steps=9, stride=8, judge_step=13, reference_groups=3, candidates=5)
_VC2_PAPER = MigaConfig(zigzag_width=4, stage2_steps=9, guidance_frames=6, stride=8, judge_step=13,
                        reference_groups=3, candidates=5, window_order="sequential")  # fmt: skip
# The release counts DDIM indices: it judges at index 50 of 63 and refines from index 10 on, the identity at 0 included.
_VC2_RELEASED = dataclasses.replace(_VC2_PAPER, stage2_steps=10, refine_steps=11, guidance_frames=4,
                                    self_reflection=False, score_drop=0.001)  # fmt: skip
_TINY_SAMPLING = dataclasses.replace(_UNIPC, num_inference_steps=24, shift=3.0, guidance_scale=3.0)
_TINY = dataclasses.replace(_OURS, stage2_steps=5, stride=6, judge_step=8, past_context=True, history_guidance="all")

PRESETS: Mapping[str, Preset] = {
    "wan2.1": Preset(_UNIPC, _WAN),
    "wan2.1-ours": Preset(_UNIPC, _WAN_OURS),
    "wan2.1-paper": Preset(_UNIPC, _WAN_PAPER),
    "wan2.1-released": Preset(_UNIPC, _WAN_RELEASED),
    "wan2.1-4step": Preset(_DISTILLED, _WAN_4_STEPS),
    "wan2.1-8step": Preset(_DISTILLED_8, _WAN_8_STEPS),
    "wan2.1-rolling": Preset(_ROLLING_SAMPLING, _ROLLING),
    "skyreels-v2-df": Preset(_SKYREELS_SAMPLING, _SKYREELS, 544, 960, 24),
    "wan2.2-ti2v-5b": Preset(_TI2V_SAMPLING, _TI2V, 704, 1280, 24),
    "wan2.2-t2v-a14b": Preset(_A14B_SAMPLING, _A14B, guidance_scale_low=3.0),
    "pusa": Preset(_PUSA_SAMPLING, _PUSA),
    "videocrafter2": Preset(_DDIM_SCALED, dataclasses.replace(_VC2_PAPER, window_order="parallel"), 320, 512, 10),
    "videocrafter2-ours": Preset(_DDIM_SCALED, _VC2_OURS, 320, 512, 10),
    "videocrafter2-paper": Preset(_DDIM, _VC2_PAPER, 320, 512, 10),
    "videocrafter2-released": Preset(_DDIM, _VC2_RELEASED, 320, 512, 10),
    "videocrafter2-fifo": Preset(_DDIM, fifo_config(MigaConfig(), 16), 320, 512, 10),
    # Guidance towards the prompt and what has been shown needs a lower scale than towards the prompt (docs/queues.md).
    "tiny": Preset(_TINY_SAMPLING, _TINY, 64, 96, 12, history_guidance_scale=2.0),
}
