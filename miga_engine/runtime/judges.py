"""Judges: how alike groups of latent frames are to those before them. What follows from it, `reflection` decides."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from miga_engine import ops
from miga_engine.config import MigaConfig
from miga_engine.runtime.frame_store import FrameStore


class Judge(Protocol):
    """Scores `[k]` of candidate groups against a reference, both given by their slots: `[k,m]` and `[n]`."""

    def __call__(
        self, store: FrameStore, reference: np.ndarray, candidates: np.ndarray, config: MigaConfig, /
    ) -> Tensor: ...


def _latent(store: FrameStore, reference: np.ndarray, candidates: np.ndarray, config: MigaConfig) -> Tensor:
    return _consistency(store, store.sample, reference, candidates, config)


def _x0(store: FrameStore, reference: np.ndarray, candidates: np.ndarray, config: MigaConfig) -> Tensor:
    return _consistency(store, store.x0, reference, candidates, config)


def _consistency(
    store: FrameStore, values: Tensor, reference: np.ndarray, candidates: np.ndarray, config: MigaConfig
) -> Tensor:
    return ops.consistency_score(
        values[store.index(reference)], values[store.index(candidates)], channels=config.channels
    )


JUDGES: dict[str, Judge] = {"latent": _latent, "x0": _x0}
"""By their name in `MigaConfig.judge`."""
