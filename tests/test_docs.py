"""What the pages on method, architecture and recipes name is there, and so are the sections that docstrings cite."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_imports import LAYERS

ROOT = Path(__file__).parents[1]
PAGES = ("method", "architecture", "adding")
RECIPES = ("solver", "kernel", "family of models", "weight format", "sink", "judge", "host")

MODULES = {
    "kernels",
    *(path.stem for path in (ROOT / "miga_engine").iterdir() if path.suffix == ".py" or path.is_dir()),
}
TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
PATH = re.compile(r"(?<![\w/<.])([\w-]+(?:/[\w<>.-]+)+/?)")
FILE = re.compile(r"`([\w-]+\.(?:py|md|toml|cpp|h))`")
NAME = re.compile(r"(?<![\w/<>.-])((?:miga_engine\.)?[a-z_]+(?:\.\w+)+)")
SUFFIXES = {"py", "md", "toml", "cpp", "h", "json", "yaml", "safetensors", "csv", "png", "mp4"}


def _text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def _missing(text: str) -> Iterator[str]:
    """Paths and names in a text that lead nowhere; <…> in a path stands for any name."""
    for path in PATH.findall(text):
        is_meant = path.split("/")[0] in TOP or f"`{path}`" in text  # px/frame is none
        if is_meant and not any(ROOT.glob(re.sub(r"<\w+>", "*", path.rstrip("./")))):
            yield path
    for file in FILE.findall(text):
        if not any((folder / file).is_file() for folder in (ROOT, ROOT / "miga_engine")):
            yield file
    for name in NAME.findall(text):
        parts = name.removeprefix("miga_engine.").split(".")
        if parts[0] in MODULES and parts[-1] not in SUFFIXES and not _is_there(parts):
            yield name


def _is_there(parts: list[str]) -> bool:
    value = importlib.import_module(f"miga_engine.{parts[0]}")
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(["miga_engine", *parts[:i]]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    assert not list(_missing(_text(page)))


@pytest.mark.parametrize(
    "text",
    [
        "`miga_engine/runtime/no_such.py`",
        "see kernels/no_such.py.",
        "`miga_engine/models/<family>/no_such.py`",
        "`no_such/schedule.py`",
        "`no_such.py`",
        "`runtime.stages.no_such`",
        "runtime.no_such",
        "`miga_engine.schedule.no_such`",
    ],
)
def test_what_is_not_there_is_noticed(text: str) -> None:
    assert list(_missing(text))


def test_sections_that_docstrings_cite_are_there() -> None:
    sections = [int(number) for number in re.findall(r"^## (\d+)\. ", _text("method"), re.MULTILINE)]
    assert sections == list(range(1, 12))
    cited = {}
    for path in [*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("kernels/*.py")]:
        for numbers in re.findall(r"docs/method\.md((?:[,\s]+§\d+)*)", path.read_text(encoding="utf-8")):
            cited[path] = [int(number) for number in re.findall(r"\d+", numbers)]
            assert cited[path], f"{path.relative_to(ROOT)} cites docs/method.md without a section"
            assert set(cited[path]) <= set(sections), path.relative_to(ROOT)
    assert cited


def test_every_recipe_is_a_list_of_at_most_seven_files_and_has_a_proof() -> None:
    recipes = dict(re.findall(r"^## An? (.+)\n((?:(?!^## ).*\n)*)", _text("adding"), re.MULTILINE))
    assert tuple(recipes) == RECIPES
    for name, recipe in recipes.items():
        items = re.findall(r"^(\d)\. (.+(?:\n   .+)*)", recipe, re.MULTILINE)
        assert [int(number) for number, _ in items] == list(range(1, len(items) + 1)), name
        assert 2 <= len(items) <= 7, name
        assert re.search(r"^Proof: ", recipe, re.MULTILINE), name
        for _, item in items:
            file = re.match(r"`([\w<>/.-]+)`: ", item)
            assert file, f"{name}: {item}"
            if "<" not in file[1]:
                content = (ROOT / file[1]).read_text(encoding="utf-8")
                for constant in re.findall(r"`(_?[A-Z][A-Z_]+)`", item):
                    assert re.search(rf"\b{constant}\b", content), f"{name}: {file[1]} has no {constant}"


def test_the_floors_of_the_house_are_those_that_imports_are_held_to() -> None:
    block = _text("architecture").partition("## Floors")[2].split("```")[1]
    assert [floor.split(" · ") for floor in block.split("\n") if floor] == LAYERS[::-1]
