"""A new family is one folder and one line of the table: a toy one, made here; and what each of ours says of itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import golden_model
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miga_engine.config import MigaConfig
from miga_engine.engine import Engine
from miga_engine.models import load_transformer, load_vae, loading
from miga_engine.models.bundle import ModelBundle, ModelFacts
from miga_engine.models.convert import convert
from miga_engine.models.family import Family, Sources
from miga_engine.models.protocols import VAE, TextEncoder, Transformer
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.load import load_module
from miga_engine.weights.renamed import RenamedCheckpoint


class ToyTexts:
    """The mean of each prompt's embedding, by row."""

    def __init__(self, means: Tensor) -> None:
        self.means = means

    def table(self, num_rows: int, num_keys: int) -> ToyTexts:
        return ToyTexts(self.means.new_zeros(num_rows))

    def write(self, row: int, prompt: ToyTexts) -> None:
        self.means[row] = prompt.means[0]


class ToyTransformer(Transformer):
    """Velocity that leads to one colour for each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(head_dim=8, text_dim=4)
        self.scale = nn.Parameter(torch.ones(3))

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def encode_timesteps(self, timesteps: Tensor, fps: float | None = None) -> Tensor:
        return timesteps.to(self.scale.device)

    def encode_context(self, context: Tensor) -> ToyTexts:
        return ToyTexts(context.float().mean((1, 2)))

    def num_text_keys(self, num_tokens: int) -> int:
        return num_tokens

    def forward(self, latents, timesteps, context, context_index=None, keep=None) -> Tensor:
        branches = len(context_index) // len(latents)
        x = latents.float().repeat(branches, 1, 1, 1, 1)
        rows = context_index if context_index.ndim == 2 else context_index[:, None].expand(-1, x.shape[2])
        colour = context.means[rows][:, None, :, None, None] * self.scale.float().view(1, -1, 1, 1, 1)
        x = x - colour
        if keep is not None:
            x = x[torch.arange(len(x))[:, None], :, keep.repeat(branches, 1)].transpose(1, 2)
        return x


class ToyVAE(VAE):
    """Pictures twice as large as their latents."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(z_dim=3, spatial_factor=2, frame_ratio=1)
        self.gain = nn.Parameter(torch.ones(1))

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.dtype

    def encode(self, video: Tensor) -> Tensor:
        return video[..., ::2, ::2]

    def stream_decoder(self) -> ToyDecoder:
        return ToyDecoder(self)


class ToyDecoder:
    def __init__(self, vae: ToyVAE) -> None:
        self._vae = vae

    def push(self, latents: Tensor) -> Tensor:
        return (F.interpolate(latents, scale_factor=(1.0, 2.0, 2.0)) * self._vae.gain).clamp(-1.0, 1.0)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        assert not state


