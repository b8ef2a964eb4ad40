"""What several videos put together for one forward: their batches as one batch, their texts as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miga_engine.models.protocols import TextTable
from miga_engine.runtime.network import Batch


def joined(batches: Sequence[Batch], first_rows: Sequence[int]) -> Batch:
    """One batch of several of one size, as many branches and one expert.

    The prompts of each are rows of one table, from its own first row on. A batch that keeps fewer frames of a window
    than another repeats its last, as windows of one batch do.
    """
    if len(batches) == 1:
        return batches[0]._replace(prompt_rows=batches[0].prompt_rows + first_rows[0])
    num_kept = max(batch.keep.shape[1] for batch in batches)
    num_frames, is_by_frame = batches[0].latents.shape[2], any(batch.prompt_rows.ndim == 2 for batch in batches)
    keep, rows = [], []
    for batch, first in zip(batches, first_rows, strict=True):
        last = batch.keep[:, -1:].expand(-1, num_kept - batch.keep.shape[1])
        keep.append(torch.cat([batch.keep, last], dim=1))
        placed = batch.prompt_rows + first
        if is_by_frame and placed.ndim == 1:
            placed = placed[:, None].expand(-1, num_frames)
        rows.append(placed.unflatten(0, (-1, len(batch.latents))))  # [G,B] or [G,B,F]
    return Batch(
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.timesteps for batch in batches]),
        torch.cat([batch.steps for batch in batches]),
        torch.cat(rows, dim=1).flatten(0, 1),
        torch.cat(keep),
        batches[0].expert,
    )


def split(output: Tensor, batches: Sequence[Batch]) -> list[Tensor]:
    """Of the output `[G·B,C,K,H,W]` of joined batches that of each."""
    if len(batches) == 1:
        return [output]
    counts = [len(batch.latents) for batch in batches]
    parts = output.unflatten(0, (-1, sum(counts))).split(counts, dim=1)
    return [part[:, :, :, : batch.keep.shape[1]].flatten(0, 1) for part, batch in zip(parts, batches, strict=True)]


def same_levels(one: Any, other: Any) -> bool:
    """Whether what a network made of two schedules is the same: tensors, or tuples of such."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    is_tuple = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
    return is_tuple and all(map(same_levels, one, other))


class Place(NamedTuple):
    """Rows of one owner in the table of all."""

    first: int
    num_rows: int
    num_keys: int


class Texts(NamedTuple):
    """One table of several owners' texts. A change makes another, and leaves the old one whole until it is there."""

    table: TextTable | None = None
    num_rows: int = 0
    places: Mapping[Any, Place] = {}

    def seated(self, owner: object, like: TextTable, num_rows: int, num_keys: int) -> Texts:
        """With so many rows of so many keys for an owner, of the kinds of `like`, in place of those that he had."""
        return self._packed({**self.without(owner).places, owner: Place(-1, num_rows, num_keys)}, like)

    def without(self, owner: object) -> Texts:
        """The same table, in which an owner has nothing any more; none where he was the last."""
        places = {other: place for other, place in self.places.items() if other != owner}
        return Texts(self.table, self.num_rows, places) if places else Texts()

    def packed(self) -> Texts:
        """As it is, or a table of what is owned alone where that is no more than half."""
        if self.table is None or 2 * sum(place.num_rows for place in self.places.values()) > self.num_rows:
            return self
        return self._packed(self.places, self.table)

    def write(self, owner: object, row: int, prompt: TextTable) -> None:
        """Make a text this row of an owner's."""
        assert self.table is not None
        self.table.write(self.places[owner].first + row, prompt)

    def _packed(self, places: Mapping[Any, Place], like: TextTable) -> Texts:
        """A new table of as many rows as these places and the keys of the widest, with what owners have in this one."""
        num_rows = sum(place.num_rows for place in places.values())
        table = like.table(num_rows, max(place.num_keys for place in places.values()))
        packed, first = dict[Any, Place](), 0
        for owner, place in places.items():
            if self.table is not None and place.first >= 0:
                for row in range(place.num_rows):
                    table.write(first + row, self.table.row(place.first + row, place.num_keys))
            packed[owner] = place._replace(first=first)
            first += place.num_rows
        return Texts(table, num_rows, packed)
