"""Values, bytes and trees that a stranger may have written."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CANARY = "canary"  # created in the working directory by code that a file carries
Random = random.Random
Folder = Path

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 7, 64, 2**31, 10**9, 10**12, 2**63, 2**64 - 1, 10**30, 10**300, -(10**18), 0.5, -0.0,
    1e308, math.inf, -math.inf, math.nan, "", "x", "96", "\0", "\x1b[2J", "\ud800", "é" * 300, "x" * 70_000,
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "a\nb", [], {}, [[]], [0] * 1000, [None], ["a", 1],
    {"a": {"b": {}}}, {"": 0}, "F32", "I64", "BPE", "WordPiece", "Unigram", "i2v", "WanModel", "Sequence", [1e999],
    [math.nan] * 16, ["", ""],
)  # fmt: skip


def any_value(rng: Random) -> Any:
    if rng.random() < 0.25:
        return rng.randrange(-(2 ** rng.randrange(1, 70)), 2 ** rng.randrange(1, 70))
    return rng.choice(HOSTILE_VALUES)


def break_bytes(data: bytes, rng: Random) -> bytes:
    """Flips, cuts, doubled and inserted pieces; more of them near the beginning, where formats keep their structure."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(min(len(out), rng.choice((16, 200, 5000, 2**31))) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + rng.choice((4, 8))] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\x80"))
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 8, 1000))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 8, 300))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 8, 300)))
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def break_tree(tree: Any, rng: Random) -> Any:
    """The same JSON-like value with some nodes replaced, renamed, doubled or dropped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        node = tree
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            kind = rng.randrange(5)
            if kind <= 2:
                node[key] = any_value(rng)
            elif kind == 3:
                del node[key]
            elif isinstance(node, dict):
                node[str(any_value(rng))[:2000]] = node[key]
            else:
                node.append(node[key])
            break
    return tree


def dump(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def break_json(data: bytes, rng: Random) -> bytes:
    kind = rng.randrange(10)
    if kind < 7:
        return dump(break_tree(json.loads(data), rng))
    if kind == 7:
        return break_bytes(data, rng)
    return rng.choice((
        b"", b"null", b"3", b'"a"', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b'{"a":1e99999}',
        b'{"dim":' + b"9" * 5000 + b"}", data + data, b"[" + b"{}," * 300_000 + b"{}]", b" " * 9_000_000, data[:-1],
    ))  # fmt: skip


CACHE: dict[str, Any] = {}  # what a process has at hand: the good files, the victims, engines
