"""What tests of the runtime share: the small model, its engine, and one run of it."""

from __future__ import annotations

from pathlib import Path

import golden_model
import pytest
from small_run import NUM_FRAMES, OPTIONS, frames_of
from torch import Tensor

from miga_engine.engine import Engine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def engine(model: Path) -> Engine:
    return Engine.from_pretrained(model, "cpu")


@pytest.fixture(scope="session")
def whole(engine: Engine) -> Tensor:
    """The frames of a run that nothing happens to."""
    return frames_of(engine.stream("a red balloon", NUM_FRAMES, **OPTIONS))
