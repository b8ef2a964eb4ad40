"""What lies in lists, tuples and dictionaries, for those who look at the arguments of every operator, quickly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def leaves(tree: Any) -> list[Any]:
    """What lies in lists, tuples and dictionaries."""
    found: list[Any] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[Any]) -> None:
    for part in tree if isinstance(tree, _SEQUENCES) else tree.values() if isinstance(tree, dict) else (tree,):
        if isinstance(part, _TREES):
            _gather(part, found)
        else:
            found.append(part)


_SEQUENCES = (list, tuple)
_TREES = (list, tuple, dict)


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same with every leaf changed."""
    if isinstance(tree, _SEQUENCES) and not isinstance(tree, torch.Size):
        return type(tree)([mapped(change, part) for part in tree])
    if isinstance(tree, dict):
        return {name: mapped(change, part) for name, part in tree.items()}
    return change(tree)
