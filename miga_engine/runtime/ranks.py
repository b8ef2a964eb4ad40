"""Several processes at one video: each runs a share of a pass's windows, and only their output travels.

Every rank holds the whole queue and updates all of it, from the same numbers in the same order, so the ranks' states
stay equal to the bit, and equal to a single process's that batches its windows alike.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miga_engine.errors import DeviceError

if dist.is_available():
    # Ten functions there keep the group that is joined when they are first imported, as a default of theirs: it would
    # never be destroyed, and its threads would run into the interpreter's end, which then aborts now and then.
    import torch.distributed.nn

Answer = TypeVar("Answer")


def share_of(num_batches: int, rank: int, count: int) -> range:
    """The neighbouring batches that one of `count` ranks computes; shares differ by one at most."""
    return range(num_batches * rank // count, num_batches * (rank + 1) // count)


class Ranks:
    """The process group of a run (torch.distributed, initialised by the caller: NCCL for CUDA, gloo for CPUs)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    @classmethod
    @contextlib.contextmanager
    def from_environment(cls, device: torch.device | str | None) -> Iterator[Ranks | None]:
        """The ranks that torchrun started; None in a process of its own. Joined, on a GPU of its own each, and left."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield None
            return
        is_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
        if is_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=datetime.timedelta(minutes=10))
        try:
            ranks = cls()
            yield ranks
            ranks.close()
        except BaseException:
            if not is_cuda and dist.is_initialized():  # NCCL might wait for the others, who do not know
                dist.destroy_process_group()
            raise

    def share(self, num_batches: int, rank: int | None = None) -> range:
        """The neighbouring batches that a rank (this one, if None) computes; shares differ by one at most."""
        return share_of(num_batches, self.rank if rank is None else rank, self.count)

    def exchange(self, outputs: Tensor, bounds: list[int]) -> None:
        """Make every rank's outputs known to all, in place.

        outputs: `[G,n,C,H,W]`, of whose n frames batch i wrote those from bounds[i] up to bounds[i+1]. DeviceError if a
        rank is lost.
        """
        for rank in range(self.count):
            share = self.share(len(bounds) - 1, rank)
            for branch in outputs[:, bounds[share.start] : bounds[share.stop]]:
                if branch.numel():
                    self._guard(functools.partial(dist.broadcast, branch, self._global(rank), self.group))

    def agree(self, answer: Answer) -> Answer:
        """Rank 0's answer, on every rank: what is asked of the outside may differ between them."""
        answers = [answer]
        self._guard(lambda: dist.broadcast_object_list(answers, src=self._global(0), group=self.group))
        return answers[0]

    def close(self) -> None:
        """Leave together: a rank that ended alone would take the others' connections with it."""
        self._guard(functools.partial(dist.barrier, self.group))
        dist.destroy_process_group(self.group)

    def _guard(self, communicate: Callable[[], object]) -> None:
        try:
            communicate()
        except RuntimeError as error:
            raise DeviceError(
                f"rank {self.rank} of {self.count} lost touch with the others ({str(error).splitlines()[0]}): "
                "start the run again on the ranks that are left"
            ) from error.with_traceback(None)  # whose frames would keep the group

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
