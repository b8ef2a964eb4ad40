"""The modules of a WanPipeline make a long video.

`python examples/diffusers_pipeline.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers`
"""

import sys

import torch
from diffusers import WanPipeline

from miga_engine.integrations.diffusers import MigaPipeline
from miga_engine.video.outputs import open_sink

short = WanPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32 if "--cpu" in sys.argv else torch.bfloat16)
if "--cpu" not in sys.argv:
    short.to("cuda")
pipe = MigaPipeline.from_pipe(short)  # the same weights, not once more

pictures = pipe(
    "a red balloon over snowy hills", height=64, width=96, num_frames=33, generator=torch.Generator().manual_seed(0),
    output_type="pil",
).frames[0]  # fmt: skip
pictures[-1].save("last.png")

# As long as wanted, in the memory of a few seconds, and written while it is made.
stream = pipe.stream({0: "a red balloon over snowy hills", 48: "the same at night"}, num_frames=97, height=64, width=96)
with open_sink("long.mp4", stream.request.fps, 96, 64) as sink, stream:
    for chunk in stream:
        sink.write(chunk.frames)
