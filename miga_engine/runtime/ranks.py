"""Several processes at one video: each runs a share of a pass's windows, and only their output travels.

Every rank holds the whole queue and updates all of it, from the same numbers in the same order, so the ranks' states
stay equal to the bit, and equal to a single process's that batches its windows alike.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from miga_engine.errors import DeviceError


class Ranks:
    """The process group of a run (torch.distributed, initialised by the caller: NCCL for CUDA, gloo for CPUs)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def share(self, num_batches: int, rank: int | None = None) -> range:
        """The neighbouring batches that a rank (this one, if None) computes; shares differ by one at most."""
        rank = self.rank if rank is None else rank
        return range(num_batches * rank // self.count, num_batches * (rank + 1) // self.count)

    def exchange(self, outputs: Tensor, bounds: list[int]) -> None:
        """Make every rank's rows known to all, in place.

        outputs [G,rows,C,H,W]; batch i wrote rows bounds[i] … bounds[i+1]. DeviceError if a rank is lost.
        """
        try:
            for rank in range(self.count):
                share = self.share(len(bounds) - 1, rank)
                for branch in outputs[:, bounds[share.start] : bounds[share.stop]]:
                    if branch.numel():
                        dist.broadcast(branch, src=self._global(rank), group=self.group)
        except RuntimeError as error:
            raise DeviceError(
                f"rank {self.rank} of {self.count} lost touch with the others ({str(error).splitlines()[0]}): "
                "start the run again on the ranks that are left"
            ) from error

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
