"""One dialect of docstrings and errors, over all of the package and the kernels."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FILES = sorted([*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("kernels/*.py")])
_LETTER = r"(?:[A-Z0-9][A-Za-z0-9·+*−-]{0,6}|[a-z]{1,2}|num_\w+)"
WRONG = {
    "double backticks": re.compile("``"),
    "a role of Sphinx": re.compile(r":(meth|class|func|mod):`"),
    "an arrow of ASCII": re.compile(r"(?<=\s)->(?=\s)"),
    "a shape with blanks": re.compile(rf"\[{_LETTER}(, {_LETTER})+\]"),
    "no stop at the end of its first paragraph": re.compile(r"\A(.(?!\n\n))*[^.:?!…)](\n\n|\Z)", re.DOTALL),
}


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "lineno", 1), text


def _sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where an error is raised with a text written there, its end."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = node.exc.args[0]
            said = said.values[-1] if isinstance(said, ast.JoinedStr) else said
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                yield node.lineno, said.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_errors_are_of_one_dialect(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"{line}: {what}" for line, text in _docstrings(tree) for what, rule in WRONG.items() if rule.search(text)]
    found += [f"{line}: a full stop ends an error" for line, text in _sentences(tree) if text.rstrip().endswith(".")]
    assert not found, f"{path.relative_to(ROOT)}: {'; '.join(found)}"


@pytest.mark.parametrize("text", ["``a``.", "See :meth:`a`.", "a -> b.", "[B, C, F].", "No stop", "None here\n\nbut."])
def test_the_rules_have_teeth(text: str) -> None:
    assert any(rule.search(text) for rule in WRONG.values())
    assert not any(rule.search("`a` → [B,C,F], for example (and more).\n\nRest") for rule in WRONG.values())
