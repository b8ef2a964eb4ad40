"""What README and docs/ tell a reader to type: README's blocks are run, in its order and in one folder; the rest is
parsed, and every file that is named exists."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_model
import numpy as np
import pytest
import random_wan
import torch
from safetensors.torch import load_file, save_file

from miga_engine.cli import main, render
from miga_engine.cli.main import _build_parser
from miga_engine.embed import HEADER
from miga_engine.errors import ConfigError
from miga_engine.integrations.server.serve import Server
from miga_engine.presets import PRESETS
from miga_engine.runtime.session import load_session
from miga_engine.video.png import encode_png
from miga_engine.video.reading import read_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "THIRD_PARTY.md", *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md"),
                *ROOT.glob("miga_engine/**/*.md")])  # fmt: skip
PROGRAMS = ("miga", "make", "torchrun", "python", "python3", "pip", "bash")

# Of README's blocks: what is there → what is run. Each must be found, so that none outlives its line.
SMALL = (
    "--num-frames 9 --height 32 --width 48 --num-inference-steps 8 --zigzag-width 2 --stage2-steps 2 "
    "--guidance-frames 1 --stride 2 --judge-step 2"
)
SHORTER_SHELL = {
    "--num-frames 480": "--num-frames 81",
    "--prompt-at 160": "--num-frames 25 --prompt-at 9",
    "--prompt-blend-frames 32": "--prompt-blend-frames 8",
    "--num-frames 1000 --height 480 --width 832": SMALL,
    "--model ComfyUI": f"--model ComfyUI {SMALL}",
    "--download": f"--download {SMALL}",
    "--num-frames 2000": "--num-frames 97",
    "--image picture.png": "--image picture.png --num-frames 9",
    "--video kite.mp4": "--video kite.mp4 --num-frames 61",
    "--window-batch 4": "--window-batch 4 --zigzag-width 2 --guidance-frames 1 --stride 2",
    "miga serve": "miga serve --port 0",
    "miga batch jobs.jsonl": "miga batch jobs.jsonl --num-inference-steps 8 --stage2-steps 2 --judge-step 2",
    "torchrun --nproc-per-node 2": "torchrun --standalone --nproc-per-node 2",
    '-m miga_engine generate "…"': '-m miga_engine generate "…" --num-frames 9 --num-inference-steps 8 '
    "--zigzag-width 2 --stage2-steps 2 --judge-step 2",
    '"…"': '"a kite"',
}
SHORTER_PYTHON = {
    "num_frames=240": "num_frames=9",
    "num_frames=100_000": "num_frames=33",
    "save_every(500": "save_every(9",
}
FEW_STEPS: dict[str, Any] = {"zigzag_width": 2, "stage2_steps": 2, "guidance_frames": 1, "stride": 6, "judge_step": 2}


def _shell_lines(text: str) -> list[str]:
    """Of the indented blocks, with lines that go on joined; the diagram of README is none."""
    joined = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    joined = re.sub(r"\\ *(#.*)?\n +", "", re.sub(r"  +#.*$", "", joined, flags=re.MULTILINE))
    blocks = re.findall(r"(?:(?<=\n\n)|(?<=^))((?:    \S.*\n)+)", joined)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if not line.startswith(("#", "CLI / API"))]


def _fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _spans(text: str) -> list[str]:
    """What stands between single backticks, on one line or over two."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def _replaced(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def _is_command(span: str) -> bool:
    program, *arguments = span.split()
    is_script = program.startswith("bench/") and program.endswith((".py", ".sh"))
    return is_script or (program in PROGRAMS and bool(arguments))


# Parsing -------------------------------------------------------------------------------------------------------


