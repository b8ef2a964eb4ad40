"""What everybody calls: one public function per op, with its schema, fake, checks and dispatch.

`torch.ops.miga.<name>` has up to four implementations that agree: the eager oracle (`reference`, every device), C++ on
the CPU (csrc/), Triton on GPUs (kernels/). The public functions check their arguments and call it. C++ checks once more
what its memory depends on; Triton, on whose devices a look at an index would be waited for, bounds it. They are for
inference and define no gradient; `frame_attention` alone takes SDPA where one is wanted.
"""

from miga_engine import _extension
from miga_engine.ops.attention import (
    SELF_ATTENTION_ONLY,
    attention_backends,
    attention_choices,
    frame_attention,
    require_attention,
    untimed_backend,
)
from miga_engine.ops.convolution import conv2d
from miga_engine.ops.linear import linear
from miga_engine.ops.modulation import norm_modulate, qk_norm_rope, residual_norm_modulate, rms_norm_
from miga_engine.ops.sampling import consistency_score, sampler_update

__all__ = [
    "SELF_ATTENTION_ONLY",
    "attention_backends",
    "attention_choices",
    "consistency_score",
    "conv2d",
    "frame_attention",
    "linear",
    "norm_modulate",
    "qk_norm_rope",
    "require_attention",
    "residual_norm_modulate",
    "rms_norm_",
    "sampler_update",
    "untimed_backend",
]

_extension.load()  # the C++ CPU kernels, where they were built, take precedence over the eager oracle
