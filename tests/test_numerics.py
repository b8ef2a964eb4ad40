"""NaN and infinity from the VAE and the text encoder: blamed on them, after all frames that were sound."""

from __future__ import annotations

from pathlib import Path

import golden_model
import pytest
import torch

from miga_engine import Engine, NumericsError
from miga_engine.cli import main
from miga_engine.models.layers import check_finite


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Engine]:
    return {
        name: Engine.from_pretrained(family.build(tmp_path_factory.mktemp(name)))
        for name, family in golden_model.FAMILIES.items()
    }


@pytest.fixture(params=golden_model.FAMILIES)
def family(request) -> str:
    return request.param


def _run(engine: Engine, family: str, **options):
    return engine.stream("a red balloon", golden_model.FAMILIES[family].num_frames,
                         **golden_model.FAMILIES[family].options, **options)  # fmt: skip


@pytest.fixture(scope="module")
def wholes(engines) -> dict[str, torch.Tensor]:
    return {name: torch.cat([chunk.frames for chunk in _run(engine, name)]) for name, engine in engines.items()}


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_decoder_that_gives_nan_stops_the_run_behind_its_sound_frames(
    engines, wholes, family: str, value: float, overlap: bool, monkeypatch, tmp_path: Path
) -> None:
    """Infinity too, which clamping would have made white; what was not decoded is saved, and goes on bit for bit."""
    engine = engines[family]
    decoder, calls = engine.bundle.vae.decoder, iter(range(10**6))
    forward = decoder.forward

    def poisoned(*args, **kwargs):
        result = forward(*args, **kwargs)
        if next(calls) >= 3:
            result[..., 0] = value
        return result

    stream, frames = _run(engine, family, overlap_decode=overlap), []
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", poisoned)
        with pytest.raises(NumericsError, match=r"the VAE, decoding .* gave NaN or infinity in float32"):
            frames.extend(chunk.frames for chunk in stream)
        stream.save(tmp_path / "run.safetensors")
    made = torch.cat(frames)
    assert len(made) == engine.bundle.num_video_frames(3)
    rest = [chunk.frames for chunk in engine.resume(tmp_path / "run.safetensors")]
    assert torch.equal(torch.cat([made, *rest]), wholes[family])


@pytest.mark.slow
def test_nan_in_the_file_of_the_vae_ends_in_a_sentence_and_not_in_a_black_video(tmp_path: Path, capsys) -> None:
    folder = golden_model.build(tmp_path / "model")
    file = folder / "Wan2.1_VAE.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["decoder.head.2.bias"][0] = torch.nan
    save_file(tensors, file)
    options = ["--model", str(folder), "--height", "32", "--width", "48", "--num-frames", "5", "--zigzag-width", "2"]
    options += ["--stage2-steps", "3", "--guidance-frames", "1", "--stride", "2", "--judge-step", "3"]
    code = main(
        ["generate", "a red balloon", *options, "--num-inference-steps", "8", "-q", "-o", str(tmp_path / "a.mp4")]
    )
    assert code != 0
    assert "the VAE, decoding (vae_dtype), gave NaN or infinity in float32: download its weights again" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_float16_that_overflows_names_the_dtypes_that_do_not(engines, family: str, monkeypatch) -> None:
    vae = engines[family].bundle.vae
    latents = torch.full((1, vae.config.z_dim, 2, 4, 4), 1e4)
    with torch.no_grad():
        vae.decode(latents)  # sound in float32
        half = Engine.from_pretrained(engines[family].bundle.path, vae_dtype="float16").bundle.vae
        decoder = half.stream_decoder()
        with pytest.raises(NumericsError, match="in float16: start anew in float32 or bfloat16, or download its weig"):
            decoder.push(latents * 1e4)
        assert decoder.state() == {}
        with pytest.raises(NumericsError, match=r"decoding .* was given NaN or infinity"):
            vae.decode(latents * torch.nan)
        with pytest.raises(NumericsError, match=r"encoding .* was given NaN or infinity"):
            vae.encode(torch.full((1, 3, 1, 16, 16), torch.nan))


@pytest.mark.parametrize("which", ["prompt", "negative_prompt"])
def test_nan_of_the_text_encoder_is_not_blamed_on_the_network(engines, family: str, which: str, monkeypatch) -> None:
    engine = engines[family]
    encoder, forward = engine.bundle.text_encoder, engine.bundle.text_encoder.forward
    bad = engine.bundle.tokenizer(["a dark and stormy night"])[0]

    def poisoned(ids, mask):
        out = forward(ids, mask)
        return out * torch.nan if torch.equal(ids, bad) else out

    monkeypatch.setattr(encoder, "forward", poisoned)
    options = {"negative_prompt": "a red balloon", **{which: "a dark and stormy night"}}
    prompt = options.pop("prompt", "a red balloon")
    with pytest.raises(
        NumericsError, match=r"the text encoder .*'a dark and stormy night', gave NaN or infinity in floa"
    ):
        engine.stream(prompt, 5, **golden_model.FAMILIES[family].options, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers_pass_whatever_their_sum(dtype: torch.dtype) -> None:
    extreme = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    check_finite("it", extreme, extreme, dtype)
    check_finite("it", extreme, extreme.to("meta") * 2, dtype)
    with pytest.raises(NumericsError):
        check_finite("it", extreme, extreme * 2, dtype)
