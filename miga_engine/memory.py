"""What a run will need of memory, known before any weights are read.

The run's own code is executed on the `meta` device, where tensors have shapes and no data, and every allocation is
counted from its birth to its death: parts and peaks are those of the code as it is, not of a formula beside it. What
the attention backends allocate inside does not show there, and is added where attention runs. Texts
count as if they had the most tokens the model takes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from miga_engine.device import amount
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.layers import copied_to
from miga_engine.models.protocols import TextEncoder
from miga_engine.ops.frame_attention import workspace_bytes
from miga_engine.runtime.decode import Decoding
from miga_engine.runtime.denoise import Window
from miga_engine.runtime.stages import VideoRun

_ENCODER_BYTES, _ENCODER_FRAMES = 18 * 2**20, 85
"""Video encoding takes this and so many frames of 12 bits a pixel: libx264 from 96x64 to 832x480 on one thread."""

# glibc gives larger blocks back as soon as they are freed; its own limit grows up to 32 MiB unless it is set.
_LARGEST_HEAP_BLOCK = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 32 * 2**20))
_HELD_BACK = 1.5
"""glibc keeps freed blocks that are smaller, so that their peak is exceeded by this factor of itself: measured 1.5 to
1.9 in runs of the embedded model with four windows of 128x192 together, against the same run with every block from
64 KiB on mapped for itself."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run will need.

    `resident` stays for the whole run. Of `peaks` (loading, prompts, forward, decoding) only one is there at a time,
    beside what is resident. `process` is what the process needs beside the tensors on the device; on CPUs the tensors
    lie in the process too. The totals of a GPU leave out the CUDA context and what the caching allocator holds back.
    """

    device: str
    resident: Mapping[str, int]
    peaks: Mapping[str, int]
    process: Mapping[str, int]

    @property
    def parts(self) -> dict[str, int]:
        """Every part by name."""
        return {**self.resident, **self.peaks, **self.process}

    @property
    def device_total(self) -> int:
        """Tensors on the device, at the worst moment."""
        return sum(self.resident.values()) + max(self.peaks.values())

    @property
    def host_total(self) -> int:
        """The process at its worst moment: resident memory as the system counts it."""
        return sum(self.process.values()) + (self.device_total if self.device == "cpu" else 0)

    def __str__(self) -> str:
        width = max(map(len, self.parts)) + 2
        groups = (
            (f"on {self.device}, all the time", self.resident),
            (f"on {self.device}, one at a time", self.peaks),
            ("in the process", self.process),
        )
        lines = []
        for title, parts in groups:
            lines.append(title)
            lines += [f"  {name:<{width}}{amount(size):>12}" for name, size in parts.items()]
        if self.device != "cpu":
            lines.append(f"{'total on ' + self.device:<{width + 2}}{amount(self.device_total):>12}")
        lines.append(f"{'total of the process':<{width + 2}}{amount(self.host_total):>12}")
        return "\n".join(lines)


def choose_window_batch(
    estimate_for: Callable[[int], int], free_bytes: int | None, *, share: float = 0.8, most: int = 64
) -> int:
    """Largest of 1, 2, 4, … `most` windows whose `estimate_for(windows)` bytes fit in `share` of the free memory.

    1 where not even two fit, and where `free_bytes` is None: on a CPU, batches gain nothing.
    """
    batch = 1
    while free_bytes is not None and 2 * batch <= most and estimate_for(2 * batch) <= share * free_bytes:
        batch *= 2
    return batch


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that operators on `meta` tensors allocate and that are still referred to.

    `current`, `peak` and `peak_in_heap` (of the blocks that glibc may keep) are bytes; `device` is the type of device
    the run is meant for. Where the code asks for data, every element counts as nonzero.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.current = self.peak = self.peak_in_heap = self._in_heap = self._most_in_heap = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def peak_of(self, run: Callable[[], object]) -> int:
        """Bytes that `run` needs for a while, beyond those there before; those in the heap become `peak_in_heap`."""
        self.peak = before = self.current
        self._most_in_heap = in_heap = self._in_heap
        run()
        self.peak_in_heap = self._most_in_heap - in_heap
        return self.peak - before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if any(tensor.is_meta for tensor in given):
            name = func._schema.name
            if name == "aten::nonzero":
                return torch.ones(args[0].shape).nonzero()
            if name == "aten::_local_scalar_dense":
                return True
            # Index tables, which a run moves to its device, stay on the CPU here.
            if not all(tensor.is_meta for tensor in given):
                args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
            self._known.update(tensor.untyped_storage() for tensor in given if tensor.is_meta)
            if name == "miga::frame_attention":
                needed = workspace_bytes(*given[:2], has_rows=len(given) > 3, is_cpu=self.device == "cpu")
                self.peak = max(self.peak, self.current + needed)
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.is_meta and tensor.untyped_storage() not in self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._change, -size)
        self._change(size)

    def _change(self, size: int) -> None:
        self.current += size
        self._in_heap += size if abs(size) < _LARGEST_HEAP_BLOCK else 0
        self.peak = max(self.peak, self.current)
        self._most_in_heap = max(self._most_in_heap, self._in_heap)


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta or tensor.ndim == 0 else torch.empty_like(tensor, device="meta")


@contextmanager
def counting(device: str) -> Iterator[Ledger]:
    """A run on `meta` is begun within: its ledger, for a type of device ("cpu", "cuda")."""
    with torch.no_grad(), Ledger(device) as ledger:
        yield ledger


def longest_texts(bundle: ModelBundle) -> ModelBundle:
    """The same model on `meta` with its text encoder loaded, and a tokenizer to which every text is as long as can be.

    What is loaded here counts as weights and not as a part of the run.
    """
    encoder = bundle.text_encoder
    tokenizer = functools.partial(_longest_texts, bundle.facts.text_len)
    return dataclasses.replace(bundle, open_text_encoder=lambda: encoder, open_tokenizer=lambda: tokenizer)


def on_meta(bundle: ModelBundle) -> ModelBundle:
    """The shapes of a loaded model without its text encoder, and every text as long as can be."""
    shapes = dataclasses.replace(
        bundle,
        device=torch.device("meta"),
        transformer=copied_to(torch.device("meta"), bundle.transformer),
        vae=copied_to(torch.device("meta"), bundle.vae),
        open_text_encoder=lambda: _LongestText(bundle.text_dim),
    )
    return longest_texts(shapes)


def estimate(run: VideoRun, bundle: ModelBundle, ledger: Ledger, *, stored: Mapping[str, int]) -> MemoryEstimate:
    """What a run needs on the ledger's type of device.

    run: begun within `counting`, of the bundle, which is on `meta` and has the `longest_texts`; stored: bytes of its
    networks in their files, in the order of their loading (`models.loading.file_bytes`).
    """
    device, (height, width) = ledger.device, _video_size(run, bundle)
    needs = _device_needs(run, bundle, ledger)
    resident, peaks, weights = dict(needs.resident), dict(needs.peaks), needs.weights
    process = {
        "interpreter and libraries (measured)": _library_bytes(bundle),
        "video encoder": _ENCODER_BYTES + _ENCODER_FRAMES * height * width * 3 // 2,
    }
    if device == "cpu":
        loaded = np.cumsum([weights[name] for name in stored])
        most = max(int(before) + size for before, size in zip(loaded, stored.values(), strict=True))
        peaks |= {"loading (files mapped)": max(0, most - int(loaded[-1]))}
        process["held back by the allocator"] = int(_HELD_BACK * needs.in_heap)
    else:
        process |= {
            "weights files (mapped)": max(stored.values()),
            "output frames to write": resident["output frames"],
        }
    return MemoryEstimate(device, resident, peaks, process)


def running_bytes(run: VideoRun, bundle: ModelBundle, ledger: Ledger) -> int:
    """What a run needs on a GPU once its prompts are encoded, at the worst moment, with the weights of a loaded model.

    run: begun within `counting`, of the bundle, which is a loaded model `on_meta`.
    """
    needs = _device_needs(run, bundle, ledger)
    return sum(needs.resident.values()) + max(size for name, size in needs.peaks.items() if name != "encoding prompts")


class _LongestText(TextEncoder):
    """A text encoder without weights: every text is as long as can be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=sys.maxsize)
        self.width = width

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.empty(*ids.shape, self.width, device="meta")


