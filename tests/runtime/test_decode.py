"""Decoding beside the network: the same frames in the same order, bounded, and gone when it is over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import places
import pytest
import torch
from torch import Tensor

from miga_engine.models import load_vae
from miga_engine.models.wan.vae import WanVAE
from miga_engine.models.wan.vae_layers import run_sequence
from miga_engine.runtime.decode import MOST_PENDING, Decoding, Push, to_uint8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(places.GOLDENS / "wan_vae" / "official" / "Wan2.1_VAE.safetensors")


def _taken(decoding: Decoding, most_pending: int | None = None) -> Iterator[Tensor]:
    """The frames that have come out once no more groups are under way than may be."""
    try:
        decoding.settle(most_pending)
    finally:
        while decoding.ready:
            yield decoding.ready.popleft()


def decode_frames(groups: Iterable[Tensor | None], push: Push, *, overlap: bool) -> Iterator[Tensor]:
    """All frames of the groups; an error of the groups comes after them."""
    failure: Exception | None = None
    remaining = iter(groups)
    with Decoding(push, overlap=overlap) as decoding:
        while True:
            try:
                latents = next(remaining)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            if latents is not None:
                decoding.put(latents)
            yield from _taken(decoding)
        yield from _taken(decoding, 0)
    if failure is not None:
        raise failure


def _latents(*sizes: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, 16, 4, 6) for size in sizes]


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "miga-decode"]


def _picture(latents: Tensor) -> Tensor:
    """A decoder whose frame shows the latent's value."""
    return latents[:, :1].expand(1, 3, 1, *latents.shape[3:]).float()


def _numbered(count: int, pulled: list[int] | None = None) -> Iterator[Tensor]:
    """Groups of one latent, the k-th of value k/100; `pulled` grows as they are taken."""
    for k in range(count):
        if pulled is not None:
            pulled.append(k)
        yield torch.full((1, 1, 2, 2), k / 100)


def test_uint8_is_rounded_to_the_nearest_level_and_clamped() -> None:
    levels = torch.arange(256)
    for shift in (-0.49, 0.0, 0.49):
        values = (levels + shift) / 127.5 - 1
        frames = to_uint8(values.view(1, 1, 16, 16).expand(3, 2, 16, 16))
        assert frames.shape == (2, 16, 16, 3)
        assert frames.dtype == torch.uint8
        assert frames.is_contiguous()
        assert torch.equal(frames[1, ..., 2].flatten(), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0]).expand(3, 1, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_overlap_gives_the_same_frames_bit_for_bit(vae: WanVAE, device: str, mode: type) -> None:
    vae = vae.to(device)
    with mode():
        groups = [latents.to(device) for latents in _latents(1, 2, 1, 3, 1)]
        with_gaps = [None, groups[0], None, *groups[1:3], None, None, *groups[3:], None]
        plain = list(decode_frames(with_gaps, vae.stream_decoder().push, overlap=False))
        overlapped = list(decode_frames(with_gaps, vae.stream_decoder().push, overlap=True))
    assert [len(frames) for frames in plain] == [1, 8, 4, 12, 4]
    assert all(torch.equal(a, b) for a, b in zip(plain, overlapped, strict=True))
    with torch.no_grad():
        whole = vae.decode(torch.cat(groups).transpose(0, 1)[None])[0]
    assert torch.equal(torch.cat(overlapped), to_uint8(whole))
    assert not any(frames.requires_grad for frames in overlapped)
    assert not _threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_latents_need_only_be_queued_and_frames_may_be_used_at_once(vae: WanVAE) -> None:
    vae = vae.cuda()
    clean = [latents.cuda() for latents in _latents(*[1] * 12)]
    expected = list(decode_frames(clean, vae.stream_decoder().push, overlap=False))

    def queued() -> Iterator[Tensor]:
        for latents in clean:
            torch.cuda._sleep(20_000_000)  # the network, still running when the latents are handed over
            yield latents + 0

    taken = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for frames in decode_frames(queued(), vae.stream_decoder().push, overlap=True):
            torch.cuda._sleep(5_000_000)
            taken.append(frames + 0)
            del frames  # its memory must not be decoded into before the copy has run
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))


def test_it_decodes_while_the_next_latents_are_made() -> None:
    has_begun, is_decoding = [threading.Event() for _ in range(6)], [threading.Event() for _ in range(6)]

    def groups() -> Iterator[Tensor]:
        for k, latents in enumerate(_numbered(6)):
            has_begun[k].set()
            if k > 1:
                assert is_decoding[k - 1].wait(30)  # the first is waited for; then decoding runs beside this
            yield latents

    def push(latents: Tensor) -> Tensor:
        k = round(float(latents[0, 0, 0, 0, 0]) * 100)
        is_decoding[k].set()
        if 0 < k < 5:
            assert has_begun[k + 1].wait(30)
        return _picture(latents)

    assert len(list(decode_frames(groups(), push, overlap=True))) == 6


def test_the_first_frames_are_not_held_back() -> None:
    pulled: list[int] = []
    frames = decode_frames(_numbered(9, pulled), _picture, overlap=True)
    next(frames)
    assert pulled == [0]
    frames.close()


def test_neither_side_runs_away() -> None:
    pulled: list[int] = []
    decoded: list[float] = []
    allowance = threading.Semaphore(1)

    def push(latents: Tensor) -> Tensor:
        assert allowance.acquire(timeout=30)
        decoded.append(float(latents[0, 0, 0, 0, 0]))
        return _picture(latents)

    frames = decode_frames(_numbered(50, pulled), push, overlap=True)
    for taken in range(1, 20):
        next(frames)  # a slow decoder: the source is held
        assert len(pulled) <= taken + MOST_PENDING + 1
        allowance.release()
    for _ in range(100):
        allowance.release()
    time.sleep(0.1)  # a slow consumer: what was handed over is decoded, and no more is taken from the source
    assert len(decoded) <= len(pulled) <= 19 + MOST_PENDING + 1
    frames.close()


