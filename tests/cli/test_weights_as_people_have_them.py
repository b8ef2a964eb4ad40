"""`miga` on weights as people have them: a ComfyUI folder; GGUF and fp8 files with a LoRA; what it makes of them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_wan
import small_run
import torch
from peoples_files import (
    NUM_FRAMES,
    build_comfy,
    build_parts,
    content,
    flags,
    generate,
    gguf_of,
    kill,
    spiece,
    told,
    write_lora,
)
from safetensors.torch import load_file, save_file
from small_run import miga

from miga_engine.cli import render
from miga_engine.models import convert, load_text_encoder, load_transformer, load_vae
from miga_engine.video.reading import read_metadata, read_video


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_comfy(tmp_path_factory.mktemp("comfy") / "ComfyUI")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_parts(tmp_path_factory.mktemp("parts") / "models")


@pytest.mark.slow
def test_a_comfyui_folder_makes_a_video_that_goes_on_after_a_kill(comfy, tmp_path, capsys) -> None:
    whole, video, session = (tmp_path / name for name in ("whole.mkv", "video.mkv", "video.session.safetensors"))
    style = ["--lora", f"{write_lora(comfy / 'models' / 'loras' / 'style.safetensors', 0)}:0.7"]
    assert miga(*generate(comfy, whole, *style)) == 0
    kill(*generate(comfy, video, *style))
    assert f"name the LoRA with --lora {style[1]}" in told(capsys, 2, "resume", session, "--model", comfy, "-q")
    assert miga("resume", session, "--model", comfy, *style, "-q") == 0
    frames = read_video(whole)
    assert frames.shape == (NUM_FRAMES, 32, 48, 3)
    assert np.array_equal(read_video(video), frames)


@pytest.mark.slow
def test_the_prompt_is_read_with_the_tokenizer_inside(comfy, tmp_path) -> None:
    """Another prompt gives another video, and another tokenizer does."""
    frames = []
    for i, more in enumerate(([], ["--tokenizer", random_wan.TOKENIZER])):
        for prompt in ("a red balloon", "a plane at night"):
            video = tmp_path / f"{i} {prompt}.mkv"
            arguments = small_run.generate(comfy, video, 5, *more)
            assert miga(arguments[0], prompt, *arguments[2:]) == 0
            frames.append(read_video(video))
    assert all(not np.array_equal(frames[i], frames[j]) for i, j in ((0, 1), (2, 3), (0, 2)))


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    video = tmp_path_factory.mktemp("whole") / "whole.mkv"
    assert miga(*generate(gguf_of(parts), video, *flags(parts))) == 0
    return read_video(video)


@pytest.fixture(scope="module")
def killed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a video whose making was killed."""
    folder = tmp_path_factory.mktemp("killed")
    kill(*generate(gguf_of(parts), folder / "video.mkv", *flags(parts)))
    return folder


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """The session file of such a video, a copy."""
    folder = shutil.copytree(killed, tmp_path / "stopped")
    return folder / "video.session.safetensors"


@pytest.mark.slow
def test_parts_of_all_formats_make_one_video_that_goes_on_after_a_kill(parts, whole, stopped, capsys) -> None:
    assert whole.shape == (NUM_FRAMES, 32, 48, 3)
    said = told(capsys, 0, "info", stopped)
    assert f"LoRA                 {parts / 'style.safetensors'}:0.7" in said
    assert f"text encoder         {parts / 'umt5_fp8_scaled.safetensors'}" in said
    renamed = shutil.copy(parts / "style.safetensors", stopped.with_name("renamed.safetensors"))
    again = ["resume", stopped, "-q", "--model", gguf_of(parts), *flags(parts, None), "--lora", f"{renamed}:0.7"]
    assert miga(*again) == 0
    assert np.array_equal(read_video(stopped.with_name("video.mkv")), whole)
    assert {path.name for path in stopped.parent.iterdir() if ".part" in path.name} == set()


