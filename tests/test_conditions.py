"""Videos that begin with a picture or the end of a clip: what is read, what comes out first, and how a run goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import golden_model
import numpy as np
import pytest
import small_models
import torch
from refusals import refusal
from torch import Tensor

from miga_engine import ConfigError, Engine
from miga_engine.cli import main
from miga_engine.conditions import _at_rate, _fitted
from miga_engine.errors import MigaError
from miga_engine.request import Condition, Request
from miga_engine.runtime.stream import Event
from miga_engine.video.outputs import open_sink
from miga_engine.video.png import encode_png
from miga_engine.video.reading import read_video

PROMPT = "a red balloon"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    root = tmp_path_factory.mktemp("models")
    return {name: Engine.from_pretrained(model.build(root / name)) for name, model in small_models.MODELS.items()}


def options_of(name: str, **changes: Any) -> dict[str, Any]:
    options = {key: value for key, value in small_models.MODELS[name].options.items() if key not in ("image", "video")}
    return options | changes


def frames_of(stream: Any) -> Tensor:
    return torch.cat([chunk.frames for chunk in stream])


@pytest.fixture(scope="module")
def plain(engines: dict[str, Engine]) -> Callable[[str], Tensor]:
    """The frames of a model where nothing is given."""

    def frames(name: str) -> Tensor:
        return frames_of(engines[name].stream(PROMPT, small_models.MODELS[name].num_frames, **options_of(name)))

    return functools.cache(frames)


def reconstruction(engine: Engine, pictures: Tensor) -> Tensor:
    """What the VAE makes of pictures uint8 `[n,H,W,3]`."""
    video = pictures.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = engine.bundle.vae.decode(engine.bundle.vae.encode(video))
    return ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# What comes out --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", small_models.MODELS)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_first_frames_are_what_was_given_decoded(engines: dict[str, Engine], plain, name: str, kind: str) -> None:
    engine, given = engines[name], {"image": small_models.PICTURE, "video": small_models.CLIP}[kind]
    num_frames = small_models.MODELS[name].num_frames
    stream = engine.stream(PROMPT, num_frames, **options_of(name, **{kind: given}))
    condition = engine.resolve(PROMPT, num_frames, **options_of(name, **{kind: given})).condition
    assert condition is not None
    assert stream.request.condition == condition
    assert stream.request.condition.frames is None
    first = next(stream)  # before the first pass
    frames = torch.cat([first.frames, frames_of(stream)])
    assert len(frames) == num_frames
    assert len(first.frames) == condition.num_frames
    expected = reconstruction(engine, condition.frames)
    assert (frames[: condition.num_frames].int() - expected.int()).abs().max() <= 1
    assert not torch.equal(frames[condition.num_frames :], plain(name)[condition.num_frames :])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ti2v", "skyreels", "experts", "videocrafter2", "wan as FIFO"])
def test_a_run_goes_on_from_wherever_it_was_saved_without_what_it_was_given(engines, tmp_path: Path, name: str) -> None:
    method = {"method": "fifo"} if "FIFO" in name else {}
    name = name.removesuffix(" as FIFO")
    engine, num_frames = engines[name], small_models.MODELS[name].num_frames
    given = {"image": small_models.PICTURE} if name == "experts" else {"video": small_models.CLIP}
    options = options_of(name, **given, **method)
    whole = frames_of(engine.stream(PROMPT, num_frames, **options))
    paths: list[Path] = []

    def save(event: Event) -> None:
        if event.kind in ("stage", "score", "search_started", "search_finished", "chunk"):
            paths.append(tmp_path / f"{event.number}.safetensors")
            stream.save(paths[-1])

    stream = engine.stream(PROMPT, num_frames, on_event=save, **options)
    stream.save(tmp_path / "0.safetensors")  # before anything was done
    assert torch.equal(frames_of(stream), whole)
    assert len(paths) > 6
    for path in [tmp_path / "0.safetensors", *paths[:: max(1, len(paths) // 4)]]:
        resumed = engine.resume(path)
        start = resumed.num_frames_out
        rest = [chunk.frames for chunk in resumed]
        assert torch.equal(torch.cat([whole[:start], *rest]), whole), path


@pytest.mark.slow
def test_the_command_begins_with_a_picture_and_with_a_clip_and_resumes(engines, tmp_path: Path, capsys) -> None:
    engine = engines["ti2v"]
    picture, clip = tmp_path / "picture.png", tmp_path / "clip.mkv"
    picture.write_bytes(encode_png(small_models.PICTURE.numpy(), ""))
    with open_sink(clip, "16", 30, 20) as sink:
        sink.write(small_models.CLIP)
    flags = ["--height", "32", "--width", "64", "--num-inference-steps", "8", "--num-frames", "22", "--zigzag-width",
             "2", "--stage2-steps", "3", "--guidance-frames", "1", "--stride", "2", "--judge-step", "3", "--fps", "16",
             "--quiet"]  # fmt: skip
    for flag, file in (("--image", picture), ("--video", clip)):
        video, session = tmp_path / f"{flag[2:]}.mkv", tmp_path / f"{flag[2:]}.safetensors"
        command = ["generate", PROMPT, "--model", str(engine.name), flag, str(file), *flags, "--output", str(video)]
        assert main([*command, "--session", str(session), "--checkpoint-every", "5"]) == 0, capsys.readouterr().err
        frames = torch.from_numpy(read_video(video))
        assert len(frames) == 22
        record = json.loads(json.dumps(Request.from_record(_request_in(session)).to_record()))
        assert record["condition"]["source"] == file.name
        condition = engine.resolve(PROMPT, 22, **options_of("ti2v", **{flag[2:]: file}), fps=16).condition
        assert condition is not None
        assert record["condition"] == condition.to_record()
        expected = reconstruction(engine, condition.frames)
        assert (frames[: condition.num_frames].int() - expected.int()).abs().max() <= 1
    picture.unlink()
    halfway = tmp_path / "halfway.safetensors"
    whole = torch.from_numpy(read_video(tmp_path / "video.mkv"))
    method = {"zigzag_width": 2, "stage2_steps": 3, "guidance_frames": 1, "stride": 2, "judge_step": 3}
    stream = engine.stream(PROMPT, 22, **options_of("ti2v", miga=method), video=clip, fps=16)
    begun = [next(stream).frames]
    stream.save(halfway)
    clip.unlink()
    rest = frames_of(Engine.from_pretrained(engine.name).resume(halfway))
    assert torch.equal(torch.cat([*begun, rest]), whole)


def _request_in(session: Path) -> dict[str, Any]:
    from miga_engine.runtime.session import load_session

    return load_session(session).request


@pytest.mark.slow
def test_an_estimate_counts_what_encodes_the_beginning(engines) -> None:
    options = options_of("ti2v")
    plain, with_clip = (
        Engine.estimate(engines["ti2v"].name, "cpu", prompt=PROMPT, num_frames=30, **options, **given)
        for given in ({}, {"video": small_models.CLIP})
    )
    assert "encoding what the video begins with" not in plain.peaks
    assert with_clip.peaks["encoding what the video begins with"] > 0


def test_metadata_and_session_say_what_a_video_began_with(engines) -> None:
    request = engines["wan"].resolve(PROMPT, 30, **options_of("wan", image=small_models.PICTURE))
    assert request.image is None
    assert request.condition is not None
    record = json.loads(json.dumps(request.to_record()))
    assert record["condition"] == {"kind": "image", "num_frames": 1, "source": "", "digest": request.condition.digest}
    assert Request.from_record(record) == request
    assert request.metadata("small")["condition"]["digest"] == request.condition.digest
    assert "condition" not in engines["wan"].resolve(PROMPT, 30, **options_of("wan")).to_record()
    for broken in ({"kind": "image"}, {**record["condition"], "num_frames": 10**12}, {**record["condition"], "kind": 3},
                   {**record["condition"], "more": 1}, [], "image"):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            Request.from_record({**record, "condition": broken})


def test_a_request_without_its_frames_makes_no_run_of_its_own(engines) -> None:
    engine = engines["wan"]
    request = engine.resolve(PROMPT, 30, **options_of("wan", image=small_models.PICTURE))
    stream = engine.run(Request.from_record(request.to_record()))
    assert "begins with frames that it was not given" in refusal(lambda: next(stream), MigaError)


# What is read ----------------------------------------------------------------------------------------------------


def test_a_picture_fills_the_video_and_what_is_over_is_cut_off_evenly() -> None:
    picture = torch.zeros(1, 40, 120, 3, dtype=torch.uint8)
    picture[:, :, 40:80] = 200  # the middle third
    made = _fitted(picture, 16, 16)
    assert made.shape == (1, 16, 16, 3)
    assert (made[:, :, 2:-2] == 200).all()  # but for what the edge blurs
    assert (_fitted(picture.transpose(1, 2), 16, 16) == made.transpose(1, 2)).all()
    assert _fitted(picture, 40, 120) is picture
    larger = _fitted(picture, 80, 240)
    assert (larger[:, :, 100:140] == 200).all()
    assert (larger[:, :, :60] == 0).all()


@pytest.mark.parametrize(("rate", "fps"), [(24, 16), (30, 24), ("24000/1001", 16), (8, 16), (10, 24), (16, 16)])
def test_a_clip_of_another_rate_is_shown_at_the_same_times(rate: Any, fps: Any) -> None:
    numbers = [np.full((1, 1, 3), n, np.uint8) for n in range(60)]
    shown = [int(frame[0, 0, 0]) for frame in _at_rate(iter(numbers), Fraction(rate), Fraction(fps), 10)]
    assert shown == [int(n * Fraction(rate) / Fraction(fps)) for n in range(len(shown))]
    assert abs(len(shown) - 60 * Fraction(fps) / Fraction(rate)) < 1
    hardly = [*_at_rate(iter(numbers[:2]), Fraction(1, 10**12), Fraction(16), 5)]  # a rate that no clip has
    assert [int(frame[0, 0, 0]) for frame in hardly] == [0] * 5 + [1] * 5


@pytest.mark.parametrize(("options", "num_frames"), [({}, 9), ({"video_frames": 5}, 5), ({"video_frames": 1}, 1)])
def test_the_last_frames_of_a_clip_are_taken_in_whole_latent_frames(engines, options, num_frames: int) -> None:
    request = engines["wan"].resolve(PROMPT, 30, **options_of("wan", video=small_models.CLIP, **options))
    assert request.condition is not None
    assert request.condition.num_frames == num_frames
    expected = _fitted(small_models.CLIP[-num_frames:], 32, 48)
    assert torch.equal(request.condition.frames, expected)


def test_no_more_is_given_than_the_first_queue_holds(engines) -> None:
    clip = small_models.CLIP.repeat(4, 1, 1, 1)
    options = options_of("wan", video=clip)
    assert engines["wan"].resolve(PROMPT, 50, **options).condition.num_frames == 13  # 2 groups of 2 latent frames
    sentence = refusal(lambda: engines["wan"].resolve(PROMPT, 50, **options, video_frames=17), ConfigError)
    assert sentence == "video_frames is 17, and a video begins with at most 13 frames here: ask for fewer"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image": 1, "video": 1}, "image and video are both given: keep one of the two"),
        ({"video_frames": 5}, "video_frames is 5 without a video: name the clip, or leave it out"),
        ({"video": small_models.CLIP, "video_frames": 6}, "video_frames is 6, which is no whole number of latent "
         "frames: use 5 or 9"),
        ({"video": small_models.CLIP, "video_frames": 13}, "video_frames is 13 and the clip has 11 at 16 fps: ask for "
         "fewer"),
        ({"video": small_models.CLIP, "num_frames": 9}, "num_frames is 9, and the video begins with what is "
         "given, 9: ask for more"),
        ({"image": small_models.CLIP}, "image must be a file, or uint8 [H,W,3], got uint8 [11, 20, 30, 3]"),
        ({"image": small_models.PICTURE.float()}, "image must be a file, or uint8 [H,W,3], got float32 [40, 70, 3]"),
        ({"video": 5}, "video must be a file, or uint8 [T,H,W,3], got int64 []"),
        ({"image": "no/such.png"}, "cannot read no/such.png: it is not a file"),
        ({"image": "picture.txt"}, "cannot read picture.txt: a name ending in .mp4, .m4v, .mov, .mkv, .webm, .jpg, "
         ".jpeg, .avi, .gif, .png, .bmp, .webp is expected"),
    ],
)  # fmt: skip
def test_what_a_video_cannot_begin_with_is_one_sentence(engines, options: dict[str, Any], sentence: str) -> None:
    asked = {"num_frames": 30, **options_of("wan"), **options}
    assert refusal(lambda: engines["wan"].resolve(PROMPT, **asked), MigaError) == sentence


def test_a_clip_is_no_picture(engines, tmp_path: Path) -> None:
    with open_sink(tmp_path / "clip.mkv", "16", 30, 20) as sink:
        sink.write(small_models.CLIP)
    asked = options_of("wan", image=tmp_path / "clip.mkv")
    assert refusal(lambda: engines["wan"].resolve(PROMPT, 30, **asked), ConfigError).endswith(
        "clip.mkv holds more than one picture: give it as the video"
    )


def test_reference_sigma_is_of_flow_models(engines) -> None:
    options = options_of("videocrafter2")
    miga = dataclasses.replace(options["miga"], reference_sigma=0.02)
    sentence = refusal(lambda: engines["videocrafter2"].resolve(PROMPT, 9, **{**options, "miga": miga}), ConfigError)
    assert sentence == "reference_sigma is 0.02 for solver 'ddim': it belongs to flow models, leave it out"


def test_a_search_of_a_model_of_two_networks_stays_with_the_first(engines) -> None:
    miga = dataclasses.replace(golden_model.MIGA, judge_step=4, reference_groups=1)
    options = {**options_of("experts", miga=miga, num_inference_steps=10), "shift": 1.0}
    sentence = refusal(lambda: engines["experts"].resolve(PROMPT, 30, **options), ConfigError)
    assert sentence.startswith("judge_step 4 lies behind step 2, from which on the model's second network denoises")
    lone = refusal(lambda: engines["wan"].resolve(PROMPT, 30, **options_of("wan"), guidance_scale_low=2.0), ConfigError)
    assert lone == "guidance_scale_low is 2, and this model has one network: leave it out"
    low = [engines["experts"].resolve(PROMPT, 30, **options_of("experts"), **given).guidance_scale_low
           for given in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_scale_low": 1.5})]  # fmt: skip
    assert low == [3.0, None, 1.5]


def test_a_condition_of_a_kind_that_a_model_does_not_know_is_refused(engines) -> None:
    condition = Condition("depth", 1, frames=small_models.PICTURE[None])
    sentence = refusal(
        lambda: engines["wan"].resolve(PROMPT, 30, **options_of("wan"), condition=condition), ConfigError
    )
    assert sentence.startswith("this model begins no video with 1 frames of kind 'depth'")
