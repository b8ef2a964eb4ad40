"""The host's torch modes: the frames do not depend on them, and they are as they were afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import golden_model
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _len_torch_function_stack

from miga_engine import Engine
from miga_engine.models import load_transformer, load_vae


class _Halving(TorchFunctionMode):
    """Makes everything float16 that is made in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.half() if isinstance(out, torch.Tensor) and out.dtype == torch.float32 else out


@contextlib.contextmanager
def _default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _transform() -> Iterator[None]:
    with torch._functorch.eager_transforms.grad_increment_nesting():
        yield


MODES = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default device meta": lambda: _default_device("meta"),
    "device meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": _deterministic,
    "precision medium": lambda: _precision("medium"),
    "fake tensors": FakeTensorMode,
    "function mode": _Halving,
    "torch.func": _transform,
}
MIGA = dataclasses.replace(golden_model.MIGA, stage2_steps=2, judge_step=2, reference_groups=1, candidates=2)
OPTIONS = {
    "wan": ({"height": 32, "width": 48, "num_inference_steps": 6, "miga": MIGA}, 25),
    "videocrafter2": (
        {"height": 8, "width": 16, "num_inference_steps": 6, "miga": dataclasses.replace(MIGA, zigzag_width=1)}, 7,
    ),
    "tiny": ({"height": 32, "width": 32, "num_inference_steps": 6, "miga": MIGA}, 57),
}  # fmt: skip
"""Of three chunks each, the first before the last pass, and with searches."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str | Path]:
    built = {name: family.build(tmp_path_factory.mktemp(name)) for name, family in golden_model.FAMILIES.items()}
    return {**built, "tiny": "tiny"}


@pytest.fixture(scope="module")
def videos(folders) -> dict[str, torch.Tensor]:
    return {name: Engine.from_pretrained(folder).generate("a red balloon", OPTIONS[name][1], **OPTIONS[name][0]).frames
            for name, folder in folders.items()}  # fmt: skip


def _state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(), _len_torch_function_stack(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch._C._functorch.peek_interpreter_stack() is None,
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_the_frames_do_not_depend_on_the_hosts_modes(mode: str, family: str, folders, videos) -> None:
    """Around the loading, and around every chunk but the third, before which the host leaves them for a moment."""
    options, num_frames = OPTIONS[family]
    overlap = (list(MODES).index(mode) + list(OPTIONS).index(family)) % 2 == 0  # each mode and each family in both ways
    overlap = overlap and "precision" not in mode  # one switch for all threads, back with the last of them
    with MODES[mode]():
        before = _state()
        engine = Engine.from_pretrained(folders[family])
        stream = engine.stream("a red balloon", num_frames, overlap_decode=overlap, **options)
        assert _state() == before
    chunks = []
    for number in range(num_frames):
        with contextlib.nullcontext() if number == 2 else MODES[mode]():
            before = _state()
            chunk = next(stream, None)
            assert _state() == before
        if chunk is None:
            break
        chunks.append(chunk.frames)
    assert len(chunks) == 3
    assert torch.equal(torch.cat(chunks), videos[family])
    assert not any(frames.requires_grad or frames.is_inference() for frames in chunks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "family"), [(mode, [*OPTIONS][i % len(OPTIONS)]) for i, mode in enumerate(MODES)]
)  # each mode with one family: every one of them is above with all
def test_generating_saving_and_resuming_do_not_either(mode: str, family: str, folders, videos, tmp_path: Path) -> None:
    options, num_frames = OPTIONS[family]
    engine = Engine.from_pretrained(folders[family])
    with MODES[mode]():
        frames = engine.generate("a red balloon", num_frames, **options).frames
        stream = engine.stream("a red balloon", num_frames, **options)
        first = next(stream).frames
        stream.save(tmp_path / "run.safetensors")
        resumed = engine.resume(tmp_path / "run.safetensors")
        rest = [chunk.frames for chunk in resumed]
    assert torch.equal(frames, videos[family])
    assert len(rest) == 2
    assert torch.equal(torch.cat([first, *rest]), videos[family])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_loaded_networks_are_real_whatever_the_mode(mode: str, folders) -> None:
    plain = load_transformer(folders["wan"]), load_vae(folders["wan"])
    with MODES[mode]():
        loaded = load_transformer(folders["wan"]), load_vae(folders["wan"])
    for ours, theirs in zip(plain, loaded, strict=True):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert (type(b), b.dtype, b.is_inference()) == (torch.Tensor, a.dtype, False), name
            assert torch.equal(a, b)