@pytest.mark.slow
def test_a_lora_decides_over_the_video(parts, whole, tmp_path) -> None:
    videos = []
    for i, lora in enumerate((None, ":0.6", "")):
        video = tmp_path / f"{i}.mkv"
        assert miga(*small_run.generate(gguf_of(parts), video, 9, *flags(parts, lora))) == 0
        videos.append(read_video(video))
    assert all(not np.array_equal(video, whole[:9]) for video in videos)
    assert not np.array_equal(videos[1], videos[2])


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "models"])
def test_parts_beside_or_below_the_session_file_need_not_be_named(parts, whole, tmp_path, folder) -> None:
    """Where a video is made in the folder of its parts, or in one above it."""
    models, video = shutil.copytree(parts, tmp_path / folder, dirs_exist_ok=True), tmp_path / "video.mkv"
    kill(*generate(gguf_of(models), video, *flags(models)))
    assert miga("resume", tmp_path / "video.session.safetensors", "-q") == 0
    assert np.array_equal(read_video(video), whole)


@pytest.mark.slow
def test_a_whole_folder_that_was_moved_goes_on(parts, whole, tmp_path) -> None:
    """The files' old places are gone, and those of their names lie beside the session file."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(parts, before)
    kill(*generate(gguf_of(before), before / "video.mkv", *flags(before)))
    before.rename(after)
    assert miga("resume", after / "video.session.safetensors", "-q") == 0
    assert np.array_equal(read_video(after / "video.mkv"), whole)


@pytest.mark.slow
def test_a_session_is_not_gone_on_with_under_another_lora(parts, whole, stopped, capsys) -> None:
    before = content(stopped.parent)
    model = ["--model", gguf_of(parts)]

    def refused(lora: str | None) -> str:
        more = [] if lora is None else ["--lora", lora]
        said = told(capsys, 2, "resume", stopped, "-q", *model, *flags(parts, None), *more)
        assert content(stopped.parent) == before
        return said

    style = parts / "style.safetensors"
    assert f"name the LoRA with --lora {style}:0.7" in refused(None)
    for strength in ("0.8", "0", "-0.7", "0.7000001"):
        said = refused(f"{style}:{strength}")
        assert "made with the LoRA style.safetensors:0.7 (" in said
        assert f"here there is the LoRA style.safetensors:{strength} (" in said
    assert "here there is the LoRA other.safetensors:0.7 (" in refused(f"{parts / 'other.safetensors'}:0.7")
    assert "there is no lora at " in refused(f"{parts / 'gone.safetensors'}:0.7")

    floats = parts / "umt5_floats.safetensors"  # texts would be read with other roundings from here on
    save_file(random_wan.text_encoder("hf"), floats)
    said = told(capsys, 2, "resume", stopped, "-q", *model, *flags(parts), "--text-encoder", floats)
    assert "was made with other weights of the text encoder (" in said
    assert content(stopped.parent) == before

    no_lora = stopped.with_name("plain.mkv")
    assert miga(*small_run.generate(gguf_of(parts), no_lora, 9, *flags(parts, None), "--checkpoint-every", 4)) == 0
    plain = stopped.with_name("plain.session.safetensors")
    said = told(capsys, 2, "resume", plain, "-q", *model, *flags(parts), "--num-frames", 13)
    assert "was made with no LoRA, and here there is the LoRA style.safetensors:0.7 (" in said


class _Late(list[int]):
    """Signals that have come once they have been asked for some times."""

    asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked > 20


@pytest.mark.slow
def test_the_command_that_is_said_goes_on(parts, tmp_path, monkeypatch, capsys) -> None:
    """As it stands, from another folder."""
    whole, video = tmp_path / "whole.mkv", tmp_path / "my video's.mkv"
    monkeypatch.chdir(parts)
    named = [str(flag).replace(f"{parts}/", "") for flag in flags(parts, ":0.30000000000000004")]
    assert miga(*generate("wan2.1-t2v-Q8_0.gguf", whole, *named)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(render, "interruptible", lambda: contextlib.nullcontext(_Late([signal.SIGINT])))
        assert miga(*generate("wan2.1-t2v-Q8_0.gguf", video, *named)) == 130
    command = capsys.readouterr().err.partition("miga: to go on from frame ")[2].partition(": miga ")[2]
    command = command.splitlines()[0]
    monkeypatch.chdir(tmp_path)
    assert miga(*shlex.split(command), "-q") == 0
    assert np.array_equal(read_video(video), read_video(whole))


@pytest.mark.slow
def test_estimate_and_info_tell_of_every_file(parts, capsys) -> None:
    size = ["--height", 32, "--width", 48, "--zigzag-width", 2, "--guidance-frames", 1, "--stride", 2]
    said = told(capsys, 0, "estimate", "--model", gguf_of(parts), *flags(parts), *size)
    assert "transformer weights" in said
    assert "total of the process" in said
    assert told(capsys, 0, "estimate", "--transformer", gguf_of(parts), *flags(parts), *size) == said
    expected = {
        "wan2.1-t2v-Q8_0.gguf": ("a Wan2.1 text-to-video transformer", "GGUF", "Q8_0"),
        "umt5_fp8_scaled.safetensors": ("a UMT5 text encoder", "give it with --text-encoder", "with scales"),
        "wan_2.1_vae.safetensors": ("a Wan2.1 VAE", "give it with --vae", "float32"),
        "style.safetensors": ("a LoRA", "give it with --lora", "4 (6 modules)"),
    }
    for name, phrases in expected.items():
        said = told(capsys, 0, "info", parts / name)
        assert all(phrase in said for phrase in phrases), said


@pytest.mark.slow
def test_the_video_says_what_it_was_made_of(parts, tmp_path) -> None:
    video = tmp_path / "video.mkv"
    assert miga(*small_run.generate(gguf_of(parts), video, 5, *flags(parts))) == 0
    metadata = read_metadata(video)
    assert metadata["model"] == str(gguf_of(parts))
    ((name, strength, weights),) = metadata["lora"]
    assert (name, strength) == ("style.safetensors", 0.7)
    assert re.fullmatch("[0-9a-f]{16}", weights)


# Conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_converted_parts_are_an_official_folder_with_the_same_video(parts, whole, tmp_path, capsys) -> None:
    folder, video = tmp_path / "merged", tmp_path / "video.mkv"
    assert miga("convert", gguf_of(parts), folder, *flags(parts), "--dtype", "float32") == 0
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "Wan2.1_VAE.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "miga.json",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ]
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # who may read one may read all
    assert miga(*generate(folder, video)) == 0
    assert np.array_equal(read_video(video), whole)


@pytest.mark.slow
def test_a_converted_comfyui_folder_has_the_same_video(comfy, tmp_path) -> None:
    """Its tokenizer comes out of the text encoder's file."""
    folder, videos = tmp_path / "official", [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    assert miga("convert", comfy, folder) == 0
    assert (folder / "google" / "umt5-xxl" / "spiece.model").read_bytes() == bytes(spiece().tolist())
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.self_attn.q.weight"].dtype == torch.float16  # as it was
    for model, video in zip((comfy, folder), videos, strict=True):
        assert miga(*small_run.generate(model, video, 17)) == 0
    assert np.array_equal(*map(read_video, videos))


@pytest.mark.slow
def test_a_lora_merged_into_half_precision_leaves_it_so(comfy, parts, tmp_path) -> None:
    folder, style = tmp_path / "merged", parts / "style.safetensors"
    assert miga("convert", comfy, folder, "--lora", f"{style}:-0.5") == 0
    merged = load_transformer(comfy, dtype=torch.float32, loras=[(style, -0.5)]).state_dict()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for key, value in stored.items() if key.endswith("attn.q.weight")} == {torch.float16}
    assert all(torch.equal(value, merged[key].to(value.dtype)) for key, value in stored.items())


