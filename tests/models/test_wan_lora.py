"""LoRA files under every name that Wan's modules go by, and those that the reference libraries write themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from places import GOLDENS
from refusals import passes_or_is_refused, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miga_engine.errors import CheckpointError
from miga_engine.models.wan.dit import WanDiT
from miga_engine.models.wan.layouts import official_transformer, transformer_config
from miga_engine.models.wan.lora import merge_loras
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.load import load_module
from miga_engine.weights.lora import Lora

DIT_FILE = GOLDENS / "wan_dit" / "official" / "diffusion_pytorch_model.safetensors"
DIFFUSERS = GOLDENS / "wan_dit" / "diffusers" / "transformer"
WEIGHTS = load_file(DIT_FILE)
RANK = 4

ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
DIFFUSERS_NAMES = {
    **{
        f"blocks.{i}.{ours}.{p}": f"blocks.{i}.{theirs}.{q}"
        for i in (0, 1)
        for ours, theirs in ATTENTION.items()
        for p, q in PROJECTIONS.items()
    },
    **{f"blocks.{i}.ffn.0": f"blocks.{i}.ffn.net.0.proj" for i in (0, 1)},
    **{f"blocks.{i}.ffn.2": f"blocks.{i}.ffn.net.2" for i in (0, 1)},
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
MODULES = tuple(DIFFUSERS_NAMES)
Tensors = dict[str, Tensor]


def base(file: Path = DIT_FILE) -> Checkpoint:
    return official_transformer(open_checkpoint(file))


def lora(path: Path, tensors: Tensors, strength: float = 1.0, **metadata: str) -> Lora:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return Lora(open_checkpoint(path), strength)


def factors(module: str) -> tuple[Tensor, Tensor]:
    """A and B for a module, the same every time."""
    generator = torch.Generator().manual_seed(sum(module.encode()))
    weight = WEIGHTS[f"{module}.weight"]
    down = torch.randn(RANK, *weight.shape[1:], generator=generator) / 8
    return down, torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator) / 8


def weights(checkpoint: Checkpoint) -> Tensors:
    return {key: checkpoint.read(key) for key in checkpoint.shapes}


def assert_merged(checkpoint: Checkpoint, factor: float, modules: tuple[str, ...] = MODULES) -> None:
    """Of all weights, those of these modules are W + factor · B @ A, and all others untouched."""
    changed = {f"{module}.weight": factors(module) for module in modules}
    for key, value in weights(checkpoint).items():
        if key in changed:
            down, up = changed[key]
            expected = WEIGHTS[key] + factor * (up.flatten(1) @ down.flatten(1)).view_as(WEIGHTS[key])
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
            assert value.dtype == torch.float32
        else:
            assert torch.equal(value, WEIGHTS[key]), key


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module


def underscored(prefix: str, names: dict[str, str] | None = None) -> Callable[[str], str]:
    return lambda module: prefix + (names or {}).get(module, module).replace(".", "_")


def diffusers_dotted(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + DIFFUSERS_NAMES[module]


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")


@pytest.mark.parametrize(
    ("name", "endings", "alpha"),
    [
        pytest.param(underscored("lora_unet_"), DOWN_UP, 2.0, id="kohya, musubi"),
        pytest.param(underscored("lora_unet__"), DOWN_UP, 8.0, id="VideoX-Fun"),
        pytest.param(underscored("lycoris_"), DOWN_UP, 2.0, id="LyCORIS"),
        pytest.param(underscored("lora_transformer_", DIFFUSERS_NAMES), DOWN_UP, 1.0, id="OneTrainer"),
        pytest.param(underscored("lora_unet_", DIFFUSERS_NAMES), DOWN_UP, 2.0, id="kohya on diffusers"),
        pytest.param(dotted("diffusion_model."), A_B, None, id="diffusion-pipe, ai-toolkit"),
        pytest.param(dotted("diffusion_model."), DOWN_UP, 2.0, id="LightX2V"),
        pytest.param(dotted("model.diffusion_model."), DOWN_UP, None, id="single file"),
        pytest.param(diffusers_dotted("transformer."), A_B, None, id="diffusers"),
        pytest.param(diffusers_dotted("base_model.model."), A_B, None, id="PEFT on diffusers"),
        pytest.param(
            dotted("base_model.model."), (".lora_A.default.weight", ".lora_B.default.weight"), None, id="PEFT"
        ),
        pytest.param(dotted("base_model.model.diffusion_model."), A_B, None, id="PEFT, two prefixes"),
        pytest.param(dotted("pipe.dit."), A_B, None, id="DiffSynth"),
        pytest.param(dotted(""), (".lora_A.default.weight", ".lora_B.default.weight"), None, id="DiffSynth, Pusa"),
        pytest.param(dotted("model."), (".lora_A", ".lora_B"), None, id="without weight"),
        pytest.param(diffusers_dotted("transformer."), ("_lora.down.weight", "_lora.up.weight"), None, id="_lora"),
        pytest.param(diffusers_dotted(""), (".lora.down.weight", ".lora.up.weight"), None, id=".lora"),
        pytest.param(
            dotted(""), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"), 3.0, id="lora_linear_layer"
        ),
    ],
)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_every_spelling_means_the_same_modules(
    tmp_path: Path, name: Callable[[str], str], endings: tuple[str, str], alpha: float | None, strength: float
) -> None:
    tensors = {}
    for module in MODULES:
        tensors |= {name(module) + ending: value for ending, value in zip(endings, factors(module), strict=True)}
        if alpha is not None:
            tensors[name(module) + ".alpha"] = torch.tensor(alpha)
    given = lora(tmp_path / "lora.safetensors", tensors, strength)
    assert_merged(merge_loras(base(), [given]), strength * (1.0 if alpha is None else alpha / RANK))
    assert_merged(merge_loras(base(next(DIFFUSERS.glob("*.safetensors"))), [given]), strength * (alpha or RANK) / RANK)


def test_pickled_files_are_merged_too(tmp_path: Path) -> None:
    tensors = {}
    for module in MODULES:
        down, up = factors(module)
        tensors |= {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}
    torch.save(tensors, tmp_path / "pusa_v1.pt")
    assert_merged(merge_loras(base(), [Lora(open_checkpoint(tmp_path / "pusa_v1.pt"), 1.4)]), 1.4)


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_patch_embedding_is_a_matrix_product_too(tmp_path: Path, is_flat: bool) -> None:
    down, up = factors("patch_embedding")
    pair = {".lora_down.weight": down.flatten(1) if is_flat else down, ".lora_up.weight": up.flatten(1)}
    given = lora(tmp_path / "a.safetensors", {"lora_unet_patch_embedding" + end: value for end, value in pair.items()})
    assert_merged(merge_loras(base(), [given]), 1.0, ("patch_embedding",))


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
        ("diffusion_model.blocks.1.norm3.diff", "blocks.1.norm3.weight"),
        ("diffusion_model.blocks.1.norm3.diff_b", "blocks.1.norm3.bias"),
        ("transformer.blocks.1.norm2.w_norm", "blocks.1.norm3.weight"),
        ("lora_unet_blocks_1_norm3.b_norm", "blocks.1.norm3.bias"),
        ("blocks.1.diff_m", "blocks.1.modulation"),
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.modulation"),
        ("lora_unet_blocks_0_modulation.diff", "blocks.0.modulation"),
        ("transformer.blocks.0.scale_shift_table.diff", "blocks.0.modulation"),
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("lora_unet_blocks_1.diff_m", "blocks.1.modulation"),
        ("diffusion_model.head.head.diff", "head.head.weight"),
        ("diffusion_model.head.head.diff_b", "head.head.bias"),
        ("diffusion_model.time_projection.1.diff", "time_projection.1.weight"),
        ("diffusion_model.text_embedding.2.diff_b", "text_embedding.2.bias"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
        ("lycoris_blocks_0_ffn_2.diff_b", "blocks.0.ffn.2.bias"),
    ],
)
def test_full_differences_are_added(tmp_path: Path, key: str, target: str) -> None:
    difference = torch.linspace(-1, 1, WEIGHTS[target].numel()).view_as(WEIGHTS[target])
    given = lora(tmp_path / "a.safetensors", {key: difference, key.rpartition(".")[0] + ".alpha": torch.ones(())}, 0.5)
    for name, value in weights(merge_loras(base(), [given])).items():
        expected = WEIGHTS[name] + 0.5 * difference if name == target else WEIGHTS[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "diffusion_model.img_emb.proj.1.diff"),
        ("lora_unet_blocks_0_cross_attn_v_img.lora_down.weight", "lora_unet_img_emb_proj_1.alpha"),
        ("transformer.blocks.0.attn2.add_k_proj.lora_A.weight", "blocks.1.cross_attn.norm_k_img.diff"),
        ("lora_unet_blocks_0_attn2_add_v_proj.lora_down.weight", "lora_unet_blocks_7_attn2_norm_added_k.diff"),
        (
            "transformer.condition_embedder.image_embedder.ff.net.0.proj.lora_A.weight",
            "lora_unet_condition_embedder_image_embedder_norm1.diff",
        ),
    ],
)
def test_what_changes_image_conditioning_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: tuple[str, str]
) -> None:
    tensors = {key: torch.ones(4, 7) for key in keys}
    tensors[keys[0].replace("_A.", "_B.").replace("_down.", "_up.")] = torch.ones(7, 4)
    if keys[1].endswith(".alpha"):
        tensors[keys[1].replace(".alpha", ".diff")] = torch.ones(3)
    down, up = factors("blocks.1.ffn.2")
    tensors |= {"blocks.1.ffn.2.lora_A.weight": down, "blocks.1.ffn.2.lora_B.weight": up}
    assert_merged(merge_loras(base(), [lora(tmp_path / "a.safetensors", tensors)]), 1.0, ("blocks.1.ffn.2",))
    (record,) = caplog.records
    assert record.name == "miga_engine"
    assert "and 1 more modules, which this model has not and does without" in record.getMessage()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("diffusion_model.blocks.39.self_attn.q", r"changes blocks\.39\.self_attn\.q, and this model has 2 blocks and"),
        ("lora_unet_blocks_39_attn1_to_q", r"changes blocks\.39\.self_attn\.q, and this model has 2 blocks and noth"),
        ("transformer_2.blocks.0.attn1.to_q", r"changes transformer_2\.blocks\.0\.self_attn\.q, and this model"),
        ("lora_unet_input_blocks_1_1_proj_in", r"changes lora_unet_input_blocks_1_1_proj_in, and this model has 2"),
        (
            "diffusion_model.vace_blocks.0.ffn.0",
            r"changes vace_blocks\.0\.ffn\.0, and this .*: give a LoRA made for th",
        ),
        ("lora_unet_", r"changes lora_unet_, and this model"),
        ("diffusion_model", r"changes diffusion_model, and this model"),
        ("lora_te1_text_model_q", r"lora_te1_text_model_q\.lora_A\.weight, which changes a text encoder: give a LoRA"),
    ],
)
def test_modules_that_the_model_lacks_are_named(tmp_path: Path, module: str, sentence: str) -> None:
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 96), f"{module}.lora_B.weight": torch.ones(96, 4)}
    given = lora(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=sentence):
        merge_loras(base(), [given])


def test_whole_models_and_loras_of_other_sizes_are_refused(tmp_path: Path) -> None:
    sentence = refusal(lambda: merge_loras(base(), [Lora(open_checkpoint(DIT_FILE))]), CheckpointError)
    assert "and no LoRA: give a LoRA file, and a whole model as the model itself" in sentence
    wide = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 128),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(128, 4),
    }
    given = lora(tmp_path / "a.safetensors", wide)
    sentence = refusal(lambda: merge_loras(base(), [given]), CheckpointError)
    assert "changes blocks.0.self_attn.q.weight as [128, 128] where the model has [96, 96]: give a LoRA" in sentence


def test_without_files_the_checkpoint_is_the_same() -> None:
    checkpoint = base()
    assert merge_loras(checkpoint, []) is checkpoint


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> WanDiT:
    config = transformer_config(checkpoint, json.loads((DIT_FILE.parent / "config.json").read_text()))
    return load_module(lambda: WanDiT(config), checkpoint, device=None, dtype=dtype, keeps_fp32=WanDiT.keeps_fp32)


def add_beside(network: WanDiT, factor: float) -> None:
    """x · Aᵀ · Bᵀ · s beside each linear map that is called as a module."""
    for name, module in network.named_modules():
        if not name.startswith(("blocks.", "text_embedding.")) or not isinstance(module, nn.Linear):
            continue
        down, up = factors(name)

        def hook(
            module: nn.Linear, inputs: tuple[Tensor], output: Tensor, down: Tensor = down, up: Tensor = up
        ) -> Tensor:
            (x,) = inputs
            beside = factor * (x.float() @ down.T @ up.T)
            if not getattr(module, "gelu", False):
                return (output.float() + beside).to(output.dtype)
            before = F.linear(x.float(), module.weight.float(), module.bias.float())
            return F.gelu(before + beside, approximate="tanh").to(output.dtype)

        module.register_forward_hook(hook)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_merged_network_computes_what_one_with_factors_beside_does(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    tensors = {}
    for module in MODULES:
        if module.startswith(("blocks.", "text_embedding.")):
            down, up = factors(module)
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            tensors[f"{module}.alpha"] = torch.tensor(12.0)
    given = lora(tmp_path / "a.safetensors", tensors, 0.8)
    merged, beside = load(merge_loras(base(), [given]), dtype), load(base(), dtype)
    golden = load_file(GOLDENS / "wan_dit" / "io.safetensors")
    inputs = golden["latent"][None], golden["t_frames_0"][None], golden["context_0"][None]
    plain = beside(*inputs)
    add_beside(beside, 0.8 * 12.0 / RANK)
    expected = beside(*inputs)
    change, error = (expected - plain).norm(), (merged(*inputs) - expected).norm()
    assert change > 0.2 * plain.norm()
    assert error < tolerance * change, f"{error / change:.2g}"


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 8)
            if "magnitude" in name:
                parameter.abs_().add_(0.5)
    return model


OPTIONS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"alpha_pattern": {"blocks.0.self_attn.q": 2, "ffn.2": 16}, "rank_pattern": {"blocks.1.ffn.2": 2}},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # its own biases
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapters_that_peft_writes_are_merged_as_peft_does(tmp_path: Path, options: dict[str, object]) -> None:
    peft = pytest.importorskip("peft")
    network = load(base(), torch.float32)
    targets = ["q", "k", "v", "o", "ffn.0", "ffn.2", "time_projection.1", "head.head", "patch_embedding"]
    if options.get("lora_bias"):
        targets.remove("patch_embedding")
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, **options)
    model = randomised(peft.get_peft_model(network, config))
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().state_dict()
    given = Lora(open_checkpoint(tmp_path / "adapter_model.safetensors"))
    assert_same(weights(merge_loras(base(), [given])), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"attn1.to_q": 2}}], ids=str
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_adapters_that_diffusers_writes_are_merged_as_diffusers_does(
    tmp_path: Path, options: dict[str, object], strength: float
) -> None:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from diffusers.training_utils import _collate_lora_metadata

    transformer = diffusers.WanTransformer3DModel.from_pretrained(DIFFUSERS)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out", "time_proj"]
    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, **options))
    randomised(transformer)
    diffusers.WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    given = Lora(open_checkpoint(tmp_path / "pytorch_lora_weights.safetensors"), strength)
    ours = weights(merge_loras(base(), [given]))
    if options.get("use_dora") and strength != 1:
        return  # theirs scales the pair and not the change
    transformer.fuse_lora(lora_scale=strength)
    transformer.unload_lora()
    transformer.save_pretrained(tmp_path / "fused")
    assert_same(ours, weights(base(next((tmp_path / "fused").glob("*.safetensors")))))


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    num_changed = 0
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=2e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
        num_changed += not torch.equal(value, WEIGHTS[key])
    assert num_changed > 10


@pytest.mark.parametrize("seed", range(20))
def test_spoilt_names_are_merged_or_refused(tmp_path: Path, seed: int) -> None:
    """Letters of good keys left out, doubled or moved."""
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    tensors = {}
    for module in MODULES[:: len(MODULES) // 5]:
        name = (underscored("lora_unet_"), diffusers_dotted("transformer."), dotted(""))[number(3)](module)
        for ending, value in zip(A_B, factors(module), strict=True):
            key = name + ending
            at, length = number(len(key)), number(4)
            key = (key, key[:at] + key[at + length :], key[:at] + key[at : at + length] * 2 + key[at:])[number(3)]
            tensors[key or "x"] = value
    given = lora(tmp_path / "a.safetensors", tensors)
    passes_or_is_refused(lambda: weights(merge_loras(base(), [given])))
