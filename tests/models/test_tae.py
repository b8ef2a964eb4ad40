"""TAEW2.1 against the reference's frames, in pieces, out of the files that people have, and as an engine's decoder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import golden_model
import places
import pytest
import random_wan
import small_run
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from small_run import frames_of, miga
from torch import Tensor

from miga_engine import Engine
from miga_engine.errors import CheckpointError, ConfigError, SessionError
from miga_engine.models import load_vae
from miga_engine.models.wan.tae import TinyDecoder
from miga_engine.video.reading import read_metadata, read_video

FILE = places.GOLDENS / "taew2_1" / "taew2_1.safetensors"
TOLERANCE = 1e-5  # of frames in [0, 1]
NUM_FRAMES = 29


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    return load_vae(FILE, decoder="tae")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(places.GOLDENS / "taew2_1" / "io.safetensors")


@pytest.fixture(scope="module")
def latents(golden: dict[str, Tensor]) -> Tensor:
    return golden["latents"].transpose(0, 1)[None]


def _wrong_by(video: Tensor, golden: dict[str, Tensor]) -> float:
    """Against the reference's frames, in their range."""
    return ((video[0].transpose(0, 1) + 1) / 2 - golden["frames"]).abs().max().item()


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_frames_are_those_of_the_reference(decoder, latents, golden) -> None:
    assert _wrong_by(decoder.decode(latents), golden) <= TOLERANCE


@pytest.mark.parametrize("pieces", [[5], [1, 1, 1, 1, 1], [2, 3], [1, 4], [3, 1, 1]])
def test_a_stream_in_any_pieces_equals_the_whole_bit_for_bit(decoder, latents, pieces) -> None:
    stream = decoder.stream_decoder()
    frames = [stream.push(piece) for piece in latents.split(pieces, dim=2)]
    assert [len(part[0, 0]) for part in frames] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    assert torch.equal(torch.cat(frames, dim=2), decoder.decode(latents))


def test_clips_are_decoded_side_by_side(decoder, latents) -> None:
    both = decoder.decode(torch.cat((latents, latents.flip(2))))
    assert torch.equal(both, torch.cat((decoder.decode(latents), decoder.decode(latents.flip(2)))))


@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_a_clip_has_one_frame_and_four_for_each_further_latent(decoder, latents, num_latents) -> None:
    assert decoder.decode(latents[:, :, :num_latents]).shape == (1, 3, 1 + 4 * (num_latents - 1), 24, 40)


def test_a_stream_goes_on_from_its_saved_state(decoder, latents, tmp_path) -> None:
    whole = decoder.decode(latents)
    for done in (1, 2, 4):
        stream = decoder.stream_decoder()
        stream.push(latents[:, :, :done])
        save_file(stream.state(), tmp_path / "state.safetensors")
        state = stream.state()
        copies = {name: tensor.clone() for name, tensor in state.items()}
        stream.push(latents[:, :, done:])
        assert all(torch.equal(state[name], copies[name]) for name in copies)  # never written into
        resumed = decoder.stream_decoder()
        resumed.load_state(load_file(tmp_path / "state.safetensors"))
        assert torch.equal(resumed.push(latents[:, :, done:]), whole[:, :, 4 * done - 3 :])
    with pytest.raises(ConfigError, match=r"state names nonsense, which the decoder 'tae' lacks: resume with the deco"):
        resumed.load_state({"nonsense": whole})


def test_a_push_that_fails_leaves_the_stream_as_it_was(decoder, latents) -> None:
    whole, stream = decoder.decode(latents), decoder.stream_decoder()
    stream.push(latents[:, :, :2])
    for wrong, said in (
        (latents[:, :8, 2:], r"takes latents \[1, 16, n >= 1, h, w\]: given \(1, 8, 3, 3, 5\)$"),
        (latents[:, :, :0], r"given \(1, 16, 0, 3, 5\)$"),
        (latents[0], r"given \(16, 5, 3, 5\)$"),
        (latents[..., :4], r"opened with \(height, width\) = \(3, 5\) and now gets \(3, 4\): open a new stream_dec"),
    ):
        with pytest.raises(ConfigError, match=said):
            stream.push(wrong)
    assert "the tiny decoder" in refusal(lambda: stream.push(latents[:, :, 2:] * float("nan")))
    assert torch.equal(stream.push(latents[:, :, 2:]), whole[:, :, 5:])