class _Needs(NamedTuple):
    """Bytes on a device: see `MemoryEstimate`; `in_heap` of a forward's are in blocks that glibc may keep."""

    resident: dict[str, int]
    peaks: dict[str, int]
    weights: dict[str, int]
    in_heap: int


def _device_needs(run: VideoRun, bundle: ModelBundle, ledger: Ledger) -> _Needs:
    """Of a run that has begun on `meta`, in the order in which they come up."""
    device, (height, width) = ledger.device, _video_size(run, bundle)
    networks = {"transformer": bundle.transformer, "VAE": bundle.vae, "text encoder": bundle.text_encoder}
    weights = {name: _num_bytes([*network.parameters(), *network.buffers()]) for name, network in networks.items()}
    kept = dict(weights)
    prompts = ledger.peak - ledger.current
    with torch.no_grad(), ledger:
        rings = _num_bytes(getattr(run.store, name) for name in run.store.TENSORS)
        outputs = _num_bytes(value for value in vars(run.denoiser).values() if isinstance(value, Tensor))
        cache = ledger.current - rings - outputs

        before = ledger.current
        forward = ledger.peak_of(lambda: run.denoiser.run(_windows(run)))
        rotary, in_heap = ledger.current - before, ledger.peak_in_heap

        shape = run.store.frame_shape
        decoder = bundle.vae.stream_decoder()
        decoder.push(torch.empty(1, shape[0], 2, *shape[1:], device="meta"))
        features = _num_bytes(decoder.state().values())
        latent = torch.empty(1, *shape, device="meta")

        def decode() -> None:
            frames = Decoding(decoder.push, overlap=False)
            frames.put(latent)
            frames.settle()

        decoding = ledger.peak_of(decode)
        given = run.layout.num_given
        clip = torch.empty(
            1, 3, bundle.num_video_frames(given or 1), height, width, device="meta", dtype=bundle.vae.dtype
        )
        encoding = ledger.peak_of(lambda: bundle.vae.encode(clip)) if given else 0
    # The most latent frames that become clean together; their frames wait for the last of them.
    chunk = run.window_frames * bundle.frame_ratio * 3 * height * width
    decoding += chunk

    if device != "cpu":  # the text encoder is given back once the prompts are encoded
        prompts += kept.pop("text encoder")
    resident = {
        **{f"{name} weights": size for name, size in kept.items()},
        "rings of latent frames": rings,
        "network outputs of a pass": outputs,
        "prompt keys and values, noise levels": cache,
        "rotary tables": rotary,
        "decoder feature cache": features,
        "output frames": chunk,
    }
    peaks = {"encoding prompts": max(0, prompts)}
    if given:
        peaks["encoding what the video begins with"] = encoding
    if device == "cpu":
        peaks |= {"forward": forward, "decoding": decoding}
    else:  # frames are decoded while the network computes
        peaks["forward, with decoding beside it"] = forward + decoding
        if run.denoiser.is_small(run.denoiser.window_batch, run.window_frames):
            resident["captured forwards"] = forward
    return _Needs(resident, peaks, weights, in_heap)


