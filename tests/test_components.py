"""Engines of parts in memory: the frames of the files' engine, no weight twice, and memory given back at once."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_model
import live_modules
import pytest
import random_wan
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from miga_engine import CheckpointError, ConfigError, Engine
from miga_engine.models.protocols import VAE
from miga_engine.models.wan.dit import WanDiT

OPTIONS: dict[str, Any] = {**golden_model.OPTIONS, "num_frames": 21, "miga": golden_model.MIGA, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def frames(folder: Path) -> torch.Tensor:
    return Engine.from_pretrained(folder, "cpu").generate("a red balloon", **OPTIONS).frames


def _storages(*networks: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for network in networks for tensor in network.state_dict().values()}


def test_live_modules_are_shared_and_give_the_frames_of_the_files(folder: Path, frames: torch.Tensor) -> None:
    parts = live_modules.modules_of(folder)
    before = {name: tensor.clone() for name, tensor in parts["transformer"].state_dict().items()}
    engine = Engine.from_components(**parts, **live_modules.facts_of(folder))
    assert torch.equal(engine.generate("a red balloon", **OPTIONS).frames, frames)
    ours = engine.bundle.transformer, engine.bundle.vae, engine.bundle.text_encoder
    assert _storages(*ours) <= _storages(parts["transformer"], parts["vae"], parts["text_encoder"])
    assert all(parameter.requires_grad for parameter in parts["transformer"].parameters())  # the host's, as they were
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts["transformer"].state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_state_dicts_of_official_names(folder: Path, frames: torch.Tensor, mode: Any) -> None:
    """As hosts have them who load under inference mode, too."""
    with mode():
        parts = {
            "transformer": load_file(folder / "diffusion_pytorch_model.safetensors"),
            "vae": load_file(folder / "Wan2.1_VAE.safetensors"),
            "text_encoder": torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True),
            "tokenizer": folder / "google/umt5-xxl/tokenizer.json",
        }
        parts = {
            name: {key: tensor.clone() for key, tensor in part.items()} if isinstance(part, dict) else part
            for name, part in parts.items()
        }
        facts = live_modules.facts_of(folder)
        config = {**facts.pop("transformer_config"), "num_heads": 3}
        engine = Engine.from_components(**parts, **facts, transformer_config=config)
        made = engine.generate("a red balloon", **OPTIONS).frames
    assert torch.equal(made, frames)


def test_all_of_videocrafter2_is_one_state_dict(tmp_path: Path) -> None:
    file = golden_model.build_videocrafter2(tmp_path / "vc2")
    of_files = Engine.from_pretrained(file, "cpu")
    weights = next(path for path in (file, *file.glob("*")) if path.suffix in (".ckpt", ".safetensors"))
    tensors = load_file(weights)
    engine = Engine.from_components(transformer=tensors, tokenizer=weights.parent, window_frames=5)
    options = {**golden_model.FAMILIES["videocrafter2"].options, "num_frames": 5}
    assert torch.equal(
        engine.generate("a red balloon", **options).frames, of_files.generate("a red balloon", **options).frames
    )
    with pytest.raises(CheckpointError, match="leave vae out"):
        Engine.from_components(transformer=tensors, vae=tensors, tokenizer=weights.parent)


def test_embeddings_in_place_of_a_text_encoder(folder: Path, frames: torch.Tensor) -> None:
    of_files = Engine.from_pretrained(folder, "cpu")
    red, negative, blue = (of_files.bundle.encode_prompts([text]) for text in ("a red balloon", "blurry", "blue"))
    parts = live_modules.modules_of(folder)
    del parts["text_encoder"], parts["tokenizer"]
    padded = torch.cat([red, red.new_zeros(1, 16 - red.shape[1], red.shape[2])], dim=1)
    engine = Engine.from_components(
        **parts, embeddings={"a red balloon": padded, "blurry": negative[0]}, **live_modules.facts_of(folder)
    )
    assert torch.equal(engine.generate("a red balloon", **OPTIONS).frames, frames)
    name = engine.hold_embedding(blue)
    assert name == engine.hold_embedding(blue.clone())
    made = engine.generate(name, **OPTIONS).frames
    assert torch.equal(made, of_files.generate("blue", **OPTIONS).frames)
    with pytest.raises(ConfigError, match="no embedding of the prompt 'a green one' was given"):
        engine.generate("a green one", **OPTIONS)
    for wrong, sentence in (
        (blue[..., :5], r"has shape \[1, \d+, 5\]: the model takes \[T, 32\]"),
        (blue * torch.nan, "holds NaN or infinity"),
        ([1.0], "of type list: give a tensor of floats"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            engine.hold_embedding(wrong)


class Grey(VAE):
    """A decoder of a host's own: every frame is the mean of its latents."""

    class Sizes:
        z_dim, spatial_factor, frame_ratio = 16, 8, 4

    config = Sizes()
    dtype = torch.float32

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def stream_decoder(self) -> Any:
        return Frames()


class Frames:
    def __init__(self) -> None:
        self.count = 0

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        batch, _, num, height, width = latents.shape
        frames = latents.mean((1, 3, 4)).tanh().repeat_interleave(4, dim=1)[:, 0 if self.count else 3 :]
        self.count += num
        return frames[:, None, :, None, None].expand(batch, 3, -1, 8 * height, 8 * width)

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.count = int(state["count"])


