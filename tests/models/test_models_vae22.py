"""The Wan2.2 video VAE, of 48 channels and 16x smaller, against Diffusers, and how its files are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_wan
import torch
from diffusers import AutoencoderKLWan
from refusals import refusal
from safetensors.torch import save_file
from torch import Tensor
from vae_streams import assert_pieces_are_the_whole, assert_resumes

from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models import load_vae
from miga_engine.models.wan.vae import WAN22_VAE, WanVAE, WanVAEConfig, patchified, unpatchified
from miga_engine.models.wan.vae_layers import CausalConv3d
from miga_engine.models.wan.vae_layouts import official_vae, vae_config
from miga_engine.models.wan.vae_levels import averaged, repeated
from miga_engine.weights.checkpoint import Checkpoint

TOLERANCE = 3e-5  # of the largest output
WEIGHTS = random_wan.vae("ti2v")


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def theirs(sizes: WanVAEConfig, **options: Any) -> AutoencoderKLWan:
    """What diffusers builds of the sizes."""
    mean, std = map(list, sizes.statistics())
    return AutoencoderKLWan(
        base_dim=sizes.dim, decoder_base_dim=sizes.decoder_dim, z_dim=sizes.z_dim, dim_mult=list(sizes.dim_mult),
        num_res_blocks=sizes.num_res_blocks, temperal_downsample=list(sizes.temporal_downsample), is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=mean, latents_std=std,
        **options,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLWan:
    """The random VAE's weights in diffusers, whose own names the table of `random_wan` must give."""
    network = theirs(random_wan.TI2V_VAE_CONFIG)
    network.load_state_dict({random_wan.diffusers_vae_name(key): value for key, value in WEIGHTS.items()}, strict=True)
    return network


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    return load_vae(saved(tmp_path_factory.mktemp("vae") / random_wan.TI2V_VAE, WEIGHTS))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 48, 4, 2, 3, generator=torch.Generator().manual_seed(1))


