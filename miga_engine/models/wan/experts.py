"""The two networks of Wan2.2 T2V-A14B, one for high noise and one for low, as one transformer.

Each is a whole Wan2.1 transformer of 14B. Source: Wan2.2's code, which asks the one for high noise from timestep 875 of
1000 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miga_engine.models.protocols import Transformer
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.dit_layers import ContextCache, Levels


@dataclass(frozen=True)
class ExpertTexts:
    """A `protocols.TextTable` of both networks."""

    each: tuple[ContextCache, ContextCache]

    def table(self, num_rows: int, num_keys: int) -> ExpertTexts:
        """A table of so many rows and keys for both, to `write` to."""
        high, low = (cache.table(num_rows, num_keys) for cache in self.each)
        return ExpertTexts((high, low))

    def write(self, row: int, prompt: ExpertTexts) -> None:
        """Make what is held of one prompt this row of both."""
        for mine, theirs in zip(self.each, prompt.each, strict=True):
            mine.write(row, theirs)

    def row(self, row: int, num_keys: int) -> ExpertTexts:
        """The first keys of a row of both, as `write` takes them, of the same memory."""
        high, low = (cache.row(row, num_keys) for cache in self.each)
        return ExpertTexts((high, low))


class WanExperts(Transformer):
    """Two `WanDiT` of one size: 0, for high noise, from `boundary_timestep` on, and 1, for low noise, below it.

    Which one computes is the caller's word, for all frames of a call. With a `device` to swap on both networks stay
    where they are, and one at a time is copied to memory there that is as large as one; `num_moves` counts the copies.
    On a GPU the networks' own memory is pinned, so that a copy waits for nothing on the host. Who captures graphs of
    forwards calls `bring` before a replay: the memory stays the same, and what is in it does not.
    """

    def __init__(
        self, high: WanDiT, low: WanDiT, boundary_timestep: float | None, swap_on: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config: WanDiTConfig = high.config
        self.boundary_timestep = boundary_timestep
        self.high_noise_model, self.low_noise_model = high, low
        self.num_moves = 0
        self._present: int | None = None
        self._slot: list[WanDiT] = []  # in a list, for it is no part of the module: its weights are copies
        if swap_on is not None:
            self._slot = [_empty_like(high, swap_on)]
            if swap_on.type == "cuda":
                for parameter in self.parameters():
                    parameter.data = parameter.data.pin_memory()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.high_noise_model.dtype

    @property
    def attention(self) -> str:
        """Backend of `ops.frame_attention`, of both networks."""
        return self.high_noise_model.attention

    @attention.setter
    def attention(self, backend: str) -> None:
        for network in (self.high_noise_model, self.low_noise_model, *self._slot):
            network.attention = backend

    @property
    def is_movable(self) -> bool:
        """Not where the networks are copied to a device by turns."""
        return not self._slot

    def bring(self, expert: int) -> WanDiT:
        """The network 0 or 1 ready to compute, copied to the device where it is not there."""
        network = (self.high_noise_model, self.low_noise_model)[expert]
        if not self._slot:
            return network
        slot = self._slot[0]
        if self._present != expert:
            self._present = None  # until the copy is whole
            with torch.no_grad():
                for there, here in zip(slot.parameters(), network.parameters(), strict=True):
                    there.copy_(here, non_blocking=True)
            self._present = expert
            self.num_moves += 1
        return slot

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Each network that computes is compiled; what is around it moves weights, which no graph is to hold."""
        for network in self._slot or (self.high_noise_model, self.low_noise_model):
            network.compile(*args, **kwargs)
        self._compiled_call_impl = self._call_impl  # so that it can be told

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float | tuple[tuple[Levels, Levels], Tensor],
        context: Tensor | ExpertTexts,
        context_index: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        expert: int = 0,
    ) -> Tensor:
        """What `WanDiT.forward` gives of the network `expert`, 0 or 1, for the same arguments."""
        if isinstance(timesteps, tuple):
            levels, rows = timesteps
            own: Any = (levels[expert], rows)
        else:
            own = timesteps
        text = context.each[expert] if isinstance(context, ExpertTexts) else context
        return self.bring(expert)(latents, own, text, context_index, positions, keep)

    def encode_timesteps(self, timesteps: Tensor, fps: float | None = None) -> tuple[Levels, Levels]:
        """Timesteps [T] as each network sees them, done once for a schedule."""
        high, low = self._of_each("encode_timesteps", timesteps, fps)
        return high, low

    def encode_context(self, context: Tensor) -> ExpertTexts:
        """Text embeddings [P,T,D] → the cross-attention keys and values of every layer of both networks."""
        high, low = self._of_each("encode_context", context)
        return ExpertTexts((high, low))

    def num_text_keys(self, num_tokens: int) -> int:
        """Keys that `encode_context` makes of a text of so many tokens, at most."""
        return self.high_noise_model.num_text_keys(num_tokens)

    def _of_each(self, method: str, *given: Any) -> tuple[Any, Any]:
        """What both networks answer, the one that is on the device asked first."""
        found = {}
        for expert in (1, 0) if self._present == 1 else (0, 1):
            found[expert] = getattr(self.bring(expert), method)(*given)
        return found[0], found[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as that of shapes alone, is of both networks where they are both on the device, and else of one
        in the place of both, and nothing moves."""
        state = dict(super().__getstate__())
        if self._slot:
            one = self.high_noise_model
            state |= {"_slot": [], "_modules": {"high_noise_model": one, "low_noise_model": one}}
        return state


def _empty_like(network: WanDiT, device: torch.device) -> WanDiT:
    """A network of the same sizes and dtypes on a device, of no values yet."""
    with torch.device("meta"):
        empty = WanDiT(network.config)
    state = {name: torch.empty_like(tensor, device=device) for name, tensor in network.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    empty.attention = network.attention
    return empty.eval().requires_grad_(False)