def test_a_decoder_of_ones_own(folder: Path, tmp_path: Path) -> None:
    parts = live_modules.modules_of(folder) | {"vae": Grey()}
    engine = Engine.from_components(**parts, **live_modules.facts_of(folder))
    frames = engine.generate("a red balloon", **OPTIONS).frames
    assert (frames == frames[:, :1, :1, :1]).all()
    assert len(frames) == 21
    assert frames[0, 0, 0, 0] != frames[-1, 0, 0, 0]
    with engine.stream("a red balloon", **OPTIONS) as stream:
        begun = next(stream).frames
        stream.save(tmp_path / "s.safetensors")
    with engine.resume(tmp_path / "s.safetensors") as stream:
        rest = [chunk.frames for chunk in stream]
    assert torch.equal(torch.cat([begun, *rest]), frames)


def test_sessions_pass_between_files_and_components(folder: Path, frames: torch.Tensor, tmp_path: Path) -> None:
    engine = Engine.from_components(**live_modules.modules_of(folder), **live_modules.facts_of(folder))
    with engine.stream("a red balloon", **OPTIONS) as stream:
        begun = next(stream).frames
        stream.save(tmp_path / "s.safetensors")
    with Engine.from_pretrained(folder, "cpu").resume(tmp_path / "s.safetensors") as stream:
        rest = [chunk.frames for chunk in stream]
    assert torch.equal(torch.cat([begun, *rest]), frames)


def test_what_is_no_part_is_refused_in_a_sentence(folder: Path) -> None:
    parts, facts = live_modules.modules_of(folder), live_modules.facts_of(folder)
    with pytest.raises(CheckpointError, match="the transformer that was given is of type int: give a module or a"):
        Engine.from_components(**parts | {"transformer": 3}, **facts)
    with pytest.raises(CheckpointError, match="the vae that was given is of type int: give a module or a state dict"):
        Engine.from_components(**parts | {"vae": 3}, **facts)
    with pytest.raises(CheckpointError, match=r"holds .* without data, on the device 'meta'"):
        Engine.from_components(**parts | {"transformer": parts["transformer"].to("meta")}, **facts)
    with pytest.raises(CheckpointError, match="the transformer that was given does not hold"):
        Engine.from_components(**parts | {"transformer": parts["vae"]}, **facts)
    with pytest.raises(ConfigError, match="preset must be one of"):
        Engine.from_components(**parts, preset="none")
    with pytest.raises(TypeError, match="transformer"):
        Engine.from_components(vae=parts["vae"])


def test_unloaded_networks_are_gone_and_come_back(folder: Path, frames: torch.Tensor) -> None:
    engine = Engine.from_pretrained(folder, "cpu")
    assert torch.equal(engine.generate("a red balloon", **OPTIONS).frames, frames)
    assert engine.network_bytes() > 0
    stream = engine.stream("a red balloon", **OPTIONS)
    begun = next(stream).frames
    engine.unload()
    assert not engine.is_loaded
    assert engine.network_bytes() == 0
    made = torch.cat([begun, *(chunk.frames for chunk in stream)])  # which keeps what it began with
    assert torch.equal(made, frames)
    assert torch.equal(engine.generate("a red balloon", **OPTIONS).frames, frames)
    assert engine.is_loaded


def test_unloaded_components_are_let_go_of(folder: Path) -> None:
    import weakref

    parts = live_modules.modules_of(folder)
    engine = Engine.from_components(**parts, **live_modules.facts_of(folder))
    engine.generate("a red balloon", **OPTIONS | {"num_frames": 5})
    known = [weakref.ref(part) for part in (parts["transformer"], parts["vae"], parts["text_encoder"])]
    engine.unload()
    del parts
    gc.collect()
    assert [ref() for ref in known] == [None] * 3
    with pytest.raises(ConfigError, match=r"was unloaded, and its networks were given to it in memory"):
        engine.generate("a red balloon", **OPTIONS)


RESIDENT = """
import sys
from pathlib import Path
from miga_engine import Engine

def mib():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in l).split()[1]) / 1024

Engine.from_pretrained(sys.argv[1], "cpu").unload()  # what the libraries take stays
before = mib()
engine = Engine.from_pretrained(sys.argv[1], "cpu")
loaded, held = mib(), engine.network_bytes() / 2**20
engine.unload()
print(before, loaded, mib(), held)
"""


@pytest.mark.slow
def test_memory_is_given_back_to_the_system_at_once(tmp_path: Path) -> None:
    folder = random_wan.official(tmp_path / "wan")
    sizes = dataclasses.replace(random_wan.CONFIG, dim=512, ffn_dim=2048, num_heads=4, num_layers=12)
    save_file(WanDiT(sizes).state_dict(), folder / random_wan.TRANSFORMER)
    said = {**dataclasses.asdict(sizes), "_class_name": "WanModel", "model_type": "t2v"}
    del said["inject_sample_info"]
    (folder / "config.json").write_text(json.dumps(said))
    command = [sys.executable, "-c", RESIDENT, str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    before, loaded, after, held = map(float, printed.split())
    assert held > 200
    assert loaded - before > 0.9 * held
    assert after - before < 0.05 * held
