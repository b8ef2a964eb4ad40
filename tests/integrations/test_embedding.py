"""What an application that embeds the engine can count on: no output, no global state, threads, memory, exceptions."""

from __future__ import annotations

import ast
import gc
import inspect
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_model
import numpy as np
import pytest
import torch
import torch.utils.dlpack
from places import ROOT

import miga_engine
from miga_engine import Engine, MigaError, errors

OPTIONS = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
PROMPT = "a red balloon"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine.from_pretrained(folder)


# Output and global state -----------------------------------------------------------------------------------------

HOST = """
import json, locale, logging, os, random, signal, sys, threading, warnings
import av, ftfy, numpy, safetensors.torch, tokenizers, torch  # what they change when imported is theirs

def state():
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "random numbers": (torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision": (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, cudnn.allow_tf32,
                      cudnn.benchmark, cudnn.deterministic, mkldnn.enabled),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "root logger": (logging.root.handlers[:], logging.root.level, logging.root.disabled),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, sys.displayhook),
        "imports": sys.path[:],
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": (os.getcwd(), os.listdir()),
        "running threads": [thread.name for thread in threading.enumerate()],
    }

before = state()
import golden_model
from miga_engine import Engine, MigaError
changed = {"import": [name for name, value in state().items() if value != before[name]]}
folder, report = sys.argv[1:]
engine = Engine.from_pretrained(folder)
options = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
engine.generate("a red balloon", 20, overlap_decode=True, **options)
with engine.stream("a red balloon", **options) as stream:
    next(stream)
    during = [name for name, value in state().items() if value != before[name]]
    stream.save(os.path.join(folder, "run.safetensors"))
with engine.resume(os.path.join(folder, "run.safetensors")) as stream:
    next(stream)
try:
    engine.stream("", **options)
except MigaError:
    pass
changed["between chunks"] = during
changed["run"] = [name for name, value in state().items() if value != before[name]]
logging.getLogger("miga_engine").warning("for those who listen")
with open(report, "w") as file:
    json.dump(changed, file)
"""


@pytest.mark.slow
def test_neither_output_nor_global_state(folder, tmp_path):
    (tmp_path / "cwd").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", HOST, folder, tmp_path / "report.json"], cwd=tmp_path / "cwd", capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    changed = json.loads((tmp_path / "report.json").read_text())
    assert changed == {"import": [], "between chunks": [], "run": []}


@pytest.mark.slow
def test_only_programs_print():
    """The command, and those that make docs/options.md and the C library."""
    for path in ROOT.glob("miga_engine/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            is_program = path.parent.name == "cli" or path.name in ("options.py", "__main__.py")
            assert not is_print or is_program, f"{path}:{node.lineno}"


def test_log_records_reach_those_who_ask():
    logger = logging.getLogger("miga_engine")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert logger.propagate
    assert logger.level == logging.NOTSET


# Exceptions ------------------------------------------------------------------------------------------------------


def test_every_exception_has_one_base_and_is_exported():
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)]
    assert len(classes) >= 7
    for each in classes:
        assert issubclass(each, MigaError)
        assert getattr(miga_engine, each.__name__) is each


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda engine, path: Engine.from_pretrained(path / "absent"),
        lambda engine, path: Engine.from_pretrained(path),
        lambda engine, path: Engine.from_pretrained("tiny", "cuda:99"),
        lambda engine, path: Engine.from_pretrained("tiny", dtype="int3"),
        lambda engine, path: engine.stream("", **OPTIONS),
        lambda engine, path: engine.stream(PROMPT, 0, **OPTIONS),
        lambda engine, path: engine.stream(PROMPT, 9, chunk_frames=0, **OPTIONS),
        lambda engine, path: engine.generate(PROMPT, 9, seed=-1, **OPTIONS),
        lambda engine, path: engine.generate(PROMPT, 1, **OPTIONS).save(path / "video.txt"),
        lambda engine, path: engine.generate(PROMPT, 1, **OPTIONS).save(path / "absent" / "video.mkv"),
        lambda engine, path: engine.resume(path / "absent.safetensors"),
        lambda engine, path: engine.stream(PROMPT, 9, **OPTIONS).save(path / "absent" / "run.safetensors"),
        lambda engine, path: miga_engine.MigaConfig(zigzag_width=0),
    ],
)
def test_what_a_caller_can_do_wrong_raises_miga_error(engine, tmp_path, call):
    with pytest.raises(MigaError) as raised:
        call(engine, tmp_path)
    assert str(raised.value)
    assert "\n" not in str(raised.value)


# Frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [None, 1, 7])
def test_frames_are_shared_without_a_copy(engine, chunk_frames):
    for chunk in engine.stream(PROMPT, 20, chunk_frames=chunk_frames, **OPTIONS):
        place = chunk.frames.data_ptr()
        assert chunk.frames.is_contiguous()
        assert not chunk.frames.requires_grad
        assert torch.utils.dlpack.from_dlpack(chunk.frames).data_ptr() == place
        assert torch.from_dlpack(chunk.frames.__dlpack__()).data_ptr() == place
        assert np.from_dlpack(chunk.frames).ctypes.data == place


