"""What the runtime asks of a model, and a loaded transformer that answers it for one video."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from miga_engine import ops
from miga_engine.device import own_modes
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.protocols import TextTable, Transformer
from miga_engine.prompts import PromptEmbeddings
from miga_engine.runtime.interrupts import uninterrupted

NEGATIVE_ROW = 0
"""Prompt row of the unconditional branch; prompts of the video are rows 1, 2, …"""


class Batch(NamedTuple):
    """Windows that go through the network together: B windows of F frames in G guidance branches (1 or 2).

    Where the branches read different frames, each has windows of its own, and G is 1.
    """

    latents: Tensor  # [B,C,F,H,W] float32
    timesteps: Tensor  # [B,F] float32
    steps: Tensor  # int64 [B,F], rows of the schedule
    prompt_rows: Tensor  # int64 [G·B] or, where a window's frames differ, [G·B,F], placed; conditional branch first
    keep: Tensor  # int64 [B,K]: the frames whose output is wanted, the last repeated where a window has fewer
    expert: int = 0  # of a model of two networks: 0 for that of high noise, 1 for that of low noise


class WindowNetwork(Protocol):
    """A model that denoises windows of one video."""

    @property
    def num_prompts(self) -> int:
        """Prompt rows that it has; it is never given another."""

    def place_prompts(self, prompt_rows: np.ndarray, /) -> np.ndarray:
        """What int64 numbers name these rows in the next batch; asked before every one. NEGATIVE_ROW keeps its own."""

    def prepare(self, expert: int, /) -> None:
        """Bring what computes the next batch, of this `Batch.expert`, to where it computes; asked before every one
        of a model of two networks."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """The output `[G·B,C,K,H,W]` of a batch, in the schedule's prediction type."""


def forward(
    transformer: Transformer, dtype: torch.dtype, batch: Batch, levels: Any, texts: Any, attention: dict[str, str]
) -> Tensor:
    """The output of a batch, whose steps are rows of `levels` and whose prompts are rows of `texts`."""
    chosen = {} if transformer.boundary_timestep is None else {"expert": batch.expert}
    with ops.attention_choices(attention):
        return transformer(
            batch.latents.to(dtype),
            (levels, batch.steps),
            texts,
            context_index=batch.prompt_rows,
            keep=batch.keep,
            **chosen,
        )


class PromptedTransformer:
    """The `WindowNetwork` of a loaded transformer: its noise levels are encoded once.

    Keys and values of a prompt row are made when it is first at hand, by itself, in a table of `num_slots` rows (None:
    of all) that is allocated once: of many prompts only those that the queue shows are held. `attention`: see
    `ops.attention_choices`; what is chosen is added to it. `fps`: the video's rate, for a network that is told it.
    """

    @own_modes()
    def __init__(
        self,
        bundle: ModelBundle,
        prompts: PromptEmbeddings,
        timesteps: Tensor,
        attention: dict[str, str],
        num_slots: int | None = None,
        fps: float | None = None,
    ) -> None:
        self.num_prompts = len(prompts)
        self._transformer, self._dtype, self._device = bundle.transformer, bundle.dtype, bundle.device
        self._prompts, self._attention = prompts, attention
        self._levels = self._transformer.encode_timesteps(timesteps, fps)
        self._num_slots = num_slots or len(prompts)
        negative = self._encode(NEGATIVE_ROW)
        self._context: Any = self._table(negative, self._transformer.num_text_keys(prompts.num_tokens))
        self._context.write(NEGATIVE_ROW, negative)
        # Prompt rows by when they were last at hand, but for that of the negative prompt, which stays.
        self._slot_of = {NEGATIVE_ROW: NEGATIVE_ROW}

    @torch.no_grad()
    def make_room(self, prompts: PromptEmbeddings, num_slots: int) -> bool:
        """A larger table, where these prompts, `num_slots` rows of them at a time, need one; whether there is another
        table now. What rows it is to hold is written when they are next at hand."""
        num_keys = [self._transformer.num_text_keys(texts.num_tokens) for texts in (self._prompts, prompts)]
        if num_slots <= self._num_slots and num_keys[1] <= num_keys[0]:
            return False
        negative, before = self._encode(NEGATIVE_ROW), self._num_slots
        with uninterrupted():
            self._num_slots = max(num_slots, before)
            try:
                table = self._table(negative, max(num_keys))
            except BaseException:
                self._num_slots = before
                raise
            table.write(NEGATIVE_ROW, negative)
            self._context, self._slot_of = table, {NEGATIVE_ROW: NEGATIVE_ROW}
        return True

    def change_prompts(self, prompts: PromptEmbeddings) -> None:
        """Rows are those of other prompts from now on, with the same negative one; see `make_room`."""
        self._prompts, self.num_prompts = prompts, len(prompts)
        self._slot_of = {NEGATIVE_ROW: NEGATIVE_ROW}

    @torch.no_grad()
    def place_prompts(self, prompt_rows: np.ndarray, /) -> np.ndarray:
        """Where the table holds these rows, int64 of any shape; rows that it does not hold take the place of those that
        were not at hand for longest."""
        wanted, where = np.unique(prompt_rows, return_inverse=True)
        for row in wanted.tolist():
            if row == NEGATIVE_ROW:
                continue
            slot = self._slot_of.get(row)
            if slot is None:
                slot = self._free_slot(wanted)
                self._context.write(slot, self._encode(row))
            self._slot_of = {**self._without(row), row: slot}  # at once: an interrupt loses no slot
        return np.array([self._slot_of[row] for row in wanted.tolist()], np.int64)[where].reshape(prompt_rows.shape)

    def prepare(self, expert: int, /) -> None:
        """See `WindowNetwork`."""
        self._transformer.bring(expert)

    def __call__(self, batch: Batch, /) -> Tensor:
        return forward(self._transformer, self._dtype, batch, self._levels, self._context, self._attention)

    def _table(self, prompt: TextTable, num_keys: int) -> TextTable:
        """Where `num_slots` prompts of so many keys are held, of the kinds of this one."""
        return prompt.table(self._num_slots, num_keys)

    def _encode(self, prompt_row: int) -> Any:
        return self._transformer.encode_context(self._prompts[prompt_row][None].to(self._device))

    def _free_slot(self, wanted: np.ndarray) -> int:
        """A slot that no row is held in, once the row that was not at hand for longest has left where all are taken."""
        if len(self._slot_of) == self._num_slots:
            self._slot_of = self._without(next(r for r in self._slot_of if r != NEGATIVE_ROW and r not in wanted))
        return min(set(range(self._num_slots)) - set(self._slot_of.values()))

    def _without(self, prompt_row: int) -> dict[int, int]:
        return {row: slot for row, slot in self._slot_of.items() if row != prompt_row}