def test_it_makes_no_latents_of_videos(decoder) -> None:
    with pytest.raises(ConfigError, match=r"'tae' makes no latents of videos: load the model with decoder 'vae'$"):
        decoder.encode(torch.zeros(1, 3, 5, 16, 16))


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_published_files_load_with_their_encoder_and_kernels_of_more_frames(name, latents, golden, tmp_path) -> None:
    """Where a layer could make more frames of one than it is to, its last ones count."""
    tensors = load_file(FILE)
    for layer in (7, 19):
        rows = tensors[f"decoder.{layer}.conv.weight"]
        tensors[f"decoder.{layer}.conv.weight"] = torch.cat((torch.randn_like(rows), rows))
    tensors |= {"encoder.0.weight": torch.randn(64, 3, 3, 3), "encoder.4.conv.0.bias": torch.randn(64)}
    file = _write(tmp_path / name, tensors)
    assert _wrong_by(load_vae(file, decoder="tae").decode(latents), golden) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, latents, golden) -> None:
    video = load_vae(FILE, dtype=dtype, decoder="tae").decode(latents)
    assert video.dtype == dtype
    assert ((video[0].transpose(0, 1) + 1) / 2 - golden["frames"]).square().mean().sqrt() < 0.02


def test_what_is_no_such_decoder_is_refused_by_its_name(tmp_path) -> None:
    tensors = load_file(FILE)
    of_2_2 = {**tensors, "decoder.1.weight": torch.randn(8, 48, 3, 3), "decoder.22.weight": torch.randn(12, 4, 3, 3)}
    told = refusal(lambda: load_vae(_write(tmp_path / "taew2_2.pth", of_2_2), decoder="tae"), CheckpointError)
    assert told.endswith("is the tiny decoder of another model (TAEHV), and not TAEW2.1, the tiny decoder of previews: "
                         "give taew2_1")  # fmt: skip
    vae = places.GOLDENS / "wan_vae" / "official" / "Wan2.1_VAE.safetensors"
    told = refusal(lambda: load_vae(vae, decoder="tae"), CheckpointError)
    assert "is a Wan2.1 VAE, and not TAEW2.1" in told
    told = refusal(lambda: load_vae(FILE), CheckpointError)
    assert "is TAEW2.1, the tiny decoder of previews, and not a Wan VAE: give it with --vae and --decoder tae" in told
    short = {name: tensor for name, tensor in tensors.items() if name != "decoder.8.weight"}
    told = refusal(lambda: load_vae(_write(tmp_path / "a.safetensors", short), decoder="tae"), CheckpointError)
    assert "lacks a convolution of TAEW2.1: give the complete taew2_1 file" in told
    fewer = {name: tensor for name, tensor in tensors.items() if name != "decoder.4.conv.2.bias"}
    told = refusal(lambda: load_vae(_write(tmp_path / "b.safetensors", fewer), decoder="tae"), CheckpointError)
    assert "lacks decoder.4.conv.2.bias" in told


# Of an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI folder with the tiny decoder where ComfyUI has it."""
    folder = random_wan.comfy(tmp_path_factory.mktemp("comfy") / "ComfyUI")
    _write(folder / "models" / "vae_approx" / "taew2_1.safetensors", load_file(FILE))
    (folder / "miga.json").write_text(json.dumps({"window_frames": 5, "default_negative_prompt": "blurry"}))
    return folder


def _engine(tree: Path, **more: Any) -> Engine:
    return Engine.from_pretrained(tree, "cpu", tokenizer=random_wan.TOKENIZER, **more)


@pytest.fixture(scope="module")
def engine(tree: Path) -> Engine:
    return _engine(tree, decoder="tae")