@pytest.mark.slow
def test_frames_that_were_given_out_are_the_callers(engine):
    """Writing into a chunk, or keeping it, does not reach into the run."""
    whole = engine.generate(PROMPT, 20, **OPTIONS).frames
    kept = []
    for chunk in engine.stream(PROMPT, 20, chunk_frames=2, **OPTIONS):
        kept.append(chunk.frames.clone())
        chunk.frames.zero_()
    assert torch.equal(torch.cat(kept), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("overlap_decode", [False, True])
def test_frames_are_ready_on_the_callers_stream(folder, overlap_decode):
    engine = Engine.from_pretrained(folder, "cuda", "float32")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    device = torch.cuda.current_device()
    expected = engine.generate(PROMPT, 20, overlap_decode=False, **OPTIONS).frames
    for _ in range(3):
        copies = []
        with torch.cuda.stream(side):
            for chunk in engine.stream(PROMPT, 20, overlap_decode=overlap_decode, **OPTIONS):
                copies.append(chunk.frames.clone())  # in the caller's stream, which nobody synchronises
                assert torch.cuda.current_stream() == side
                del chunk
        assert torch.cuda.current_device() == device
        assert torch.equal(torch.cat(copies).cpu(), expected)


# Threads ---------------------------------------------------------------------------------------------------------


def _generate(engine: Engine, family: golden_model.Family, overlap_decode: bool) -> torch.Tensor:
    return engine.generate(PROMPT, family.num_frames, overlap_decode=overlap_decode, **family.options).frames


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[tuple[Engine, golden_model.Family, torch.Tensor]]:
    """An engine of each family, and what it gives when it is alone."""
    found = []
    for name, family in golden_model.FAMILIES.items():
        engine = Engine.from_pretrained(family.build(tmp_path_factory.mktemp(name)))
        found.append((engine, family, _generate(engine, family, False)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("overlap_decode", [False, True])
def test_two_engines_in_two_threads_give_the_frames_of_one_after_the_other(alone, overlap_decode):
    with ThreadPoolExecutor(len(alone)) as pool:
        together = [pool.submit(_generate, engine, family, overlap_decode) for engine, family, _ in alone]
    assert all(torch.equal(future.result(), frames) for future, (_, _, frames) in zip(together, alone, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("overlap_decode", [False, True])
def test_cancel_from_another_thread(engine, overlap_decode):
    event, has_begun = threading.Event(), threading.Event()
    options = {**OPTIONS, "overlap_decode": overlap_decode, "is_cancelled": event.is_set}
    stream = engine.stream(PROMPT, **options)  # endless

    def cancel() -> None:
        assert has_begun.wait(60)
        event.set()

    thread = threading.Thread(target=cancel)
    thread.start()
    frames = []
    for chunk in stream:
        frames.append(chunk.frames)
        if len(frames) == 3:
            has_begun.set()
    thread.join()
    made = torch.cat(frames)
    again = engine.stream(PROMPT, chunk_frames=len(made), **OPTIONS)
    assert torch.equal(next(again).frames, made)  # what came out is the beginning of the video, whole
    assert next(stream, None) is None


# Memory ----------------------------------------------------------------------------------------------------------


def _tensors() -> list[torch.Tensor]:
    return [each for each in gc.get_objects() if type(each) is torch.Tensor]


def _begin(engine: Engine, **options) -> tuple[object, list[weakref.ref]]:
    """A stream that has given chunks, and every tensor that came with it."""
    known = _tensors()
    known_ids = {id(each) for each in known}
    stream = engine.stream(PROMPT, **options, **OPTIONS)
    for _ in range(3):
        next(stream)
    return stream, [weakref.ref(each) for each in _tensors() if id(each) not in known_ids]


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "overlap_decode"), [("with", False), ("with", True), ("dropped", True)])
def test_a_run_releases_its_memory_at_once(engine, ends, overlap_decode):
    """Without the garbage collector: nothing of a run is part of a cycle."""
    _begin(engine)  # what is kept for all runs
    gc.collect()
    gc.disable()
    try:
        stream, tensors = _begin(engine, overlap_decode=overlap_decode)
        assert sum(each() is not None for each in tensors) > 10
        if ends == "with":
            with stream:
                pass
        else:
            del stream
        alive = [tuple(tensor.shape) for each in tensors if (tensor := each()) is not None]
        assert alive == []
    finally:
        gc.enable()
    assert not any(thread.name == "miga-decode" for thread in threading.enumerate())


@pytest.mark.slow
def test_an_engine_releases_its_weights(folder):
    engine = Engine.from_pretrained(folder)
    engine.generate(PROMPT, 5, **OPTIONS)
    parts = (engine.bundle.transformer, engine.bundle.vae, engine.bundle.text_encoder)
    weights = [weakref.ref(parameter) for part in parts for parameter in part.parameters()]
    assert len(weights) > 10
    del engine, parts
    gc.collect()
    assert [tuple(weight().shape) for weight in weights if weight() is not None] == []
