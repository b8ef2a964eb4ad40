"""What tests of the runtime share: the small models, an engine, one run of it, and a pretended GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_model
import pytest
import sharing_runs
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


@pytest.fixture
def gpu() -> Iterator[Any]:
    from pretended_cuda import pretended_cuda  # which loads much that most tests do not need

    with pretended_cuda() as here:
        yield here
        report = "\n".join(f"{count} × {hazard}" for hazard, count in here.hazards.most_common())
    assert not here.hazards, report


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    built = {name: family.build(root / name) for name, family in golden_model.FAMILIES.items()}
    return {**built, "tiny": "tiny"}


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """Of streams that share, no thread."""
    yield
    gc.collect()
    sharing_runs.until(lambda: not sharing_runs.is_there(), seconds=5)


@pytest.fixture
def shared(engine: Engine) -> Engine:
    return engine.shared()


@pytest.fixture(scope="session")
def alone(engine: Engine) -> Tensor:
    return sharing_runs.frames(engine.stream("a red balloon", 30, **sharing_runs.OPTIONS))
