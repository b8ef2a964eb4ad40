"""The VideoCrafter2 UNet against the reference implementation's output."""

import json
from dataclasses import replace

import places
import pytest
import torch
from safetensors.torch import load_file

from miga_engine.errors import CheckpointError, ConfigError, DeviceError
from miga_engine.models.videocrafter2.unet import VIDEOCRAFTER2_CONFIG, VideoUNet, VideoUNetConfig, unet_config
from miga_engine.models.videocrafter2.unet_layers import TemporalConvBlock, TemporalTransformer
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.load import load_module
from miga_engine.weights.renamed import RenamedCheckpoint

GOLDENS = places.GOLDENS / "vc2"
TOLERANCE = 4e-6  # of the largest output; a norm with the eps of another gives 5e-6 and more
SMALL = VideoUNetConfig(
    in_channels=3, out_channels=2, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_ratios=(), head_dim=8, transformer_depth=1, context_dim=6,
)  # fmt: skip


def load_unet(dtype: torch.dtype = torch.float32) -> VideoUNet:
    file = open_checkpoint(GOLDENS / "unet.safetensors")
    checkpoint = RenamedCheckpoint(file, lambda key: key.removeprefix("model.diffusion_model."))
    config = unet_config(checkpoint.shapes)
    return load_module(lambda: VideoUNet(config), checkpoint, device=None, dtype=dtype, keeps_fp32=VideoUNet.keeps_fp32)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    return load_unet()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


