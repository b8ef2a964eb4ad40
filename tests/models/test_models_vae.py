"""The Wan2.1 video VAE against the reference implementation's output and Diffusers."""

from pathlib import Path

import places
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from vae_streams import assert_pieces_are_the_whole, assert_resumes

from miga_engine.errors import ConfigError
from miga_engine.models import load_vae
from miga_engine.models.wan.vae import WanVAE, WanVAEConfig
from miga_engine.models.wan.vae_layers import CausalConv3d

GOLDENS = places.GOLDENS / "wan_vae"
TOLERANCE = 3e-5  # of the largest output

TINY = WanVAEConfig(dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(GOLDENS / "official" / "Wan2.1_VAE.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


@pytest.fixture
def tiny() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(TINY).requires_grad_(False)


@pytest.mark.slow
def test_decode_matches_golden(vae: WanVAE, golden: dict[str, torch.Tensor]) -> None:
    video = vae.decode(golden["latent"][None])[0]
    assert relative_error(video, golden["decoded"]) <= TOLERANCE
    first = vae.decode(golden["latent"][None, :, :1])[0]
    assert relative_error(first, golden["decoded_first_frame_only"]) <= TOLERANCE


@pytest.mark.slow
def test_weights_are_laid_out_once_and_give_the_same_video(vae: WanVAE, golden: dict[str, torch.Tensor]) -> None:
    plain = WanVAE(vae.config).requires_grad_(False)
    plain.load_state_dict(vae.state_dict())
    for name, module in vae.named_modules():
        if isinstance(module, CausalConv3d):
            read = module.weight.permute(0, 3, 4, 2, 1).flatten(3)
            assert read.data_ptr() == module.weight.data_ptr(), name
    video = plain.decode(golden["latent"][None])
    assert relative_error(vae.decode(golden["latent"][None]), video) <= 4e-6  # another layout, another order of sums


def test_encode_matches_golden(vae: WanVAE, golden: dict[str, torch.Tensor]) -> None:
    latents = vae.encode(golden["video_in"][None])
    assert relative_error(latents[0], golden["encoded"]) <= TOLERANCE
    assert relative_error(vae.decode_core(latents)[0], golden["roundtrip_unclamped"]) <= TOLERANCE


def test_whole_clip_pass_matches_golden(vae: WanVAE, golden: dict[str, torch.Tensor]) -> None:
    assert relative_error(vae.decode_core(golden["latent"][None])[0], golden["decoded_unclamped"]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [[5], [1, 1, 1, 1, 1], [2, 3], [1, 4], [3, 1, 1]])
def test_stream_equals_whole_decode_bit_for_bit(
    vae: WanVAE, golden: dict[str, torch.Tensor], pieces: list[int]
) -> None:
    latents = golden["latent"][None, ..., :4, :4]
    assert_pieces_are_the_whole(vae, latents, pieces)


@pytest.mark.slow
def test_stream_resumes_from_its_saved_state(vae: WanVAE, golden: dict[str, torch.Tensor], tmp_path: Path) -> None:
    latents = golden["latent"][None, ..., :4, :4]
    for done in (1, 2, 3):
        assert_resumes(vae, latents, done, tmp_path / "state.safetensors")
    with pytest.raises(
        ConfigError, match=r"decoder state names nonsense, which this VAE lacks: resume with its own VAE"
    ):
        vae.stream_decoder().load_state({"nonsense": latents})


def test_saved_state_is_never_written_into(tiny: WanVAE) -> None:
    latents = torch.randn(1, 4, 3, 4, 4)
    decoder = tiny.stream_decoder()
    decoder.push(latents[:, :, :2])
    state = decoder.state()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    decoder.push(latents[:, :, 2:])
    assert all(torch.equal(state[name], copies[name]) for name in state)


@pytest.mark.slow
def test_agrees_with_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=2, temperal_downsample=[False, True, True]
    ).eval()
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    with torch.no_grad():
        mean = theirs.encode(video).latent_dist.mean
        decoded = theirs.decode(mean).sample
    stats = torch.tensor(ours.config.statistics()).view(2, 1, -1, 1, 1, 1)
    latents = ours.encode(video)
    assert relative_error(latents, (mean - stats[0]) / stats[1]) <= TOLERANCE
    assert relative_error(ours.decode((mean - stats[0]) / stats[1]), decoded) <= TOLERANCE


def test_convolutions_without_past_taps_are_skipped_exactly(tiny: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 4, 3, 4, 4)
    for conv in tiny.modules():
        if isinstance(conv, CausalConv3d) and conv.kernel_size == (3, 3, 3):
            conv.weight[:, :, :-1] = 0
    decoder = tiny.stream_decoder()
    skipped = decoder.push(latents)
    names = decoder.state()
    assert all(name.endswith("time_conv") for name in names)
    with monkeypatch.context() as patch:
        patch.setattr(CausalConv3d, "is_pointwise_in_time", lambda conv: conv.reach == 0)
        assert relative_error(tiny.decode(latents), skipped) <= 1e-6
    tiny.requires_grad_(True)  # the taps may change: computed in full
    assert not tiny.decoder.conv1.is_pointwise_in_time()
    assert relative_error(tiny.decode(latents).detach(), skipped) <= TOLERANCE
    tiny.requires_grad_(False)
    assert tiny.decoder.conv1.is_pointwise_in_time()
    tiny.decoder.conv1.weight[:, :, 0] = 1.0
    assert not tiny.decoder.conv1.is_pointwise_in_time()
    assert not torch.equal(tiny.decode(latents), skipped)


def test_gradients_through_caches_equal_those_of_the_whole_clip(tiny: WanVAE) -> None:
    tiny.requires_grad_(True)
    latents = torch.randn(1, 4, 3, 4, 4)
    tiny.decode_core(latents).square().mean().backward()
    whole = {name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None}
    tiny.zero_grad()
    cache: dict[str, torch.Tensor] = {}
    parts = [tiny.decode_core(latent, cache) for latent in latents.split(1, dim=2)]
    torch.cat(parts, dim=2).square().mean().backward()
    grads = {name: p.grad for name, p in tiny.named_parameters() if p.grad is not None}
    assert grads.keys() == whole.keys()
    assert all(relative_error(grads[name], whole[name]) < 1e-4 for name in whole)


def test_encoder_is_differentiable_over_the_whole_clip(tiny: WanVAE) -> None:
    video = torch.rand(1, 3, 9, 8, 8, requires_grad=True)
    mean, logvar = tiny.encode_moments(video)
    assert mean.shape == logvar.shape == (1, 4, 3, 2, 2)
    mean[:, :, -1].sum().backward()
    assert video.grad is not None
    assert video.grad[:, :, 0].abs().sum() > 0  # the last latent sees the first frame


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype, golden: dict[str, torch.Tensor]) -> None:
    half = load_vae(GOLDENS / "official" / "Wan2.1_VAE.safetensors", dtype=dtype)
    video = half.decode(golden["latent"][None, :, :2, :4, :4])
    exact = load_vae(GOLDENS / "official" / "Wan2.1_VAE.safetensors").decode(golden["latent"][None, :, :2, :4, :4])
    assert video.dtype == dtype
    assert (video.float() - exact).square().mean().sqrt() < 0.05


