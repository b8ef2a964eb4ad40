"""What is shared by the tests of the server: a small model, a server of it, and what its videos show."""

from __future__ import annotations

from pathlib import Path

import golden_model
import numpy as np
import pytest
from served import OPTIONS, serving, written

from miga_engine import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("served") / "small-wan")


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine.from_pretrained(model)


@pytest.fixture(scope="module")
def shown(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the video of `VIDEO` shows."""
    video = engine.generate("a red balloon", 30, **OPTIONS)
    return written(video.frames, tmp_path_factory.mktemp("shown") / "shown.mp4")


@pytest.fixture(scope="module")
def longer(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The same of 43 frames, of which the end shapes the last."""
    video = engine.generate("a red balloon", 43, **OPTIONS)
    return written(video.frames, tmp_path_factory.mktemp("longer") / "longer.mp4")


@pytest.fixture(scope="module")
def client(engine: Engine, tmp_path_factory: pytest.TempPathFactory):
    """Of a server that makes one video at a time, of up to 100,000 frames."""
    with serving(engine, tmp_path_factory.mktemp("jobs"), max_frames=100_000, max_upload=2**17) as client:
        yield client