@pytest.mark.slow
def test_the_embedded_model_as_a_folder_has_the_same_video(tmp_path) -> None:
    folder, videos = tmp_path / "tiny", [tmp_path / "a.mkv", tmp_path / "b.mkv"]
    assert miga("convert", "tiny", folder) == 0
    for model, video in zip(("tiny", folder), videos, strict=True):
        arguments = ["a red ball", "--model", model, "--preset", "tiny", "--num-frames", 5, "--seed", 3, "-q"]
        arguments += ["--height", 32, "--width", 48]
        arguments += ["--num-inference-steps", 9, "--stage2-steps", 2, "--judge-step", 3]
        assert miga("generate", *arguments, "-o", video) == 0
    assert np.array_equal(*map(read_video, videos))


@pytest.mark.slow
def test_single_files_become_plain_safetensors(parts, tmp_path) -> None:
    written = tmp_path / "transformer.safetensors", tmp_path / "umt5.safetensors"
    for source, target in zip(("wan2.1-t2v-Q8_0.gguf", "umt5_fp8_scaled.safetensors"), written, strict=True):
        assert miga("convert", parts / source, target, "--dtype", "float32") == 0
        assert all(value.dtype == torch.float32 for value in load_file(target).values())
    state = load_transformer(gguf_of(parts), dtype=torch.float32).state_dict()
    again = load_transformer(written[0]).state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    expected = random_wan.dequantized(random_wan.scaled_fp8(random_wan.text_encoder("hf")))
    stored = load_file(written[1])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    assert miga("convert", gguf_of(parts), written[0], "-y") == 0  # what was packed becomes bfloat16
    assert load_file(written[0])["blocks.0.self_attn.q.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_large_networks_become_several_files_with_an_index(parts, tmp_path, monkeypatch) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    command = ["convert", gguf_of(parts), *flags(parts), "--dtype", "float32"]
    assert miga(*command, one) == 0
    save = convert._save_shards

    def save_small(checkpoint: Any, file: Path, dtype: Any) -> int:
        with monkeypatch.context() as patch:
            if "VAE" not in file.name:  # which is a tenth of what a file may hold
                patch.setattr(convert, "SHARD_BYTES", 60_000)
            return save(checkpoint, file, dtype)

    monkeypatch.setattr(convert, "_save_shards", save_small)
    assert miga(*command, several) == 0
    for name in ("diffusion_pytorch_model", "models_t5_umt5-xxl-enc-bf16"):
        index = json.loads((several / f"{name}.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 1
        assert shards == sorted(path.name for path in several.glob(f"{name}-*.safetensors"))
        assert index["weight_map"].keys() == load_file(one / f"{name}.safetensors").keys()
    for load in (load_transformer, load_text_encoder, load_vae):
        state, again = (load(folder).state_dict() for folder in (one, several))  # type: ignore[operator]
        assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.slow
def test_what_is_there_is_not_written_over(parts, tmp_path, capsys) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    for more in ((), ("--overwrite",)):
        said = told(capsys, 2, "convert", gguf_of(parts), folder, *flags(parts), *more)
        assert said == f"miga: cannot write {folder}: it is there; name a folder that is not\n"
    assert content(folder) == {"config.json": b"mine"}
    said = told(capsys, 2, "convert", gguf_of(parts), tmp_path / "no" / "merged", *flags(parts))
    assert f"cannot write {tmp_path / 'no' / 'merged'}: No such file or directory" in said


@pytest.mark.slow
@pytest.mark.parametrize("num_written", [0, 2])
def test_a_conversion_that_fails_leaves_nothing_behind(parts, tmp_path, monkeypatch, capsys, num_written) -> None:
    save, written = convert._save, []

    def fails(tensors: Any, file: Path) -> int:
        if len(written) == num_written:
            file.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        return save(tensors, file)

    monkeypatch.setattr(convert, "_save", fails)
    said = told(capsys, 2, "convert", gguf_of(parts), tmp_path / "merged", *flags(parts))
    assert said.startswith(f"miga: cannot write {tmp_path / 'merged'}: No space left on device; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_converted_is_one_sentence(parts, tmp_path, capsys) -> None:
    wide = write_lora(tmp_path / "wide.safetensors", 2)
    save_file({key: value.repeat(2, 2) for key, value in load_file(wide).items()}, wide)
    target = tmp_path / "merged"
    said = told(capsys, 2, "convert", gguf_of(parts), target, *flags(parts, None), "--lora", wide)
    assert "give a LoRA made for this model" in said
    assert not target.exists()
    assert "holds no text encoder weights" in told(capsys, 2, "convert", comfy_without_text(tmp_path), target)
    said = told(capsys, 2, "convert", parts, tmp_path / "a.safetensors")
    assert "is not a file: give a weights file such as model.ckpt, or write a whole model into a folder" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComfyUI", "wide.safetensors"]


def comfy_without_text(folder: Path) -> Path:
    tree = random_wan.comfy(folder / "ComfyUI")
    (tree / "models" / "text_encoders" / "umt5_xxl_fp16.safetensors").unlink()
    return tree