def test_refusals_name_the_size_and_the_remedy(tiny: WanVAE) -> None:
    def video(num_frames: int, height: int = 8, width: int = 8) -> torch.Tensor:
        return torch.zeros(1, 3, num_frames, height, width)

    with pytest.raises(ConfigError, match=r"1 \+ 4·n frames and was given 8: cut the clip to 5 frames or .* up to 9$"):
        tiny.encode(video(8))
    with pytest.raises(ConfigError, match=r"divisible by 4 and was given 6x8: crop or resize it$"):
        tiny.encode(video(5, height=6))
    with pytest.raises(ConfigError, match=r"takes a video \[B, 3, T, H, W\]: the given tensor is \(1, 4, 5, 8, 8\)$"):
        tiny.encode(torch.zeros(1, 4, 5, 8, 8))
    with pytest.raises(ConfigError, match=r"decodes latents \[B, 4, n >= 1, h, w\]: given \(1, 3, 2, 4, 4\)$"):
        tiny.decode(torch.zeros(1, 3, 2, 4, 4))
    decoder = tiny.stream_decoder()
    decoder.push(torch.zeros(1, 4, 1, 4, 4))
    with pytest.raises(ConfigError, match=r"opened with .* = \(1, 4, 4\) and now gets \(1, 4, 6\): open a new"):
        decoder.push(torch.zeros(1, 4, 1, 4, 6))
    with pytest.raises(ConfigError, match=r"temporal_downsample has 2 entries for 4 levels: give one entry"):
        WanVAEConfig(temporal_downsample=(True, True))
    with pytest.raises(ConfigError, match=r"latents_mean has 2 numbers: give one for each of the 16 channels$"):
        WanVAEConfig(latents_mean=(0.0, 0.0))