@pytest.fixture(scope="module")
def whole(engine: Engine) -> Tensor:
    return frames_of(engine.stream("a red balloon", NUM_FRAMES, **small_run.OPTIONS))


@pytest.mark.slow
def test_an_engine_takes_it_out_of_a_comfyui_folder_or_by_its_name(tree, engine, whole) -> None:
    assert isinstance(engine.bundle.vae, TinyDecoder)
    assert whole.shape == (NUM_FRAMES, 32, 48, 3)
    named = _engine(tree, decoder="tae", vae=FILE)
    assert torch.equal(frames_of(named.stream("a red balloon", NUM_FRAMES, **small_run.OPTIONS)), whole)
    with_vae = _engine(tree)
    assert not torch.equal(frames_of(with_vae.stream("a red balloon", NUM_FRAMES, **small_run.OPTIONS)), whole)


@pytest.mark.slow
def test_a_session_goes_on_with_it_and_with_no_other_decoder(tree, engine, whole, tmp_path) -> None:
    saved = tmp_path / "run.safetensors"
    frames = []
    with engine.stream("a red balloon", NUM_FRAMES, **small_run.OPTIONS) as stream:
        while stream.num_frames_out < 9:
            frames.append(next(stream).frames)
        stream.save(saved)
    frames.append(frames_of(_engine(tree, decoder="tae").resume(saved)))
    assert torch.equal(torch.cat(frames), whole)
    told = refusal(lambda: _engine(tree).resume(saved), SessionError)
    assert "was made with decoder 'tae'" in told
    assert "load the model as it was" in told


@pytest.mark.slow
def test_the_command_makes_previews_and_goes_on_with_them(tree, whole, tmp_path, capsys) -> None:
    video = tmp_path / "preview.mkv"  # which holds every bit
    named = ["--tokenizer", random_wan.TOKENIZER, "--decoder", "tae"]
    arguments = small_run.generate(tree, video, 13, *named, "--checkpoint-every", 4)
    assert miga(*arguments) == 0
    session = tmp_path / "preview.session.safetensors"
    again = ["resume", session, "--model", tree, "--tokenizer", random_wan.TOKENIZER, "-q"]
    assert miga(*again, "--num-frames", NUM_FRAMES) == 0
    assert torch.equal(torch.from_numpy(read_video(video)), whole)
    assert read_metadata(video)["seed"] == 3
    capsys.readouterr()
    size = ["--height", 128, "--width", 192, "--zigzag-width", 2, "--guidance-frames", 1, "--stride", 2]
    held = {}
    for decoder in ("tae", "vae"):
        assert miga("estimate", "--model", tree, *named, "--decoder", decoder, *size) == 0
        held[decoder] = capsys.readouterr().out
    sizes = {name: re.search(r"decoder feature cache +(\S+) MiB", text) for name, text in held.items()}
    assert 0 < float(sizes["tae"][1]) < float(sizes["vae"][1])


@pytest.mark.slow
def test_options_that_contradict_one_another_are_one_sentence(tree, tmp_path, capsys) -> None:
    def told(model: object, *more: object) -> str:
        assert miga(*small_run.generate(model, tmp_path / "a.mp4", 9, *more)) == 2  # type: ignore[arg-type]
        said = capsys.readouterr().err
        assert said.startswith("miga: ")
        assert said.count("\n") == 1
        assert not list(tmp_path.glob("a.*"))
        return said

    tokenizer = ("--tokenizer", random_wan.TOKENIZER)
    assert "give it with --vae and --decoder tae" in told(tree, *tokenizer, "--vae", FILE)
    plain = golden_model.build(tmp_path / "official")
    assert "download taew2_1.safetensors and name it with --vae" in told(plain, "--decoder", "tae")
    videocrafter2 = golden_model.build_videocrafter2(tmp_path / "vc2")
    assert "there is no --decoder: leave --decoder out" in told(videocrafter2, "--decoder", "tae")
    assert "invalid choice: 'taehv'" in told(tree, *tokenizer, "--decoder", "taehv")