class _DecoderError(Exception):
    pass


def test_an_error_of_the_decoder_is_raised_as_it_is() -> None:
    def push(latents: Tensor) -> Tensor:
        if float(latents[0, 0, 0, 0, 0]) > 0.025:
            raise _DecoderError("out of paint")
        return _picture(latents)

    taken: list[Tensor] = []
    with pytest.raises(_DecoderError, match=r"^out of paint$"):
        taken.extend(decode_frames(_numbered(9), push, overlap=True))
    assert len(taken) == 3
    assert not _threads()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_of_the_source_comes_after_the_frames_before_it(overlap: bool) -> None:
    def groups() -> Iterator[Tensor]:
        yield from _numbered(4)
        raise _DecoderError("out of noise")

    taken: list[Tensor] = []
    with pytest.raises(_DecoderError, match=r"^out of noise$"):
        taken.extend(decode_frames(groups(), _picture, overlap=overlap))
    assert len(taken) == 4
    assert not _threads()


def test_closing_ends_the_thread_after_the_latent_frame_at_hand() -> None:
    decoded: list[int] = []
    is_busy, go = threading.Event(), threading.Event()

    def push(latents: Tensor) -> Tensor:
        decoded.append(1)
        if len(decoded) == 2:
            is_busy.set()
            assert go.wait(30)
        return _picture(latents)

    source = iter([torch.zeros(1, 1, 2, 2), torch.zeros(1000, 1, 2, 2), None, None])

    def groups() -> Iterator[Tensor | None]:
        for latents in source:
            yield latents
            if latents is not None and len(latents) == 1000:
                assert is_busy.wait(30)
                raise KeyboardInterrupt

    frames = decode_frames(groups(), push, overlap=True)
    next(frames)
    threading.Timer(0.05, go.set).start()
    with pytest.raises(KeyboardInterrupt):
        next(frames)
    assert len(decoded) <= 3  # the one at hand, and one more at most where the timer came first
    assert not _threads()


@pytest.mark.slow
def test_nothing_stays_behind() -> None:
    class Decoder:
        def push(self, latents: Tensor) -> Tensor:
            return _picture(latents)

    for is_dropped in (False, True):
        decoder = Decoder()
        watched = weakref.ref(decoder)
        frames = decode_frames(_numbered(5), decoder.push, overlap=True)
        last = weakref.ref(next(frames))
        if not is_dropped:
            list(frames)
        del frames, decoder
        assert not _threads()
        gc.collect()
        assert watched() is None
        assert last() is None


@pytest.mark.slow
def test_the_interpreter_ends_in_peace_while_it_decodes() -> None:
    """A thread that comes back from an operator of torch to an interpreter that has ended aborts the process."""
    script = """
import torch
from miga_engine.runtime.decode import Decoding
matrix = torch.zeros(700, 700)
def push(latents):
    for _ in range(10):
        torch.mm(matrix, matrix)
    return latents.expand(1, 3, 1, 2, 2)
decoding = Decoding(push, overlap=True)
for count in (1, 1000):
    decoding.put(torch.zeros(count, 1, 2, 2))
    decoding.settle()
"""
    program = [sys.executable, "-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.monotonic()
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert time.monotonic() - started < 60  # a thousand latent frames would take longer


@pytest.mark.parametrize("overlap", [False, True])
def test_what_fails_to_decode_is_not_lost(overlap: bool) -> None:
    is_broken = True

    def push(latents: Tensor) -> Tensor:
        if is_broken and float(latents[0, 0, 0, 0, 0]) > 0.045:
            raise _DecoderError("out of paint")
        return _picture(latents)

    groups = [torch.full((3, 1, 2, 2), k / 100) + torch.arange(3.0).view(3, 1, 1, 1) / 100 for k in (0, 3, 6)]
    taken: list[Tensor] = []
    with Decoding(push, overlap=overlap) as decoding, pytest.raises(_DecoderError):
        taken.extend(_all_frames(decoding, groups))
    assert sum(map(len, taken)) == 5
    is_broken = False
    rest = list(decode_frames(decoding.undecoded, push, overlap=overlap))
    handed_over = 2 if not overlap else 3  # in one thread the error comes before the third group is handed over
    expected = torch.cat(list(decode_frames(groups[:handed_over], push, overlap=False)))
    assert torch.equal(torch.cat(taken + rest), expected)


def _all_frames(decoding: Decoding, groups: list[Tensor]) -> Iterator[Tensor]:
    for group in groups:
        decoding.put(group)
        yield from _taken(decoding)
    yield from _taken(decoding, 0)


def test_a_push_that_fails_leaves_the_decoder_as_it_was(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.cat(_latents(1, 2, 1)).transpose(0, 1)[None]
    with torch.no_grad():
        expected = vae.decode(latents)
        decoder = vae.stream_decoder()
        frames = [decoder.push(latents[:, :, :2])]
        with monkeypatch.context() as patch:
            patch.setattr("miga_engine.models.wan.vae_levels.Decoder.forward", _fails_half_way)
            with pytest.raises(_DecoderError):
                decoder.push(latents[:, :, 2:3])
        frames += [decoder.push(latents[:, :, 2:])]
    assert torch.equal(torch.cat(frames, dim=2), expected)


def _fails_half_way(self: Any, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
    run_sequence(self.middle, self.conv1(x, cache), cache)
    raise _DecoderError("out of memory")