def contexts(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([golden["context"], golden["context2"]])


@pytest.mark.slow
@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("c", [0, 1])
def test_matches_golden(unet: VideoUNet, golden: dict[str, torch.Tensor], t: int, c: int) -> None:
    latents, context = golden["x"], contexts(golden)[c][None]
    shared = unet(latents, golden[f"t_scalar_{t}"], context, fps=golden["fps"])
    assert relative_error(shared, golden[f"eps_scalar_t{t}_c{c}"]) <= TOLERANCE
    per_frame = unet(latents, golden[f"t_frames_{t}"][None], context)
    assert relative_error(per_frame, golden[f"eps_frames_t{t}_c{c}"]) <= TOLERANCE


def test_sizes_follow_from_the_shapes(unet: VideoUNet) -> None:
    meta = json.loads((GOLDENS / "meta.json").read_text())
    told = meta["config"]["unet"]
    assert sum(p.numel() for p in unet.parameters()) == meta["n_params"]["unet"]
    assert unet.config == VideoUNetConfig(
        told["in_channels"], told["out_channels"], told["model_channels"], tuple(told["channel_mult"]),
        told["num_res_blocks"], tuple(told["attention_resolutions"]), told["num_head_channels"],
        told["transformer_depth"], told["context_dim"],
    )  # fmt: skip


@pytest.mark.slow
def test_the_rate_of_the_video_is_8_unless_given(unet: VideoUNet, golden: dict[str, torch.Tensor]) -> None:
    latents, t, context = golden["x"], golden["t_scalar_0"], golden["context"]
    assert relative_error(unet(latents, t, context, fps=16), golden["eps_scalar_default_fps16"]) <= TOLERANCE
    assert relative_error(golden["eps_scalar_default_fps16"], golden["eps_scalar_t0_c0"]) > 1e-2
    both = unet(latents.repeat(2, 1, 1, 1, 1), t, context, fps=torch.tensor([16, 8]))
    assert relative_error(both[0], golden["eps_scalar_default_fps16"][0]) <= TOLERANCE
    assert relative_error(both[1], golden["eps_scalar_t0_c0"][0]) <= TOLERANCE
    for fps in (8, 8.0, torch.tensor(8), torch.tensor([8.0])):
        assert torch.equal(unet(latents, t, context, fps=fps), unet(latents, t, context))


@pytest.mark.slow
def test_ways_to_give_one_timestep_agree(unet: VideoUNet, golden: dict[str, torch.Tensor]) -> None:
    latents, context = golden["x"].repeat(2, 1, 1, 1, 1), golden["context"]
    levels = unet.encode_timesteps(torch.tensor([3, 875]))
    reference = unet(latents, 875.0, context)
    for timesteps in (
        875,
        torch.tensor([875]),
        torch.tensor([875.0, 875.0]),
        torch.full((2, 6), 875),
        (levels, torch.ones(2, 6, dtype=torch.int64)),
    ):
        assert relative_error(unet(latents, timesteps, context), reference) <= 2e-6


def test_a_schedule_is_encoded_once_and_named_by_row(unet: VideoUNet, golden: dict[str, torch.Tensor]) -> None:
    latents, context = golden["x"].repeat(2, 1, 1, 1, 1), golden["context"]
    timesteps = torch.stack([golden["t_frames_0"], golden["t_frames_1"]])
    levels = unet.encode_timesteps(timesteps.flatten()), torch.arange(12).view(2, 6)
    out = unet(latents, levels, context)
    assert relative_error(out[0], golden["eps_frames_t0_c0"][0]) <= TOLERANCE
    assert relative_error(out[1], golden["eps_frames_t1_c0"][0]) <= TOLERANCE


@pytest.mark.slow
def test_context_is_encoded_once_and_named_by_row(unet: VideoUNet, golden: dict[str, torch.Tensor]) -> None:
    latents, t = golden["x"].repeat(2, 1, 1, 1, 1), golden["t_scalar_0"]
    prompts = [unet.encode_context(golden[name]) for name in ("context", "context2")]
    cache = prompts[0].table(2, golden["context"].shape[1])
    for row, prompt in enumerate(prompts):
        cache.write(row, prompt)
    assert cache.num_prompts == 2
    by_window = unet(latents, t, cache, torch.tensor([1, 0]))
    assert relative_error(by_window[0], golden["eps_scalar_t0_c1"][0]) <= TOLERANCE
    assert relative_error(by_window[1], golden["eps_scalar_t0_c0"][0]) <= TOLERANCE
    by_frame = unet(latents, t, cache, torch.tensor([1, 0])[:, None].expand(2, 6))
    assert relative_error(by_frame, by_window) <= 2e-6
    assert relative_error(unet(latents, t, cache), by_window.flip(0)) <= 2e-6  # a prompt for each window


@pytest.mark.slow
def test_each_frame_attends_to_its_own_prompt(golden: dict[str, torch.Tensor]) -> None:
    """With what joins frames silenced, a mixed window is its frames taken from pure ones."""
    silenced = load_unet()
    for layer in silenced.modules():
        if isinstance(layer, TemporalTransformer):
            layer.proj_out.weight.zero_()
            layer.proj_out.bias.zero_()
        if isinstance(layer, TemporalConvBlock):
            layer.conv4[3].weight.zero_()
            layer.conv4[3].bias.zero_()
    cache = silenced.encode_context(contexts(golden))
    pure = [silenced(golden["x"], 500.0, cache, torch.full((1, 6), row)) for row in (0, 1)]
    mixed = silenced(golden["x"], 500.0, cache, torch.tensor([[0, 0, 1, 1, 0, 1]]))
    expected = pure[0].clone()
    expected[:, :, [2, 3, 5]] = pure[1][:, :, [2, 3, 5]]
    assert relative_error(mixed, expected) <= 2e-6
    assert relative_error(pure[0], pure[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("per_frame", [False, True])
def test_branches_and_kept_frames_equal_separate_runs(
    unet: VideoUNet, golden: dict[str, torch.Tensor], per_frame: bool
) -> None:
    """Two branches of two windows with some frames kept, against one window, one branch and all frames at a time."""
    torch.manual_seed(2)
    latents, timesteps = torch.randn(2, 4, 5, 8, 12), torch.rand(2, 5) * 999
    cache = unet.encode_context(contexts(golden))
    rows = torch.tensor([1, 0, 0, 1])
    if per_frame:
        rows = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0] * 5, [1] * 5])
    keep = torch.tensor([[1, 2, 2], [0, 3, 4]])
    together = unet(latents, timesteps, cache, rows, keep=keep)
    for i, row in enumerate(rows):
        window = i % 2
        alone = unet(latents[window][None], timesteps[window][None], cache, row[None])
        assert relative_error(together[i], alone[0][:, keep[window]]) <= 5e-6
    assert relative_error(together[0], together[2]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, golden: dict[str, torch.Tensor]) -> None:
    """Rounded activations cost at most twice what the rounding of the weights alone does, on top of it."""
    half = load_unet(dtype)
    assert half.dtype == dtype
    for name, parameter in half.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.startswith(("time_embed", "fps_embedding", "out."))
        is_wide = not is_matrix or ".emb_layers." in name
        assert parameter.dtype == (torch.float32 if is_wide else dtype) or name.endswith(".bias"), name
    rounded = load_unet()
    rounded.load_state_dict(half.state_dict())
    reference = golden["eps_frames_t0_c0"]

    def error(unet: VideoUNet) -> float:
        out = unet(golden["x"].to(unet.dtype), golden["t_frames_0"][None], golden["context"])
        assert out.dtype == torch.float32
        return ((out - reference).norm() / reference.norm()).item()

    assert error(half) <= 3 * error(rounded)


