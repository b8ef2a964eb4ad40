"""The miga command as its user meets it: exit codes, sentences, files left behind and not left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import golden_model
import numpy as np
import pytest

from miga_engine import ConfigError
from miga_engine.cli import main
from miga_engine.cli.config_file import RELEASED_NAMES, read_config
from miga_engine.cli.main import _build_parser, _hyphenate
from miga_engine.cli.settings import read_settings, video_options
from miga_engine.video.reading import read_metadata, read_video

SMALL = ["--height", "32", "--width", "48", "--num-inference-steps", "8", "--zigzag-width", "2", "--stage2-steps", "3",
         "--guidance-frames", "1", "--stride", "2", "--judge-step", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


def _miga(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_generate_writes_video_sheet_and_events(folder, tmp_path, capsys):
    video, sheet, events = tmp_path / "video.mp4", tmp_path / "sheet.png", tmp_path / "events.jsonl"
    arguments = ["--num_frames", 30, "--seed=7", "--prompt-at", 20, "a blue balloon", "--quiet", *SMALL]
    arguments += ["-o", video, "--contact-sheet", sheet, "--events", events]
    assert _miga("generate", "a red balloon", "--model", folder, *arguments) == 0
    told = capsys.readouterr().err
    assert "30 frames, 48×32, 16 fps" in told
    assert re.search(r"^memory: \S+ [MG]iB at most \(estimated \S+ [MG]iB\)$", told, re.MULTILINE)
    assert read_video(video).shape == (30, 32, 48, 3)
    metadata = read_metadata(video)
    assert metadata["prompt"] == {"0": "a red balloon", "20": "a blue balloon"}
    assert (metadata["seed"], metadata["miga"]["zigzag_width"]) == (7, 2)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    kinds = {json.loads(line)["event"] for line in events.read_text().splitlines()}
    assert {"stage", "score", "chunk"} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize(("fps", "recorded"), [("29.97", "2997/100"), ("24000/1001", "24000/1001"), ("6", 6)])
def test_the_rate_may_be_a_fraction(folder, tmp_path, capsys, fps, recorded):
    video, saved = tmp_path / "video.mp4", tmp_path / "video.session.safetensors"
    arguments = ["--model", folder, "--num-frames", 9, "--fps", fps, "-o", video, "-q", *SMALL]
    assert _miga("generate", "a red balloon", *arguments, "--checkpoint-every", 1) == 0
    assert _miga("resume", saved, "--model", folder, "--num-frames", 17, "-q") == 0
    assert f"{recorded} fps" in capsys.readouterr().err
    assert read_metadata(video)["fps"] == recorded
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == Fraction(recorded)


@pytest.mark.slow
def test_videocrafter2_folder_makes_a_video(tmp_path, capsys):
    model = golden_model.build_videocrafter2(tmp_path / "model")
    size = ["--height", 8, "--width", 16, "--num-inference-steps", 7]
    method = ["--zigzag-width", 2, "--stage2-steps", 3, "--guidance-frames", 1, "--stride", 2, "--judge-step", 2]
    method += ["--reference-groups", 1, "--candidates", 2]
    video = tmp_path / "video.mkv"
    arguments = ["--model", model, "--num-frames", 7, "-o", video, "-q", *size, *method]
    assert _miga("generate", "a red balloon", *arguments) == 0
    told = capsys.readouterr().err
    assert "7 frames, 16×8, 10 fps" in told
    assert re.search(r"^memory: \S+ [MG]iB at most \(estimated \S+ [MG]iB\)$", told, re.MULTILINE)
    assert read_video(video).shape == (7, 8, 16, 3)
    assert (read_metadata(video)["solver"], read_metadata(video)["use_scale_array"]) == ("ddim", True)


@pytest.mark.slow
def test_fifo_method_and_no_flags(folder, tmp_path):
    video = tmp_path / "video.mkv"
    arguments = ["--height", 32, "--width", 48, "--num-inference-steps", 8]
    assert (
        _miga("generate", "x", "--model", folder, "--method", "fifo", "--num-frames", 17, "-o", video, "-q", *arguments)
        == 0
    )
    recorded = read_metadata(video)["miga"]
    assert (recorded["zigzag_width"], recorded["commit"], recorded["self_reflection"]) == (1, "trailing", False)


@pytest.mark.slow
def test_config_file_with_released_names_and_flags_that_override(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"prompt: {{0: a kite, 12: a bird}}\nckpt_dir: {folder}\nframe_num: 21\nsample_steps: 10\nsaw_width: 2\n"
        "stage2-steps: 3\nmem_frames: 1\nslide_size: 2\njudge_step: 3\nthreshold: 0.5\nbase_seed: 3\n"
        "height: 32\nwidth: 48\n"
    )
    video = tmp_path / "video.mkv"
    assert _miga("generate", "--config", config, "--seed", 4, "--no-self-reflection", "-o", video, "-q") == 0
    metadata = read_metadata(video)
    assert metadata["num_frames"] == 21
    assert metadata["seed"] == 4
    assert metadata["miga"]["score_drop"] == 0.5
    assert metadata["miga"]["self_reflection"] is False
    assert metadata["prompt"] == {"0": "a kite", "12": "a bird"}


def test_released_names_lead_to_options_that_exist():
    help_text = subprocess.run(
        [sys.executable, "-m", "miga_engine", "generate", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in set(RELEASED_NAMES.values()):
        assert "--" + name.replace("_", "-") in help_text or f"--no-{name.replace('_', '-')}" in help_text


class _Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", ""], "the prompt is empty at frame 0"),
        (["generate"], "there is no prompt"),
        (
            ["generate", "x", "--num-frames", "-5"],
            "num_frames must be a whole number of at least 1 (video frames), got -5",
        ),
        (["generate", "x", "--num-frames", "many"], "argument --num-frames: invalid int value: 'many'"),
        (["generate", "x", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate", "x", "--width", "100"], "width must be a multiple of 16 pixels, got 100; use 96 or 112"),
        (["generate", "x", "--model", "{tmp}/missing"], "there is no model at '{tmp}/missing'"),
        (["generate", "x", "--model", "{tmp}/truncated"], "{tmp}/truncated/diffusion_pytorch_model.safetensors"),
        (["generate", "x", "--model", "{tmp}/pickled"], "{tmp}/pickled/Wan2.1_VAE.pth"),
        (["generate", "x", "-o", "{tmp}/nowhere/video.mp4"], "the folder {tmp}/nowhere does not exist"),
        (["generate", "x", "-o", "{tmp}/video.gif"], "the suffix '.gif' is not one of"),
        (["generate", "x", "-o", "{tmp}/old.mp4"], "cannot write {tmp}/old.mp4: it exists already"),
        (["generate", "x", "--contact-sheet", "{tmp}/old.mp4"], "the suffix '.mp4' is not one of .png"),
        (["generate", "x", "--config", "{tmp}/missing.yaml"], "--config {tmp}/missing.yaml cannot be read"),
        (["generate", "x", "--config", "{tmp}/bad.yaml"], "--config {tmp}/bad.yaml is not valid YAML"),
        (["generate", "x", "--config", "{tmp}/unknown.yaml"], "has an unknown option 'zoom'"),
        (["generate", "x", "--prompt-at", "soon", "y"], "--prompt-at needs a video frame number"),
        (["generate", "x", "--prompt-at", "0", "y"], "frame 0 has two prompts: 'x' and 'y'"),
        (["generate", "x", "--device", "xpu:3"], "device 'xpu:3' is not available here"),
        (["generate", "x", "--stage2-steps", "60"], "stage2_steps 60 leaves Stage 1"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(arguments, sentence, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.mp4").write_bytes(b"precious")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    (tmp_path / "unknown.yaml").write_text("zoom: 3")
    truncated = golden_model.build(tmp_path / "truncated") / "diffusion_pytorch_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:5000])
    pickled = golden_model.build(tmp_path / "pickled")
    (pickled / "Wan2.1_VAE.safetensors").unlink()
    (pickled / "Wan2.1_VAE.pth").write_bytes(pickle.dumps(_Payload()))
    before = sorted(path for path in tmp_path.rglob("*"))
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    if filled[:1] == ["generate"] and "--model" not in filled:
        filled += ["--model", str(folder)]
    assert _miga(*filled) == 2
    message = capsys.readouterr().err
    assert sentence.format(tmp=tmp_path) in message
    assert message.startswith("miga: ")
    assert message.count("\n") == 1, message
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "old.mp4").read_bytes() == b"precious"


@pytest.mark.slow
def test_interrupt_ends_cleanly_with_what_is_there(folder, tmp_path):
    video = tmp_path / "video.mp4"
    process = subprocess.Popen(
        [sys.executable, "-m", "miga_engine", "generate", "x", "--model", str(folder), "--num-frames", "100000",
         "-o", str(video), *SMALL],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (video.exists() and video.stat().st_size > 5000) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted" in message
    assert "Traceback" not in message
    frames = read_video(video)
    assert f"holds the {len(frames)} frames made so far" in message
    assert np.isfinite(frames).all()


@pytest.mark.slow
def test_overwrite_replaces_only_when_done(folder, tmp_path):
    video = tmp_path / "video.mp4"
    video.write_bytes(b"precious")
    arguments = ["generate", "x", "--model", folder, "--num-frames", 9, "-o", video, "-q", *SMALL]
    assert _miga(*arguments) == 2
    assert video.read_bytes() == b"precious"
    assert _miga(*arguments, "--overwrite") == 0
    assert len(read_video(video)) == 9


@pytest.mark.slow
def test_estimate_takes_the_options_of_generate(folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("sample_steps: 10\nwindow_batch: 2\n")
    assert _miga("estimate", "--model", folder, "--config", config, "--device", "cuda", *SMALL) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0] == "on cuda, all the time"
    assert re.search(r"^total on cuda +\d", table, re.MULTILINE)
    assert _miga("estimate", "--model", folder, "--method", "fifo", "--device", "cpu", *SMALL[:6]) == 0
    assert "total on cpu" not in capsys.readouterr().out
    assert _miga("estimate", "--model", folder, "--width", 100) == 2
    assert "width must be a multiple of 16 pixels" in capsys.readouterr().err


def test_info(folder, tmp_path, capsys):
    assert _miga("info") == 0
    assert "C++ kernels" in capsys.readouterr().out
    assert _miga("info", folder) == 0
    assert "5 latent frames = 17 video frames" in capsys.readouterr().out
    assert _miga("info", tmp_path / "missing") == 2


@pytest.mark.slow
def test_two_ranks_write_the_video_of_one(folder, tmp_path):
    """As `torchrun --nproc-per-node 2 -m miga_engine generate …` does, on CPUs."""
    options = ["a red balloon", "--model", str(folder), "--num-frames", "13", "--quiet", *SMALL]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, launcher in (("one.mkv", [sys.executable]), ("two.mkv", torchrun)):
        program = [*launcher, "-m", "miga_engine", "generate", *options, "--output", str(tmp_path / name)]
        run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=150, check=False)
        assert run.returncode == 0, run.stderr
    one, two = (read_video(tmp_path / name) for name in ("one.mkv", "two.mkv"))
    assert len(one) == 13
    assert np.array_equal(one, two)


MIGA_AND_ITS_THREADS = """
import os, pathlib, sys
from miga_engine.cli import main
code = main(sys.argv[2:])
names = [task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(f"{code} {[name for name in names if 'gloo' in name]}")
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("is_taken", "code"), [(False, 0), (True, 2)])
def test_a_rank_leaves_its_group_whole(folder, tmp_path, is_taken, code):
    """A thread of the group that outlives it may meet the interpreter's end, which aborts: a good run would exit 1."""
    script, video = tmp_path / "miga.py", tmp_path / "video.mkv"
    script.write_text(MIGA_AND_ITS_THREADS)
    if is_taken:
        video.write_bytes(b"mine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    options = ["generate", "a red balloon", "--model", folder, "--num-frames", "9", "-q", *SMALL, "--output", video]
    program = [sys.executable, script, tmp_path, *options]
    ranks = [subprocess.Popen(program, env=environment | {"RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=150) for rank in ranks] == [code, code]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [f"{code} []"] * 2


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def _settings_of(*arguments: object) -> dict[str, object]:
    return read_settings(_build_parser().parse_args([_hyphenate(str(a)) for a in ("generate", *arguments)]))


def test_the_command_lines_of_the_releases_are_understood(caplog) -> None:
    settings = _settings_of(
        *[
            "--task",
            "t2v-1.3B",
            "--size",
            "832*480",
            "--base_seed",
            "42",
            "--sample_steps",
            "50",
            "--ckpt_dir",
            "here",
            "--sample_shift",
            "8",
        ],
        *[
            "--sample_guide_scale",
            "6",
            "--frame_num",
            "81",
            "--offload_model",
            "True",
            "--t5_cpu",
            "--ulysses_size",
            "1",
        ],
        *("--sample_solver", "dpm++", "--prompt", "A cat", "--save_file", "cat.mp4"),
    )
    expected = {"width": 832, "height": 480, "seed": 42, "num_inference_steps": 50, "model": "here", "shift": 8}
    expected |= {"guidance_scale": 6, "num_frames": 81, "solver": "dpmpp_2m", "prompt": "A cat", "output": "cat.mp4"}
    assert {name: settings[name] for name in expected} == expected
    assert "offload_model, t5_cpu, ulysses_size: these options of a release decide nothing" in caplog.text


def test_values_of_released_flags_are_read_by_their_kind() -> None:
    settings = _settings_of("--t5_cpu", "--prompt", "2024", "--ckpt_dir", "7", "--involve_resample", "false")
    assert (settings["prompt"], settings["model"], settings["self_reflection"]) == ("2024", "7", False)
    assert _settings_of("--t5_cpu", "a cat")["prompt"] == "a cat"


def test_a_seed_of_minus_one_is_drawn_and_said(caplog) -> None:
    drawn = [_settings_of("x", "--base_seed", "-1")["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert all(f"the seed -1 asks for any: it is {seed}" in caplog.text for seed in drawn)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "i2v-14B"], "gives task as 'i2v-14B': t2v-1.3B, t2v-14B, t2v-A14B, ti2v-5B are to be had"),
        (["--size", "big"], "gives size as 'big': give width*height"),
        (["--last_frame", "a.png"], "gives last_frame, which is not to be had: a video begins with --image"),
        (["--ulysses_size", "4"], "gives ulysses_size as 4: start miga with torchrun instead"),
        (["--use_prompt_extend"], "gives use_prompt_extend, which is not to be had"),
        (["--frame_num", "9", "--num-frames", "5"], "num_frames is given twice, once as --frame_num"),
    ],
)
def test_what_a_release_has_and_we_have_not_is_refused(arguments, sentence, capsys) -> None:
    assert main(["generate", "x", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_configurations_of_the_releases_are_read(tmp_path: Path, caplog) -> None:
    """MIGA's own file has a heading; in FIFO-Diffusion's, video_length is the window."""
    miga = tmp_path / "miga.yaml"
    miga.write_text(
        "miga:\n  sampling_steps: 54\n  saw_width: 7\n  long_iter_nums: 20\n  temporal_memory_len: 4\n"
        "  involve_resample: true\n  resample_threshold: 0.001\n  save_inter_results: false\n"
    )
    assert read_config(str(miga)) == {
        "num_inference_steps": 54, "zigzag_width": 7, "long_iter_nums": 20, "guidance_frames": 4,
        "self_reflection": True, "score_drop": 0.001,
    }  # fmt: skip
    assert "save_inter_results: these options" in caplog.text
    fifo = tmp_path / "fifo.yaml"
    fifo.write_text("video_length: 16\nnum_partitions: 4\nnew_video_length: 100\nnum_inference_steps: 16\neta: 1.0\n")
    assert read_config(str(fifo)) == {"num_inference_steps": 64, "num_frames": 100, "eta": 1.0}


def test_the_length_in_groups_is_that_of_the_release(folder) -> None:

    options = video_options({"model": str(folder), "long_iter_nums": 5, "zigzag_width": 2})
    assert options["num_frames"] == 1 + 4 * 9  # ten latent frames


@pytest.mark.parametrize("text", ["seed: 1\nheight: 64\nseed: 2\n", "miga:\n  seed: 1\n  seed: 2\n"])
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"gives 'seed' twice, again at line 3: keep one"):
        read_config(str(path))