class ToyTextEncoder(TextEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=256)
        self.table = nn.Parameter(torch.ones(256, 4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.table[ids] if not ids.is_meta else ids.new_empty(*ids.shape, 4, dtype=torch.float32)


def toy_tokenizer(prompts: list[str]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([list(f"{prompt:8}".encode()[:8]) for prompt in prompts])
    return ids, torch.ones_like(ids)


def _network(build, path: Path, prefix: str, device, dtype):
    checkpoint = open_checkpoint(path / "toy.safetensors")
    part = RenamedCheckpoint(checkpoint, lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    return load_module(build, part, device=device, dtype=dtype or torch.float32)


def _load_transformer(sources: Sources, device=None, dtype=None) -> ToyTransformer:
    return _network(ToyTransformer, sources.root, "transformer.", device, dtype)


def _load_vae(sources: Sources, device=None, dtype=torch.float32) -> ToyVAE:
    return _network(ToyVAE, sources.root, "vae.", device, dtype)


def _load_text_encoder(sources: Sources, device=None, dtype=None) -> ToyTextEncoder:
    return _network(ToyTextEncoder, sources.root, "text.", device, dtype)


def _open(sources: Sources, device, dtype, vae_dtype) -> ModelBundle:
    transformer = _load_transformer(sources, device, dtype)
    return ModelBundle(
        path=sources.root,
        device=torch.device(device or "cpu"),
        dtype=transformer.dtype,
        transformer=transformer,
        vae=_load_vae(sources, device, vae_dtype),
        facts=ModelFacts(
            window_frames=4,
            size_multiple=2,
            text_len=8,
            prediction_type="velocity",
            default_preset="tiny",
            default_negative_prompt="",
            protocol_frames=9,
        ),
        open_text_encoder=lambda: _load_text_encoder(sources, device, dtype),
        open_tokenizer=lambda: toy_tokenizer,
        rehearse=lambda: None,
    )


TOY = Family(
    name="toy",
    window_bound=16,
    recognises=lambda path: (path / "toy.safetensors").is_file(),
    open_bundle=_open,
    load_transformer=_load_transformer,
    load_vae=_load_vae,
    load_text_encoder=_load_text_encoder,
    load_tokenizer=lambda sources, text_len: toy_tokenizer,
    network_bytes=lambda sources: {"transformer": 12, "VAE": 4, "text encoder": 4096},
    plain_files=lambda sources: {},
    kept_dtypes=lambda checkpoint: (lambda key: key == "vae.gain") if "vae.gain" in checkpoint.shapes else None,
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a toy model, whose family has its line in the table."""
    monkeypatch.setattr(loading, "FAMILIES", (*loading.FAMILIES, TOY))
    parts = {"transformer.": ToyTransformer(), "vae.": ToyVAE(), "text.": ToyTextEncoder()}
    tensors = {prefix + key: value for prefix, part in parts.items() for key, value in part.state_dict().items()}
    tensors["text.table"] = torch.arange(1024.0).view(256, 4) / 512
    save_file(tensors, tmp_path / "toy.safetensors")
    return tmp_path


@pytest.mark.slow
def test_a_toy_family_loads_estimates_and_generates(toy: Path) -> None:
    options = {"height": 16, "width": 24, "num_inference_steps": 7, "guidance_scale": 2.0}
    miga = MigaConfig(zigzag_width=2, stage2_steps=2, guidance_frames=1, stride=2, judge_step=2, candidates=2)
    assert isinstance(load_vae(toy), ToyVAE)
    estimate = Engine.estimate(toy, device="cpu", num_frames=9, miga=miga, **options)
    assert estimate.resident["transformer weights"] == 12
    assert estimate.peaks["forward"] > 0
    engine = Engine.from_pretrained(toy, "cpu")
    assert engine.bundle.facts.conditions == ("image", "video")
    prompt = {0: "dark", 5: "zzzzzzzz"}
    video = engine.generate(prompt, 9, miga=miga, **options).frames
    assert video.shape == (9, 16, 24, 3)
    assert torch.equal(video, engine.generate(prompt, 9, miga=miga, **options).frames)
    assert video[-1].float().mean() > video[0].float().mean()  # letters further on in the alphabet are brighter


def test_the_families_of_before_are_recognised_beside_a_new_one(toy: Path, tmp_path_factory) -> None:
    names = {"wan": "Wan2.1", "videocrafter2": "VideoCrafter2"}
    for name, family in golden_model.FAMILIES.items():
        folder = family.build(tmp_path_factory.mktemp(name) / "model")
        known = [family.name for family in loading.FAMILIES if family.recognises(folder)]
        assert known == [names[name]]
    assert loading.family_of(Sources(toy)) is TOY
    assert loading.family_of(Sources(Path("nowhere"))) is loading.FAMILIES[0]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pth", ".ckpt")]


@pytest.mark.slow
@pytest.mark.parametrize("family", golden_model.FAMILIES)
def test_what_a_loader_keeps_in_float32_is_not_cast_by_a_conversion(tmp_path: Path, family: str) -> None:
    """Each family by its own rule: a converted model is, in bfloat16, the model in bfloat16."""
    folder = golden_model.FAMILIES[family].build(tmp_path / "model")
    transformer = load_transformer(folder, dtype=torch.bfloat16).state_dict()
    vae = load_vae(folder).state_dict()
    for path in _files(folder):
        target = path.with_suffix(".safetensors")
        convert(path, tmp_path / "converted.safetensors", torch.bfloat16)
        path.unlink()
        (tmp_path / "converted.safetensors").replace(target)
    stored = {key: tensor for path in _files(folder) for key, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
    for expected, network in ((transformer, load_transformer(folder)), (vae, load_vae(folder))):
        state = network.state_dict()
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key


def test_one_network_of_a_file_is_converted_by_the_rule_of_its_family(tmp_path: Path) -> None:
    source = golden_model.GOLDENS / "vc2" / "vae.safetensors"
    convert(source, tmp_path / "vae.safetensors", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "vae.safetensors").values()} == {torch.float32}


def test_a_new_family_converts_by_its_own_rule(toy: Path) -> None:
    convert(toy / "toy.safetensors", toy / "out.safetensors", torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in load_file(toy / "out.safetensors").items()}
    assert [key for key, dtype in dtypes.items() if dtype == torch.float32] == ["vae.gain"]