def _check_command(line: str) -> None:
    """That a command could be given: its program exists, and takes these options."""
    words = shlex.split(re.sub(r"^[A-Z_]+=(\$\([^)]*\)|\S+)\s+", "", line), comments=True)
    words = [word for word in words if word != "…"]
    if words[:1] == ["torchrun"]:
        words = ["python", *words[words.index("-m") :]]
    if words[:3] == ["python", "-m", "miga_engine"]:
        words = ["miga", *words[3:]]
    program, *arguments = words
    if program == "miga":
        _check_parsed(_build_parser(), arguments)
    elif program == "make":
        (target,) = arguments
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program == "python" and arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found is not None, line
        if found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{arguments[1]}.__main__")
            assert found is not None, line
        assert found.origin is not None
        if arguments[1].startswith("bench."):
            _check_parsed(importlib.import_module(arguments[1]).build_parser(), arguments[2:])
        else:
            _check_script(Path(found.origin), arguments[2:])
    elif program == "python":
        _check_script(ROOT / arguments[0], arguments[1:])
    elif program.startswith("bench/"):
        _check_script(ROOT / program, arguments)
    else:
        raise AssertionError(f"no rule of tests/test_readme.py covers the command {line!r}")


def _check_parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    try:
        parser.parse_args(arguments)
    except SystemExit as exit:  # --help
        if exit.code:
            raise
    except ConfigError as error:
        if "the following arguments are required" not in str(error):  # as a part of a command lacks them
            raise


def _check_script(path: Path, arguments: list[str]) -> None:
    """That a script takes the options, by what it gives to argparse, and knows the words."""
    source = path.read_text(encoding="utf-8")
    known: set[str] = set()
    if path.suffix == ".py":
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
        known = {value.value for call in added for value in call.args if isinstance(value, ast.Constant)}
    for word in arguments:
        if word.startswith("--"):
            assert word in known, f"{path.name} does not take {word}"
        elif word.isidentifier():
            assert re.search(rf"\b{word}\b", source), f"{path.name} does not know {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_can_be_given(page: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["miga"])
    text = page.read_text(encoding="utf-8")
    for line in [*_shell_lines(text), *filter(_is_command, _spans(text))]:
        _check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [span for span in _spans(text) if re.fullmatch(r"(bench|tests|csrc|docs|kernels)/[\w./*-]+\.\w+", span)]
    for name in named:
        assert list(ROOT.glob(name)), name
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "line",
    ["miga generate --num-frame-count 3", "miga remake kite.mp4", "miga resume kite.safetensors --seed 3",
     "miga eval ablation --folder open", "python -m bench.study.ablation --folder open --weather rain",
     "make everything", "python bench/absent.py",
     "python bench/soak.py --frames 3", "python bench/bench_savings.py --fast", "python bench/sheets.py short",
     "python -m miga_engine.absent", "bench/gpu.sh fourth", "pip install miga", "torchrun -m miga_engine render 'x'"],
)  # fmt: skip
def test_a_command_that_cannot_be_given_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, ConfigError, OSError, ModuleNotFoundError)):
        _check_command(line)


