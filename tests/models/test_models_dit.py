"""The Wan2.1 transformer against the reference implementation's output and Diffusers."""

from pathlib import Path

import places
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from miga_engine.errors import ConfigError
from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig
from miga_engine.models.wan.dit_layers import ContextCache

GOLDENS = places.GOLDENS / "wan_dit"
TOLERANCE = 3e-5  # of the largest output


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    return load_transformer(GOLDENS / "official")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("c", [0, 1])
def test_matches_golden(dit: WanDiT, golden: dict[str, torch.Tensor], t: int, c: int) -> None:
    latents, context = golden["latent"][None], golden[f"context_{c}"][None]
    shared = dit(latents, golden[f"t_scalar_{t}"], context)[0]
    assert relative_error(shared, golden[f"out_scalar_t{t}_c{c}"]) <= TOLERANCE
    per_frame = dit(latents, golden[f"t_frames_{t}"][None], context)[0]
    assert relative_error(per_frame, golden[f"out_frames_headfixed_t{t}_c{c}"]) <= TOLERANCE


@pytest.mark.slow
def test_ways_to_give_one_timestep_agree(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    latents, context = golden["latent"].expand(2, -1, -1, -1, -1), golden["context_0"][None]
    reference = dit(latents, 875.0, context)
    assert relative_error(dit(latents, torch.tensor([875, 875]), context), reference) <= 1e-6
    assert relative_error(dit(latents, torch.full((2, 5), 875.0), context), reference) <= 1e-6


def test_padding_the_text_with_zero_rows_changes_nothing(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    context = golden["context_0"][None]
    padded = torch.nn.functional.pad(context, (0, 0, 0, 9))
    assert torch.equal(dit(golden["latent"][None], 37.0, padded), dit(golden["latent"][None], 37.0, context))


def both_contexts(dit: WanDiT, golden: dict[str, torch.Tensor]) -> ContextCache:
    """The two prompts, each encoded by itself, as rows of one table."""
    prompts = [dit.encode_context(golden[f"context_{row}"][None]) for row in (0, 1)]
    table = prompts[0].table(2, max(prompt.bias.shape[3] for prompt in prompts))
    for row, prompt in enumerate(prompts):
        table.write(row, prompt)
    return table


@pytest.mark.slow
def test_context_is_encoded_once_and_named_by_row(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    latents = golden["latent"].expand(2, -1, -1, -1, -1)
    cache = both_contexts(dit, golden)
    assert cache.num_prompts == 2
    by_window = dit(latents, golden["t_scalar_0"], cache, torch.tensor([1, 0]))
    assert relative_error(by_window[0], golden["out_scalar_t0_c1"]) <= TOLERANCE
    assert relative_error(by_window[1], golden["out_scalar_t0_c0"]) <= TOLERANCE
    by_frame = dit(latents, golden["t_scalar_0"], cache, torch.tensor([1, 0])[:, None].expand(2, 5))
    assert relative_error(by_frame, by_window) <= 1e-6


@pytest.mark.slow
def test_each_frame_attends_to_its_own_prompt(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    """With self-attention silenced frames do not meet, so a mixed window is its frames taken from pure ones."""
    silenced = load_transformer(GOLDENS / "official")
    for block in silenced.blocks:
        block.self_attn.o.weight.zero_()
    latents = golden["latent"][None]
    cache = both_contexts(silenced, golden)
    pure = [silenced(latents, 500.0, cache, torch.full((1, 5), row)) for row in (0, 1)]
    mixed = silenced(latents, 500.0, cache, torch.tensor([[0, 0, 1, 1, 1]]))
    assert relative_error(mixed, torch.cat([pure[0][:, :, :2], pure[1][:, :, 2:]], dim=2)) <= 1e-6
    assert relative_error(pure[0], pure[1]) > 1e-3


@pytest.mark.slow
def test_agrees_with_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path)
    latents, context = torch.randn(2, 16, 3, 6, 4), torch.randn(2, 512, 32)
    timesteps = torch.tensor([[999.0, 500.0, 3.0], [20.0, 20.0, 700.0]])
    with torch.no_grad():
        shared = theirs(latents, timestep=timesteps[:, 0], encoder_hidden_states=context).sample
        tokens = timesteps.repeat_interleave(6, dim=1)  # 3 x 2 patches in a frame
        per_frame = theirs(latents, timestep=tokens, encoder_hidden_states=context).sample
    assert relative_error(ours(latents, timesteps[:, 0], context), shared) <= TOLERANCE
    assert relative_error(ours(latents, timesteps, context), per_frame) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, golden: dict[str, torch.Tensor]) -> None:
    half = load_transformer(GOLDENS / "official", dtype=dtype)
    assert half.dtype == dtype
    assert half.blocks[0].modulation.dtype == half.head.head.weight.dtype == torch.float32
    out = half(golden["latent"][None], golden["t_scalar_0"], golden["context_0"][None])[0]
    reference = golden["out_scalar_t0_c0"]
    ours = (out - reference).norm() / reference.norm()
    theirs = (golden["out_bf16autocast_cpu_t0_c0"] - reference).norm() / reference.norm()
    assert out.dtype == torch.float32
    assert ours <= 1.5 * theirs


def test_no_gradient_flows_and_inference_mode_leaves_no_trace() -> None:
    model = WanDiT(WanDiTConfig(12, 24, 8, 2, 1, 6, 4, 3, 3))
    latents, context = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 6)
    with torch.inference_mode():
        inside = model(latents, 10.0, context)
    outside = model(latents.requires_grad_(), 10.0, context)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


def test_frame_positions_turn_the_attention(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    """Only distances in time matter: positions moved together change nothing, moved apart they do."""
    latents, context = golden["latent"][None], golden["context_0"][None]
    reference = dit(latents, 500.0, context)
    assert torch.equal(dit(latents, 500.0, context, positions=torch.arange(5)[None]), reference)
    assert relative_error(dit(latents, 500.0, context, positions=torch.arange(5)[None] + 37), reference) <= 1e-5
    assert relative_error(dit(latents, 500.0, context, positions=torch.arange(5)[None] * 9), reference) > 1e-4
    with pytest.raises(ConfigError, match=r"positions has shape \(5,\): give \[1, 5\]"):
        dit(latents, 500.0, context, positions=torch.arange(5))


SAVINGS = ("shares_branches", "skips_frames", "collapses_padding")


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("switched_off", [*SAVINGS, None])
def test_savings_change_rounding_only(switched_off: str | None, per_frame: bool, num_layers: int) -> None:
    """Two branches of two windows, some frames kept, against one window, one branch and all frames at a time."""
    torch.manual_seed(1)
    model = WanDiT(WanDiTConfig(24, 48, 8, 2, num_layers, 6, 9, 3, 3))
    model.head.head.weight.data.normal_()
    latents, timesteps = torch.randn(2, 3, 5, 4, 4), torch.rand(2, 5) * 1000
    contexts = torch.randn(3, 4, 6)
    rows = torch.tensor([2, 1, 0, 0])
    if per_frame:
        rows = torch.tensor([[2, 2, 1, 1, 2], [1, 2, 1, 2, 1], [0] * 5, [0] * 5])
    keep = torch.tensor([[1, 2, 2], [0, 3, 4]])
    if switched_off:
        setattr(model, switched_off, False)
    levels = model.encode_timesteps(timesteps.flatten()), torch.arange(10).view(2, 5)
    together = model(latents, levels, model.encode_context(contexts), rows, keep=keep)
    for saving in SAVINGS:
        setattr(model, saving, False)
    for i, row in enumerate(rows):
        window = i % 2
        alone = model(latents[window][None], timesteps[window][None], contexts, row[None])
        assert relative_error(together[i], alone[0][:, keep[window]]) <= 1e-5


def test_padding_of_the_text_is_one_key(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    """A zero row between others is padding too, and prompts of different lengths share a cache."""
    context = golden["context_0"]
    spread = torch.zeros(2, 11, context.shape[1])
    spread[0, : len(context)] = context
    spread[1, -len(context) :] = context
    cache = dit.encode_context(spread)
    assert cache.bias.shape == (2, 1, 1, 12)
    assert cache.bias[0, 0, 0, len(context) : -1].isneginf().all()
    latents = golden["latent"].expand(2, -1, -1, -1, -1)
    both = dit(latents, golden["t_scalar_0"], cache)
    assert relative_error(both[0], golden["out_scalar_t0_c0"]) <= TOLERANCE
    assert relative_error(both[1], golden["out_scalar_t0_c0"]) <= TOLERANCE


def test_refusals_name_the_size_and_the_remedy(dit: WanDiT, golden: dict[str, torch.Tensor]) -> None:
    latents, context = golden["latent"][None], golden["context_0"][None]
    with pytest.raises(
        ConfigError, match=r"8x11 do not divide into patches of 2x2: .* multiple of 16 and a width of 16"
    ):
        dit(latents[..., :11], 1.0, context)
    with pytest.raises(ConfigError, match=r"takes latents \[B, 16, F, H, W\]: given \(1, 4, 5, 8, 12\)$"):
        dit(latents[:, :4], 1.0, context)
    with pytest.raises(ConfigError, match=r"timesteps has shape \(3,\): give one number, \[1\] or \[1, 5\]$"):
        dit(latents, torch.ones(3), context)
    with pytest.raises(ConfigError, match=r"shape \(1, 17, 32\): give text embeddings \[prompts, up to 16, 32\]$"):
        dit(latents, 1.0, torch.zeros(1, 17, 32))
    with pytest.raises(
        ConfigError, match=r"holds 2 prompts for 1 windows: give one, one for each window, or a context"
    ):
        dit(latents, 1.0, torch.zeros(2, 3, 32))
    with pytest.raises(
        ConfigError, match=r"context_index has shape \(1, 3\): give \[1\] .* or \[1, 5\] .* a multiple of 1 rows"
    ):
        dit(latents, 1.0, context, torch.tensor([[0, 0, 0]]))
    with pytest.raises(
        ConfigError, match=r"a width of 96 does not split into 5 heads of even size: correct dim or num"
    ):
        WanDiTConfig(96, 192, 64, 5, 2, 32, 16, 16, 16)
    with pytest.raises(ConfigError, match=r"patch of 2 latent frames cannot carry a noise level per frame: use \(1, h"):
        WanDiTConfig(96, 192, 64, 3, 2, 32, 16, 16, 16, patch_size=(2, 2, 2))


@pytest.mark.parametrize(("name", "billions"), [("1.3B", 1.419), ("14B", 14.288)])
def test_published_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        network = WanDiT(WAN_T2V_CONFIGS[name])
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