def saved(path: Path, tensors: dict[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + key: value.contiguous() for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_agrees_with_diffusers(vae: WanVAE, reference: AutoencoderKLWan, num_frames: int) -> None:
    torch.manual_seed(3)
    video = torch.rand(2, 3, num_frames, 48, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in vae.config.statistics())
    with torch.no_grad():
        posterior = reference.encode(video).latent_dist
        decoded = reference.decode(posterior.mean).sample
    assert posterior.mean.shape == (2, 48, 1 + (num_frames - 1) // 4, 3, 2)
    latents = vae.encode(video)
    assert relative_error(latents, (posterior.mean - mean) / std) <= TOLERANCE
    assert relative_error(vae.encode_moments(video)[1], posterior.logvar) <= TOLERANCE
    assert decoded.shape == video.shape
    assert decoded.std() > 0.2  # neither flat nor clamped all over
    assert (decoded.abs() < 1).float().mean() > 0.5
    assert relative_error(vae.decode((posterior.mean - mean) / std), decoded) <= TOLERANCE


def test_whole_clip_pass_equals_the_stream(vae: WanVAE, latents: Tensor) -> None:
    assert relative_error(vae.decode_core(latents).clamp(-1, 1), vae.decode(latents)) <= TOLERANCE


@pytest.mark.parametrize("pieces", [[4], [1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_stream_equals_whole_decode_bit_for_bit(vae: WanVAE, latents: Tensor, pieces: list[int]) -> None:
    assert_pieces_are_the_whole(vae, latents, pieces)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_stream_resumes_from_its_saved_state(vae: WanVAE, latents: Tensor, tmp_path: Path, done: int) -> None:
    assert_resumes(vae, latents, done, tmp_path / "state.safetensors")
    decoder = vae.stream_decoder()
    decoder.push(latents[:, :, :done])
    other = WanVAE(WanVAEConfig(dim=4, z_dim=48, num_res_blocks=1)).stream_decoder()
    with pytest.raises(ConfigError, match=r"names decoder\.\S+, which this VAE lacks: resume with its own VAE$"):
        other.load_state(decoder.state())


def test_saved_state_is_never_written_into(vae: WanVAE, latents: Tensor) -> None:
    decoder = vae.stream_decoder()
    decoder.push(latents[:, :, :2])
    state = decoder.state()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    decoder.push(latents[:, :, 2:])
    assert all(torch.equal(state[name], copies[name]) for name in state)


def test_weights_are_laid_out(vae: WanVAE, latents: Tensor) -> None:
    plain = WanVAE(vae.config).requires_grad_(False)
    plain.load_state_dict(WEIGHTS)
    for name, module in vae.named_modules():
        if isinstance(module, CausalConv3d):
            assert module.weight.permute(0, 3, 4, 2, 1).flatten(3).data_ptr() == module.weight.data_ptr(), name
    assert relative_error(vae.decode(latents), plain.decode(latents)) <= TOLERANCE


def test_gradients_through_caches_equal_those_of_the_whole_clip() -> None:
    sizes = dataclasses.replace(random_wan.TI2V_VAE_CONFIG, dim_mult=(1, 2, 2), temporal_downsample=(True, True))
    torch.manual_seed(0)
    network, latents = WanVAE(sizes), torch.randn(1, 48, 3, 2, 2)
    cache: dict[str, Tensor] = {}
    parts = [network.decode_core(latent, cache) for latent in latents.split(1, dim=2)]
    grads = []
    for video in (network.decode_core(latents), torch.cat(parts, dim=2)):
        network.zero_grad()
        video.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(relative_error(grads[1][name], grads[0][name]) < 1e-4 for name in grads[0])
    video = torch.rand(1, 3, 5, 8, 8, requires_grad=True)
    network.encode_moments(video)[0][:, :, -1].sum().backward()
    assert video.grad is not None
    assert video.grad[:, :, 0].abs().sum() > 0  # the last latent sees the first frame


def test_shortcuts_are_averages_and_repetitions() -> None:
    x = torch.arange(2.0 * 3 * 4 * 6 * 2).view(2, 3, 4, 6, 2)
    small = averaged(x, 4, time=2, space=2)
    assert small.shape == (2, 2, 2, 3, 4)
    # Channel 0 in two halves: earlier frame, later frame; before the first frame there are zeros.
    assert torch.equal(small[:, 0, :, :, 0], torch.zeros(2, 2, 3))
    block = x[:, 0, :2, :2, 0].mean((1, 2))
    assert torch.equal(small[:, 0, 0, 0, 1], block)
    assert torch.equal(averaged(x, 2, time=1, space=1), x)
    large = repeated(x, 2, time=2, space=2)
    assert large.shape == (2, 6, 8, 12, 2)
    assert torch.equal(large[:, ::2, ::2, ::2], x)
    assert torch.equal(large[:, 1::2, 1::2, 1::2], x)
    halves = repeated(x, 1, time=1, space=2)  # a channel above, a channel below
    assert torch.equal(halves[:, :, ::2, ::2, 0], x[..., 0])
    assert torch.equal(halves[:, :, 1::2, 1::2, 0], x[..., 1])


def test_patches_are_channels_column_by_column() -> None:
    picture = torch.arange(4.0 * 6 * 3).view(1, 1, 4, 6, 3)
    patches = patchified(picture, 2)
    assert patches.shape == (1, 1, 2, 3, 12)
    expected = [picture[0, 0, row, column, colour] for colour in range(3) for column in (2, 3) for row in (0, 1)]
    assert torch.equal(patches[0, 0, 0, 1], torch.stack(expected))
    assert torch.equal(unpatchified(patches, 2), picture)


class OfShapes(Checkpoint):
    """Names and shapes of a module's parameters, and nothing to read."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(Path("Wan2.2_VAE.safetensors"))
        self.shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}

    def read(self, key: str) -> Tensor:
        raise AssertionError(f"{key} was read")

    def stored_dtype(self, key: str) -> torch.dtype:
        return torch.float32


def test_the_published_sizes_in_both_layouts() -> None:
    with torch.device("meta"):
        ours, diffusers = OfShapes(WanVAE(WAN22_VAE)), OfShapes(theirs(WAN22_VAE))
    assert official_vae(diffusers).shapes == ours.shapes
    assert len(ours.shapes) == 196
    assert sum(torch.Size(shape).numel() for shape in ours.shapes.values()) == 704_688_668
    for checkpoint in (official_vae(diffusers), official_vae(ours)):
        assert vae_config(checkpoint, {}) == WAN22_VAE
    assert (WAN22_VAE.spatial_factor, WAN22_VAE.frame_ratio) == (16, 4)
    # As in the official file.
    for key, shape in {
        "encoder.conv1.weight": (160, 12, 3, 3, 3),
        "encoder.downsamples.1.downsamples.0.shortcut.weight": (320, 160, 1, 1, 1),
        "encoder.downsamples.1.downsamples.2.time_conv.weight": (320, 320, 3, 1, 1),
        "encoder.downsamples.3.downsamples.1.residual.6.weight": (640, 640, 3, 3, 3),
        "decoder.conv1.weight": (1024, 48, 3, 3, 3),
        "decoder.upsamples.0.upsamples.3.time_conv.weight": (2048, 1024, 3, 1, 1),
        "decoder.upsamples.2.upsamples.3.resample.1.weight": (512, 512, 3, 3),
        "decoder.upsamples.3.upsamples.2.residual.0.gamma": (256, 1, 1, 1),
        "decoder.head.2.weight": (12, 256, 3, 3, 3),
    }.items():
        assert ours.shapes[key] == shape


def test_every_file_of_it_is_the_same_network(tmp_path: Path, vae: WanVAE) -> None:
    renamed = {random_wan.diffusers_vae_name(key): value for key, value in WEIGHTS.items()}
    files = [
        saved(tmp_path / "wan2.2_vae.safetensors", WEIGHTS),
        saved(tmp_path / "Wan2_2_VAE_bf16.safetensors", WEIGHTS, "first_stage_model."),
        saved(tmp_path / "a.safetensors", WEIGHTS, "vae."),
        saved(tmp_path / "b.safetensors", renamed, "model."),
    ]
    for name, content in (("Wan2.2_VAE.pth", WEIGHTS), ("c.pth", {"state_dict": WEIGHTS})):
        torch.save(content, tmp_path / name)
        files.append(tmp_path / name)
    folder = random_wan.diffusers_ti2v(tmp_path / "Wan2.2-TI2V-tiny-Diffusers")
    for path in (*files, folder, folder / "vae"):
        state = load_vae(path).state_dict()
        assert state.keys() == WEIGHTS.keys(), path
        assert all(torch.equal(state[key], value) for key, value in WEIGHTS.items()), path
    assert load_vae(folder).config.statistics() == vae.config.statistics()
    reference = theirs(random_wan.TI2V_VAE_CONFIG)
    reference.save_pretrained(tmp_path / "theirs")
    assert load_vae(tmp_path / "theirs").config.spatial_factor == 16


def without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in keys:
            del tensors[key]

    return edit


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


LEVEL = "encoder.downsamples.{}.downsamples."


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (without(LEVEL.format(0) + "0.residual.6.weight"), "lacks encoder.downsamples.0.downsamples.0.residual.6.weig"),
        (without(LEVEL.format(1) + "1.resample.1.weight"), "describe a network (8 channels of a level"),
        (without("decoder.upsamples.1.upsamples.2.time_conv.bias"), "lacks decoder.upsamples.1.upsamples.2.time_conv."),
        (without(LEVEL.format(1) + "1.time_conv.weight"), "which this model has no place for"),
        (put("encoder.conv1.weight", 4, 7, 3, 3, 3), "holds encoder.conv1.weight as [4, 7, 3, 3, 3]"),
        (put("encoder.conv1.weight", 4, 27, 3, 3, 3), "holds decoder.head.2.weight as [12, 6, 3, 3, 3]"),
        (put("encoder.conv1.weight", 4, 12), "holds encoder.conv1.weight as [4, 12] where the model has 5 dimensions"),
        (put("decoder.conv1.weight", 2, 48, 3, 3, 3), "holds decoder.conv1.weight as [2, 48, 3, 3, 3]"),
        (put("decoder.conv1.weight", 20, 48, 3, 3, 3), "holds decoder."),
        (put(LEVEL.format(0) + "0.residual.6.weight", 2, 4, 3, 3, 3), "describe a "),
        (put(LEVEL.format(3) + "0.residual.6.weight", 2, 4, 3, 3, 3), "describe a model (integer division or modulo"),
        (put(LEVEL.format(2) + "0.residual.6.weight", 12, 8, 3, 3, 3), "describe a network (64 channels of a level"),
        (put(LEVEL.format(999_999) + "0.x", 1), "give the complete weights"),
        (put(LEVEL.format(7) + f"{10**8}.x", 1), "give the complete weights"),
        (put(LEVEL.format("9" * 400) + "0.x", 1), "which this model has no place for"),
    ],
)  # fmt: skip
def test_files_that_are_no_such_vae(tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], sentence: str) -> None:
    tensors = dict(WEIGHTS)
    edit(tensors)
    path = saved(tmp_path / "wan2.2_vae.safetensors", tensors)
    said = refusal(lambda: load_vae(path), CheckpointError)
    assert sentence in said, said


def test_refusals_name_the_size_and_the_remedy(vae: WanVAE) -> None:
    with pytest.raises(ConfigError, match=r"divisible by 16 and was given 24x32: crop or resize it$"):
        vae.encode(torch.zeros(1, 3, 5, 24, 32))
    with pytest.raises(ConfigError, match=r"decodes latents \[B, 48, n >= 1, h, w\]: given \(1, 16, 2, 2, 2\)$"):
        vae.decode(torch.zeros(1, 16, 2, 2, 2))
    with pytest.raises(
        ConfigError, match=r"64 channels of a level's shortcut are no groups for 12: correct dim or dim"
    ):
        WanVAE(dataclasses.replace(random_wan.TI2V_VAE_CONFIG, dim_mult=(1, 2, 3, 4)))
