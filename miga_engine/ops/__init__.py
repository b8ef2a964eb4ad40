"""What everybody calls: one public function per op, with its schema, fake, checks and dispatch.

`torch.ops.miga.<name>` has up to three implementations that agree: the eager oracle (`<name>_reference`, every device),
C++ on the CPU (csrc/), Triton on GPUs (kernels/). The public functions check their arguments and call it. C++ checks
once more what its memory depends on; Triton, on whose devices a look at an index would be waited for, bounds it. They
are for inference and define no gradient; `frame_attention` alone takes SDPA where one is wanted.
"""

from miga_engine import _extension
from miga_engine.ops.consistency_score import consistency_score, consistency_score_reference
from miga_engine.ops.conv2d import conv2d
from miga_engine.ops.frame_attention import (
    SELF_ATTENTION_ONLY,
    attention_backends,
    attention_choices,
    frame_attention,
    frame_attention_reference,
    require_attention,
    untimed_backend,
)
from miga_engine.ops.gelu import gelu_, gelu_reference
from miga_engine.ops.guidance_dots import guidance_dots, guidance_dots_reference
from miga_engine.ops.linear import linear
from miga_engine.ops.norm_modulate import (
    norm_modulate,
    norm_modulate_reference,
    residual_norm_modulate,
    residual_norm_modulate_reference,
)
from miga_engine.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rms_norm_
from miga_engine.ops.sampler_update import sampler_update, sampler_update_reference

__all__ = [
    "SELF_ATTENTION_ONLY",
    "attention_backends",
    "attention_choices",
    "consistency_score",
    "consistency_score_reference",
    "conv2d",
    "frame_attention",
    "frame_attention_reference",
    "gelu_",
    "gelu_reference",
    "guidance_dots",
    "guidance_dots_reference",
    "linear",
    "norm_modulate",
    "norm_modulate_reference",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "require_attention",
    "residual_norm_modulate",
    "residual_norm_modulate_reference",
    "rms_norm_",
    "sampler_update",
    "sampler_update_reference",
    "untimed_backend",
]

_extension.load()  # the C++ CPU kernels, where they were built, take precedence over the eager oracle
