"""The map in `miga_engine/runtime/__init__.py` holds: it names every file, and nobody knows a line below his own."""

from __future__ import annotations

import ast
import re

import places

import miga_engine.runtime

FOLDER = places.ROOT / "miga_engine" / "runtime"


def _floors() -> dict[str, int]:
    lines = (miga_engine.runtime.__doc__ or "").splitlines()
    found = [re.match(r"((?:\w+ )+) {2,}\w", line) for line in lines]
    return {name: floor for floor, line in enumerate(found) if line for name in line[1].split()}


def test_every_file_has_its_line() -> None:
    assert set(_floors()) == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}


def test_each_line_knows_those_above_it_and_none_below() -> None:
    floors = _floors()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("miga_engine.runtime."):
                known = (node.module or "").split(".")[2]
                assert floors[known] <= floors[path.stem], f"{path.name} is above {known}"