def test_no_gradient_flows_and_nothing_given_is_changed() -> None:
    model = VideoUNet(SMALL)
    latents, context = torch.randn(1, 3, 2, 4, 6), torch.randn(1, 5, 6)
    before = latents.clone(), context.clone()
    with torch.inference_mode():
        inside = model(latents, 10.0, context)
    assert torch.equal(latents, before[0])
    assert torch.equal(context, before[1])
    outside = model(latents.requires_grad_(), 10.0, context)
    assert inside.shape == (1, 2, 2, 4, 6)
    assert inside.is_contiguous()
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    torch.manual_seed(3)
    model = VideoUNet(SMALL).eval()
    levels = model.encode_timesteps(torch.tensor([3.0, 900.0])), torch.tensor([[0, 1, 1]])
    cache, rows, keep = model.encode_context(torch.randn(2, 5, 6)), torch.tensor([1, 0]), torch.tensor([[1, 2]])
    arguments = torch.randn(1, 3, 3, 4, 6), levels, cache, rows
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*arguments, keep=keep), model(*arguments, keep=keep)) <= 1e-5


@pytest.mark.slow
def test_attention_asked_for_by_name_is_obeyed_or_refused(golden: dict[str, torch.Tensor]) -> None:
    model = load_unet()
    for name in ("sdpa", "reference"):
        model.attention = name
        out = model(golden["x"], golden["t_scalar_0"], golden["context"])
        assert relative_error(out, golden["eps_scalar_t0_c0"]) <= TOLERANCE
    model.attention = "cudnn"
    with pytest.raises(DeviceError, match="attention='cudnn' cannot be used here"):
        model(golden["x"], 1.0, golden["context"])


def test_published_size() -> None:
    """The whole network as published, and its layout read back from its own shapes."""
    with torch.device("meta"):
        network = VideoUNet(VIDEOCRAFTER2_CONFIG)
    assert sum(p.numel() for p in network.parameters()) == 1_413_284_420
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert unet_config(shapes) == VIDEOCRAFTER2_CONFIG
    assert shapes["init_attn.0.proj_in.weight"] == (512, 320, 1)
    assert shapes["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes["output_blocks.5.3.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes["output_blocks.8.3.conv.weight"] == (640, 640, 3, 3)
    assert "input_blocks.10.1.norm.weight" not in shapes
    assert len(network._text_blocks()) == 16
    assert network.config.size_multiple == 8
    assert network.config.temporal_length == 16


def test_refusals_name_the_size_and_the_remedy(unet: VideoUNet, golden: dict[str, torch.Tensor]) -> None:
    latents, context = golden["x"], golden["context"]
    with pytest.raises(ConfigError, match=r"8x11 cannot be halved 1 times: .* height and width .* multiples of 16$"):
        unet(latents[..., :11], 1.0, context)
    with pytest.raises(ConfigError, match=r"takes latents \[B, 4, F, H, W\]: given \(1, 3, 6, 8, 12\)$"):
        unet(latents[:, :3], 1.0, context)
    with pytest.raises(ConfigError, match=r"timesteps has shape \(3,\): give one number, \[1\] or \[1, 6\]$"):
        unet(latents, torch.ones(3), context)
    with pytest.raises(ConfigError, match=r"fps has shape \(2,\): give one number or \[1\]$"):
        unet(latents, 1.0, context, fps=torch.ones(2))
    with pytest.raises(ConfigError, match=r"shape \(1, 7, 23\): give text embeddings \[prompts, tokens, 24\]$"):
        unet(latents, 1.0, context[..., 1:])
    with pytest.raises(ConfigError, match=r"holds 2 prompts for 1 windows: give one, one for each window, or a"):
        unet(latents, 1.0, contexts(golden))
    with pytest.raises(ConfigError, match=r"context_index has shape \(1, 3\): give \[1\] .* or \[1, 6\] .* multiple"):
        unet(latents, 1.0, context, torch.tensor([[0, 0, 0]]))
    with pytest.raises(ConfigError, match=r"ratios \(4,\) of the levels \[1, 2\]: name levels only$"):
        replace(SMALL, attention_ratios=(4,))
    with pytest.raises(
        ConfigError, match=r"width of 48 does not split into 32 groups and heads of 8 channels: correct"
    ):
        replace(SMALL, model_channels=48)


def test_shapes_of_no_unet_are_refused(unet: VideoUNet) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(CheckpointError, match=rf"lack {key}, from which its size is read: give the complete"):
        unet_config({name: shape for name, shape in shapes.items() if name != key})
    with pytest.raises(CheckpointError, match=r"lack input_blocks\.0\.0\.weight"):
        unet_config({})
    with pytest.raises(CheckpointError, match=r"hold out\.2\.weight as \[4, 32\] where the network has 4 dimensions"):
        unet_config(shapes | {"out.2.weight": (4, 32)})
    with pytest.raises(ConfigError, match=r"residual blocks of widths \[\[32\], \[65\]\], not equally many of one"):
        unet_config(shapes | {"input_blocks.3.0.in_layers.2.weight": (65, 32, 3, 3)})
