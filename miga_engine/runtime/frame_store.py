"""The ring of latent frames: one slot a frame, every tensor allocated once.

All frames of a run that are not yet emitted, whatever their stage, live in one ring: frame number k sits in slot
k mod capacity. Push and pop move an index. Step index, history length and prompt row are integers on the host,
because the plan needs them there; the tensors never leave the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from miga_engine.device import to_device
from miga_engine.runtime.interrupts import uninterrupted


class FrameStore:
    """State of the latent frames of a run.

    `sample`, `last_sample` (last corrected sample), `x0` and `x0_previous` (the solver's last two x0
    predictions): float32 `[capacity + scratch, C, H, W]`. `step_index`, `history_length`, `prompt_row`,
    `frame_number`: int64 `[capacity + scratch]` on the host. The `scratch` slots behind the ring hold the
    candidates of a reflection search.
    """

    TENSORS = ("sample", "last_sample", "x0", "x0_previous")
    INTEGERS = ("step_index", "history_length", "prompt_row", "frame_number")

    def __init__(
        self, capacity: int, frame_shape: tuple[int, int, int], device: torch.device, *, scratch: int = 0
    ) -> None:
        self.capacity = capacity
        self.scratch = scratch
        self.device = device
        self.frame_shape = frame_shape
        num_slots = capacity + scratch
        self.sample = torch.zeros(num_slots, *frame_shape, dtype=torch.float32, device=device)
        self.last_sample = torch.zeros_like(self.sample)
        self.x0 = torch.zeros_like(self.sample)
        self.x0_previous = torch.zeros_like(self.sample)
        self.step_index = np.zeros(num_slots, dtype=np.int64)
        self.history_length = np.zeros(num_slots, dtype=np.int64)
        self.prompt_row = np.zeros(num_slots, dtype=np.int64)
        self.frame_number = np.zeros(num_slots, dtype=np.int64)
        self.is_intact = True
        """Whether no change was broken off: False from one that failed half-way on."""

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """A change of the run's state that happens as a whole; what can fail is to be computed before it."""
        is_outermost = self.is_intact
        with uninterrupted():
            self.is_intact = False
            yield
            self.is_intact = is_outermost

    @classmethod
    def bytes_per_slot(cls, frame_shape: tuple[int, int, int]) -> int:
        """Of the tensors, in memory."""
        return len(cls.TENSORS) * math.prod(frame_shape) * torch.float32.itemsize

    def slots(self, frame_numbers: Sequence[int] | np.ndarray | range) -> np.ndarray:
        """Ring slots of the frames with these numbers (numbers may be negative: FIFO's copies of frame 0)."""
        return np.asarray(frame_numbers, dtype=np.int64) % self.capacity

    def scratch_slots(self, first: int, count: int) -> np.ndarray:
        """`count` scratch slots from the `first`-th on."""
        return self.capacity + first + np.arange(count, dtype=np.int64)

    def index(self, slots: np.ndarray) -> torch.Tensor:
        """The slots as an index tensor on the device, copied without waiting for it."""
        return to_device(torch.from_numpy(slots), self.device)

    def put(
        self, slots: np.ndarray, sample: torch.Tensor, *, step_index: int | np.ndarray, numbers: Sequence[int] | range
    ) -> None:
        """Write `sample [n,C,H,W]` into `slots` with an empty solver history."""
        self.sample[self.index(slots)] = sample
        self.step_index[slots] = step_index
        self.history_length[slots] = 0
        self.frame_number[slots] = np.asarray(numbers, dtype=np.int64)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole frames, solver history and step index included."""
        index_source, index_target = self.index(source), self.index(target)
        for name in self.TENSORS:
            tensor = getattr(self, name)
            tensor[index_target] = tensor[index_source]
        for name in self.INTEGERS:
            array = getattr(self, name)
            array[target] = array[source]

    def state(self, slots: np.ndarray) -> dict[str, torch.Tensor]:
        """All that is known of the frames in `slots`, by name, on the host."""
        index = self.index(slots)
        tensors = {name: getattr(self, name)[index].cpu() for name in self.TENSORS}
        return tensors | {name: torch.from_numpy(getattr(self, name)[slots]) for name in self.INTEGERS}

    def load_state(self, slots: np.ndarray, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what `state` gave."""
        index = self.index(slots)
        for name in self.TENSORS:
            getattr(self, name)[index] = tensors[name].to(self.device)
        for name in self.INTEGERS:
            getattr(self, name)[slots] = tensors[name].numpy()
