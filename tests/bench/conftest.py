"""Benchmarks are imported by their own names, and their results go into the test's folder."""

from pathlib import Path

import pytest
from places import ROOT


@pytest.fixture
def own_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import result_files

    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