def _video_size(run: VideoRun, bundle: ModelBundle) -> tuple[int, int]:
    """Height and width of the video in pixels."""
    _, height, width = run.store.frame_shape
    return height * bundle.spatial_factor, width * bundle.spatial_factor


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "meta")


def _longest_texts(text_len: int, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of prompts that could not be longer."""
    ids = torch.ones(len(prompts), text_len, dtype=torch.int64)
    return ids, ids


def _windows(run: VideoRun) -> list[Window]:
    """One batch of the most windows that go through the network together: of a pass over the full queue, of one over
    the unified levels, or of a search."""
    config, layout = run.config, run.layout
    limit = 1 if config.window_order == "sequential" else run.denoiser.window_batch
    full = config.zigzag_width * (layout.num_groups + 1)
    most = max(layout.num_levels, *(len(layout.queue_plan(0, full, phase)) for phase in range(run.stride)))
    if config.self_reflection:
        groups = config.reference_groups + config.judge_step // config.passes_per_advance
        searched = config.zigzag_width * groups
        most = max(most, config.num_continuations * (2 + searched // run.stride))
    count = max(1, min(limit, most))
    # A frame before those committed, and cleaner than they, where the branches then read different frames.
    first = min(1, config.num_past(config.guidance_frames, run.window_frames))
    run.store.step_index[: run.window_frames] = 0  # given frames stand there, which are clean
    run.store.step_index[0] = first
    commit_stop = min(first + run.stride, run.window_frames) if count > 1 else run.window_frames
    return [Window(np.arange(run.window_frames), first, commit_stop, first)] * count


def _library_bytes(bundle: ModelBundle) -> int:
    """Resident memory of this process, after a toy run has made the libraries load and build what they need."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        bundle.rehearse()
    return resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak."""
    return _from_proc("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far."""
    # ru_maxrss would include that of the process which started this one.
    if (peak := _from_proc("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _from_proc(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