# Running -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what README's lines take for granted: models by their names, and a file of options. `tiny` takes
    few steps."""
    model = golden_model.build(tmp_path / "model")
    weights = golden_model.build_videocrafter2(tmp_path / "weights") / "model.safetensors"
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "run.yaml").write_text("prompt: a kite\nnum_frames: 9\n")
    (folder / "jobs.jsonl").write_text('{"prompt": "a kite", "num_frames": 9}\n')
    (folder / "picture.png").write_bytes(encode_png(np.full((80, 60, 3), 90, np.uint8), ""))
    for size in ("1.3B", "14B"):
        (folder / f"Wan2.1-T2V-{size}").symlink_to(model)
    torch.save({"state_dict": load_file(weights)}, folder / "model.ckpt")
    shutil.copy(random_wan.TOKENIZER, random_wan.comfy(folder / "ComfyUI"))
    pair = {"A": torch.ones(2, 128), "B": torch.ones(128, 2)}
    module = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{module}.lora_{part}.weight": value for part, value in pair.items()}, folder / "style.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(model))
    monkeypatch.chdir(folder)
    preset = PRESETS["tiny"]
    sampling = dataclasses.replace(preset.sampling, num_inference_steps=8)
    fewer = dataclasses.replace(preset, sampling=sampling, miga=dataclasses.replace(preset.miga, **FEW_STEPS))
    monkeypatch.setitem(PRESETS, "tiny", fewer)
    return folder


@pytest.mark.slow
def test_the_shell_block_is_run_line_for_line(scratch: Path, monkeypatch, capsys) -> None:
    """In README's order: the first resume finds a run that was interrupted, the second one that is complete."""
    lines = [line for line in _shell_lines(README) if not line.startswith("make ")]
    text = "\n".join(lines)
    assert all(old in text for old in SHORTER_SHELL), "a line of README is no longer there"
    lines = _replaced(text, SHORTER_SHELL).splitlines()
    assert sum(line.startswith("miga resume") for line in lines) == 2
    for number, line in enumerate(lines):
        words = shlex.split(line, comments=True)
        if number == 0:  # Ctrl-C, and a power cut would do
            with monkeypatch.context() as patch:
                patch.setattr(render.EncoderThread, "write", _interrupting(render.EncoderThread.write))
                assert main(words[1:]) == 128 + signal.SIGINT, line
            assert 0 < len(read_video("kite.mp4")) < 81
            assert ": miga resume kite.session.safetensors\n" in capsys.readouterr().err
        elif words[0] == "miga":
            with monkeypatch.context() as patch:
                patch.setattr(Server, "run", _stopping(Server.run))
                code = main(words[1:])
            told = capsys.readouterr()
            assert code == 0, f"{line}: {told.err}"
        elif words[0] == "torchrun":
            run = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(run, capture_output=True, text=True, timeout=150, env=environment, check=False)
            assert done.returncode == 0, f"{line}: {done.stderr}"
        else:
            raise AssertionError(f"no rule of tests/test_readme.py runs {line!r}")
        if words[:2] == ["miga", "resume"]:
            wanted = 97 if "--num-frames" in words else 81
            assert len(read_video("kite.mp4")) == wanted, line
            assert load_session("kite.session.safetensors").request["num_frames"] == wanted
    for name in ("balloon", "wan", "fifo", "style", "hub", "miga", "begun", "goes_on"):
        assert len(read_video(f"{name}.mp4")) == {"balloon": 25, "goes_on": 61}.get(name, 9)
    assert (scratch / "VideoCrafter2.safetensors").exists()
    assert (scratch / "eval.png").exists()


def _interrupting(write: Callable[..., Any]) -> Callable[..., Any]:
    def interrupted(self: Any, frames: Any) -> None:
        write(self, frames)
        signal.raise_signal(signal.SIGINT)

    return interrupted


def _stopping(run: Callable[[Server], None]) -> Callable[[Server], None]:
    def stopped(self: Server) -> None:
        threading.Timer(0.2, self.stop).start()
        run(self)

    return stopped


class _EnoughError(Exception):
    pass


@pytest.mark.slow
def test_the_python_blocks_are_run(scratch: Path) -> None:
    shown: list[torch.Tensor] = []

    def show(frames: torch.Tensor) -> None:
        shown.append(frames)
        if len(shown) == 3:
            raise _EnoughError

    blocks = _fenced("python")
    assert all(any(old in block for block in blocks) for old in SHORTER_PYTHON), "a line of README is no longer there"
    names: dict[str, Any] = {"show": show}
    for block in blocks:
        try:
            exec(compile(_replaced(block, SHORTER_PYTHON), "README.md", "exec"), names)
        except _EnoughError:
            names.pop("chunk")
    assert names["video"].frames.shape == (9, 64, 96, 3)
    assert len(read_video("balloon.mp4")) == 9
    assert sum(map(len, shown[3:])) == 33
    assert all(frames.dtype == torch.uint8 and frames.shape[1:] == (64, 96, 3) for frames in shown)
    assert names["chunk"].first_frame + len(names["chunk"].frames) == 33
    assert names["stream"].is_resumed


def test_the_c_block_compiles(tmp_path: Path) -> None:
    (block,) = _fenced("c")
    source = '#include "miga_embed.h"\nvoid show(const unsigned char *);\nint main(void) {\n'
    source += f"static unsigned char pixels[64 * 96 * 3];\n{block}return 0;\n}}\n"
    (tmp_path / "host.c").write_text(source)
    flags = ["-x", "c", "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{HEADER.parent}"]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, tmp_path / "host.c"], check=True)


def test_no_block_is_left_out() -> None:
    opening = re.findall(r"^```(\w*)$", README, re.MULTILINE)[::2]
    assert set(opening) == {"python", "c"}
    for line in _shell_lines(README):
        assert shlex.split(line)[0] in ("miga", "make", "torchrun"), line
