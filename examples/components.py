"""State dicts that a program holds already become an engine, which gives its memory back when it is told to.

`python examples/components.py`
"""

import json
from pathlib import Path

from safetensors.torch import load_file

import miga_engine
from miga_engine import Engine

# Of any Wan, under official names, Diffusers' or ComfyUI's; modules do as well, and bring their config with them.
folder = Path(miga_engine.__file__).parent / "tiny" / "weights"
engine = Engine.from_components(
    transformer=load_file(folder / "diffusion_pytorch_model.safetensors"),
    transformer_config=json.loads((folder / "config.json").read_text()),
    vae=load_file(folder / "Wan2.1_VAE.safetensors"),
    text_encoder=load_file(folder / "models_t5_umt5-xxl-enc-bf16.safetensors"),
    tokenizer=folder / "google/umt5-xxl/tokenizer.json",
    dtype="float32",  # others than the tensors' own are copies; left out, nothing is copied
    vae_dtype="float32",
    window_frames=13,
    preset="tiny",
)
kite = engine.bundle.encode_prompts(["a yellow kite over green hills at dusk"])
name = engine.hold_embedding(kite)  # an embedding in place of a text, from wherever it is
prompts = {0: name, 24: "a red balloon over snowy hills"}
with engine.stream(prompts, num_frames=49, miga={"warmup": "clip"}) as stream:
    for chunk in stream:
        print(f"frames {chunk.first_frame} to {chunk.first_frame + len(chunk.frames) - 1}", flush=True)
print(f"{engine.network_bytes() / 2**20:.0f} MiB of weights")
engine.unload()
print(f"{engine.network_bytes() / 2**20:.0f} MiB of weights")
