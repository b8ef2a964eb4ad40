"""The VideoCrafter2 image VAE against the reference implementation's output and Diffusers."""

import places
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file

from miga_engine.errors import ConfigError
from miga_engine.models.videocrafter2.family import load_vae
from miga_engine.models.videocrafter2.vae import KLVAE, KLVAEConfig

GOLDENS = places.GOLDENS / "vc2"
TOLERANCE = 3e-5  # of the largest output


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def vae() -> KLVAE:
    return load_vae(GOLDENS / "vae.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("is_training", [False, True])
def test_decode_matches_golden(vae: KLVAE, golden: dict[str, torch.Tensor], is_training: bool) -> None:
    with torch.set_grad_enabled(is_training):
        frames = [vae.decode_frame(latent) for latent in golden["z"].unbind(2)]
        assert relative_error(torch.stack(frames, dim=2), golden["decoded"]) <= TOLERANCE
        assert golden["decoded"].abs().max() > 2  # so that clamping is seen
        assert relative_error(vae.decode(golden["z"]), golden["decoded"].clamp(-1, 1)) <= TOLERANCE


def test_encode_matches_golden(vae: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    mean, logvar = vae.encode_moments(golden["video_in"])
    assert mean.shape == logvar.shape == (1, 4, 2, 4, 6)
    assert relative_error(mean[:, :, 0], golden["enc_mean_frame0"]) <= TOLERANCE
    assert relative_error(logvar[:, :, 0], golden["enc_logvar_frame0"]) <= TOLERANCE
    assert torch.equal(vae.encode(golden["video_in"]), mean * 0.18215)


@pytest.mark.slow
def test_agrees_with_diffusers() -> None:
    torch.manual_seed(3)
    ours = KLVAE(KLVAEConfig(dim=32, dim_mult=(1, 2, 4, 4), num_res_blocks=2)).requires_grad_(False)
    theirs = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()
    prefixed = {f"first_stage_model.{key}": value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(prefixed, theirs.config))
    latents, video = torch.randn(2, 4, 1, 3, 5), torch.rand(2, 3, 1, 24, 40) * 2 - 1
    with torch.no_grad():
        decoded = theirs.decode(latents[:, :, 0] / 0.18215).sample
        encoded = theirs.encode(video[:, :, 0]).latent_dist
    assert relative_error(ours.decode_frame(latents[:, :, 0]), decoded) <= TOLERANCE
    mean, logvar = ours.encode_moments(video)
    assert relative_error(mean[:, :, 0], encoded.mean) <= TOLERANCE
    assert relative_error(logvar[:, :, 0], encoded.logvar) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [[5], [1, 1, 1, 1, 1], [2, 3], [4, 1]])
@pytest.mark.parametrize("batch", [1, 2])
def test_stream_equals_whole_decode_bit_for_bit(vae: KLVAE, pieces: list[int], batch: int) -> None:
    latents = torch.randn(batch, 4, 5, 3, 7, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents)
    assert whole.shape == (batch, 3, 5, 6, 14)
    assert whole.abs().max() <= 1
    stream = vae.stream_decoder()
    assert torch.equal(torch.cat([stream.push(piece) for piece in latents.split(pieces, dim=2)], dim=2), whole)
    assert torch.equal(vae.decode(latents[:, :, 2:3]), whole[:, :, 2:3])


def test_state_is_empty_and_another_vae_s_is_refused(vae: KLVAE) -> None:
    stream = vae.stream_decoder()
    stream.push(torch.zeros(1, 4, 1, 2, 2))
    assert stream.state() == {}
    vae.stream_decoder().load_state({})
    with pytest.raises(ConfigError, match=r"state names decoder\.conv1, which this VAE lacks: resume with its own VAE"):
        stream.load_state({"decoder.conv1": torch.zeros(1)})


def test_strides_of_the_latents_do_not_matter(vae: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    latents = golden["z"].transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(vae.decode(latents), vae.decode(golden["z"]))


def test_bfloat16(golden: dict[str, torch.Tensor]) -> None:
    vae = load_vae(GOLDENS / "vae.safetensors", dtype=torch.bfloat16)
    video = vae.decode(golden["z"])
    assert vae.dtype == video.dtype == vae.encode(golden["video_in"]).dtype == torch.bfloat16
    assert (video.float() - golden["decoded"].clamp(-1, 1)).abs().mean() < 0.02


def test_gradients_pass_through_the_decoder(vae: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    latents = golden["z"][:, :, :1].clone().requires_grad_()
    vae.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


@pytest.mark.slow
def test_sizes_of_the_published_model() -> None:
    with torch.device("meta"):
        vae = KLVAE()
        assert vae.decode(torch.empty(1, 4, 1, 40, 64)).shape == (1, 3, 1, 320, 512)
        assert vae.encode(torch.empty(1, 3, 1, 320, 512)).shape == (1, 4, 1, 40, 64)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert (vae.config.z_dim, vae.config.spatial_factor, vae.config.frame_ratio) == (4, 8, 1)


def test_wrong_inputs(vae: KLVAE) -> None:
    with pytest.raises(ConfigError, match=r"decodes latents \[B, 4, n >= 1, h, w\]: given \(1, 3, 1, 2, 2\)$"):
        vae.decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(ConfigError, match=r"decodes latents .* given \(1, 4, 0, 2, 2\)$"):
        vae.stream_decoder().push(torch.zeros(1, 4, 0, 2, 2))
    with pytest.raises(ConfigError, match=r"takes a video \[B, 3, T >= 1, H, W\]: the given tensor is \(1, 4, 1, 2, 2"):
        vae.encode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ConfigError, match=r"height and width divisible by 2 and was given 3x4: crop or resize it$"):
        vae.encode(torch.zeros(1, 3, 1, 3, 4))
