"""Broken files and options against every loader: `python tests/fuzz.py --count 10000 --seed 0`.

Each case breaks one thing that a stranger may have written: a weights file, an index, a config.json, a tokenizer, a
YAML file, a session file, a video, or the options of a request; some bytes at random, or its structure on purpose. A
worker process loads it under a limit on its address space. A case passes where the loader takes the file or raises a
MigaError of one printable line, asks for no more memory than `MOST_BYTES`, and runs no code. It fails on any other
exception, on a signal, on memory that is refused, after `MOST_SECONDS`, and where the canary file appears. Case I of
a seed is the same in every run: `--only I` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MOST_BYTES = 512 * 2**20  # resident, above that before the case; the largest honest file here takes 30 MB
MOST_SECONDS = 30
ADDRESS_SPACE = 4 * 2**30  # beyond the warm worker's, so that what is asked for and never touched shows too
CANARY = "canary"  # created in the working directory by code that a file carries

Random = random.Random
Folder = Path


# What is broken --------------------------------------------------------------------------------------------------

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


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def break_safetensors(data: bytes, rng: Random) -> bytes:
    header, body = split_safetensors(data)
    keys = [key for key in header if key != "__metadata__"]
    key = rng.choice(keys)
    entry = header[key]
    kind = rng.randrange(13)
    if kind == 0:
        return break_bytes(data[: rng.choice((200, 5000, len(data)))], rng)
    if kind == 1:
        return join_safetensors(dump(header), body, rng.choice((0, 1, 2**63, 2**64 - 1, 10**8, rng.randrange(2**24))))
    if kind == 2:
        return join_safetensors(dump(break_tree(header, rng)), body)
    if kind == 3:  # offsets
        entry["data_offsets"] = [any_value(rng) if rng.random() < 0.6 else old for old in entry["data_offsets"]]
    elif kind == 4:  # overlap
        entry["data_offsets"] = header[rng.choice(keys)]["data_offsets"]
    elif kind == 5:
        entry["shape"] = [any_value(rng) if rng.random() < 0.5 else old for old in entry["shape"]]
    elif kind == 6:  # a product beyond 64 bits, or one that wraps around to the right size
        entry["shape"] = rng.choice(
            ([2**32, 2**32], [2**62, 4, *entry["shape"]], [0, 2**62], [2**63 - 1, 0], [1] * 5000)
        )
    elif kind == 7:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "x", 3)
        )
    elif kind == 8:  # one honest tensor of another type, size or shape
        dtype, width = rng.choice((("F64", 8), ("I32", 4), ("BOOL", 1), ("C64", 8), ("F8_E5M2", 1), ("F8_E8M0", 1)))
        shape = rng.choice(([7], [], [0], [3, 0, 2], [1] * 70, [96, 2], [5, 5, 5, 5, 5]))
        size = math.prod(shape) * width
        last = max(header[k]["data_offsets"][1] for k in keys)
        name = rng.choice((key, "blocks.99.ffn.0.weight", "decoder.upsamples.9.x", "token_embedding.weight"))
        offsets = [last, last + size]
        header[name if name not in header else name + ".copy"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": offsets,
        }
        body += b"\0" * size
    elif kind == 9:  # names
        number = rng.choice(("10", "999999", "9" * 30, "9" * 5000, "-1", "1e3", "٣", "0x10", ""))
        digits = "".join(c if not c.isdigit() else number for c in key)
        header[rng.choice((digits, "a\nb", "\x1b[31m", "\0", "", "x" * 100_000, "__metadata__", "é"))] = header.pop(key)
    elif kind == 10:  # the same name twice
        text = dump(header)
        return join_safetensors(b"{" + dump({key: entry})[1:-1] + b"," + text[1:], body)
    elif kind == 11:
        header["__metadata__"] = any_value(rng)
    else:
        text = rng.choice(
            (b"[" * 60_000, b'{"a":' * 20_000, b"\xff\xfe", b"{}", b"[]", b"null", b'{"a":{"dtype":"F32"}}')
        )
        return join_safetensors(text, body)
    return join_safetensors(dump(header), body)


def break_index(data: bytes, rng: Random) -> bytes:
    index = json.loads(data)
    if rng.random() < 0.4:
        return break_json(data, rng)
    key = rng.choice(list(index["weight_map"]))
    index["weight_map"][key] = rng.choice((
        "../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "absent.safetensors", "pipe.safetensors",
        "link.safetensors", "device.safetensors", ".", "..", "", "x" * 5000, "\0", "\ud800", 3, None, ["a"],
        "config.json",
    ))  # fmt: skip
    return dump(index)


class Payload:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_pickles() -> list[bytes]:
    shell = f"touch {CANARY}"
    objects: list[Any] = [
        Payload(os.system, shell), {"weight": Payload(exec, f"open({CANARY!r}, 'w')")}, Payload(eval,
        f"open({CANARY!r},'w')"),
        Payload(bytearray, 2**40), {"a": Payload(bytearray, 2**33)}, Payload(list, range(5)), Payload(__import__, "os"),
        Payload(shutil.copy, "/etc/hostname", CANARY), collections.OrderedDict(a=Payload(os.system, shell)), {1: 2},
        [1, 2], "x",
    ]  # fmt: skip
    raw = [
        b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR.", b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        b"\x80\x02ctorch\nTensor\n(J\xff\xff\xff\x7ftR.", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.",
        b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x10\x85\x81.", b"\x80\x02" + b"]" * 200_000 + b".",
        b"\x80\x02" + b"(" * 100_000 + b"l" * 99_999 + b".", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", b".",
        b"\x80\x02.", b"",
        b"\x80\x02X\xff\xff\xff\xffa.", b"\x80\x02K\x01R.", b"\x80\x02ccollections\nOrderedDict\n)R}b.",
        b"\x80\x02K\x01Q.",
    ]  # fmt: skip
    return [pickle.dumps(thing, protocol) for thing in objects for protocol in (0, 2, 4)] + raw


def rewrite_archive(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()


def break_pickle(data: bytes, rng: Random) -> bytes:
    """`data` is an archive of torch.save."""
    import torch

    kind = rng.randrange(10)
    if kind <= 1:
        return rng.choice(hostile_pickles())
    if kind <= 3:
        payload = rng.choice(hostile_pickles())
        return rewrite_archive(data, lambda name, old: payload if name.endswith("data.pkl") else old)
    if kind == 4:
        return rewrite_archive(data, lambda name, old: break_bytes(old, rng) if name.endswith("data.pkl") else old)
    if kind == 5:  # a tensor of a few bytes that claims any size
        with io.BytesIO() as out:
            stride = (0,) * 5
            size = rng.choice(((2**40, 1, 1, 1, 1), (96, 16, 1, 2, 2**30), (2**20, 2**20, 1, 1, 1)))
            big = torch.zeros(1).as_strided(size, stride)
            torch.save({"decoder.conv1.weight": big, "encoder.conv1.weight": big, "conv2.weight": big}, out)
            return out.getvalue()
    if kind == 6:
        return rewrite_archive(data, lambda name, old: old, zipfile.ZIP_DEFLATED)
    if kind == 7:  # unpacks to a thousand times its size
        bomb = b"\x80\x02" + b"]0" * 60_000_000 + b"]."
        return rewrite_archive(data, lambda name, old: bomb if name.endswith("data.pkl") else b"", zipfile.ZIP_DEFLATED)
    if kind == 8:
        content = torch.load(io.BytesIO(data), weights_only=True)
        with io.BytesIO() as out:
            key = rng.choice(list(content))
            odd: Any = rng.choice((torch.zeros(3).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.empty(9,
            device="meta"),
                                   torch.zeros(2, dtype=torch.int64), torch.nn.Parameter(torch.ones(2)), 3, None, "x",
                                   [torch.ones(1)]))  # fmt: skip
            torch.save(
                content | {rng.choice((key, "a\nb", "x" * 9999)): odd},
                out,
                _use_new_zipfile_serialization=rng.random() < 0.7,
            )
            return out.getvalue()
    return break_bytes(data[: rng.choice((100, 5000, len(data)))], rng)


def break_merges(data: bytes, rng: Random) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return gzip.compress(break_bytes(data, rng))
    if kind == 1:
        return gzip.compress(rng.choice((b"\0", b"a b</w>\n", b"\xff")) * rng.choice((10, 10**6, 3 * 10**7)), 1)
    if kind == 2:
        return break_bytes(gzip.compress(data), rng)
    if kind == 3:
        return data + rng.choice(
            (b"a\n", b"a b c\n", b"\xff\xff", b"\0 \0</w>\n", b"x" * 100_000 + b" y</w>\n", b"a b</w>\n" * 60_000)
        )
    return break_bytes(data, rng) if kind == 4 else b""


def break_yaml(data: bytes, rng: Random) -> bytes:
    import yaml

    options = yaml.safe_load(data)
    kind = rng.randrange(4)
    if kind <= 1:
        for _ in range(rng.choice((1, 1, 3))):
            options[rng.choice([*options, "zoom"])] = any_value(rng)
        try:
            return yaml.safe_dump(options, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return b"\xff"
    if kind == 2:
        return break_bytes(data, rng)
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    merge = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    return rng.choice((
        bomb, merge, "a: &a [*a]", f"!!python/object/apply:os.system ['touch {CANARY}']",
        f"prompt: !!python/object/apply:os.system ['touch {CANARY}']",
        f"seed: !!python/object/new:os.system [touch {CANARY}]",
        "[" * 50_000, "{a: " * 20_000, "a: " * 300, "seed: " + "9" * 6000, "seed: " + ":".join(["1"] * 2000),
        "seed: 0b" + "1" * 9000,
        "shift: 1e999", "shift: .nan", "shift: -.inf", "seed: 2001-99-99", "seed: 2001-01-01", "seed: !!binary aGk=",
        "? [1, 2]\n: 3",
        "prompt: {0: x, x: y}", "prompt: {}", "prompt: [a]", "prompt_at: 3", "prompt_at: [[1, x], 2]",
        "prompt_at: [[[], y]]",
        "prompt_at: [[1.5, y]]", "prompt_at: [[.inf, y]]", "prompt_at: [[1, 5]]", "seed: 1\nseed: 2",
        "seed: 1\nbase_seed: 2", "", "--- a\n--- b",
        "%YAML 9.9\n---\na", "\ufeffseed: 3", "a\0b", "#" * 2_000_000, "prompt: " + "x" * 200_000,
        "num_frames: 99999999999999999999", "width: 1000000000\nheight: 1000000000", "candidates: 1000000000",
        "prompt_blend_frames: 1000000000000\nprompt: {0: a, 9: b}",
        "guidance_offset: 4611686018427387904", "num_inference_steps: 100000000", "fps: 0",
        "window_batch: 1000000000", "tagged: !x y",
    )).encode()  # fmt: skip


def break_session(data: bytes, rng: Random) -> bytes:
    """Sometimes with the checksum that fits, so that what lies behind it is reached too."""
    if rng.random() < 0.4:
        return break_safetensors(data, rng)
    from safetensors.torch import load, save

    from miga_engine.runtime.session import _checksum

    metadata, tensors = split_safetensors(data)[0]["__metadata__"], load(data)
    record = json.loads(metadata["record"])
    if rng.random() < 0.6:
        record = break_tree(record, rng)
    else:
        key = rng.choice(list(tensors))
        tensor = tensors.pop(key)
        if rng.random() < 0.7:
            tensors[rng.choice((key, key, "state/x", "y"))] = rng.choice(
                (tensor[:0], tensor.flatten(), tensor.bool(), tensor[None])
            )
    metadata["record"] = json.dumps(record)
    metadata["sha256"] = _checksum(metadata["record"], tensors)
    if rng.random() < 0.1:
        metadata[rng.choice(list(metadata))] = str(any_value(rng))[:1000]
    return save(tensors, {name: value.encode("utf-8", "replace").decode() for name, value in metadata.items()})


NEAR_TEXTS = (
    "seed_clip", "warmup", "stage1", "flush", "done", "push", "queue", "judge", "pop", "unified", "trailing", "copies",
    "sequential", "x0", "ddim", "euler", "dpmpp_2m", "float16", "bfloat16", "tiny", "wan2.1", "cpu", "video.mkv",
    "frames/%06d.png", "../victims/a.rgb", "../victims/a.mp4", "../victims/%06d.png", "a kite", "\x1b]0;x\x07", "",
)  # fmt: skip


def near_value(value: Any, rng: Random, victims: str) -> Any:
    """Another value that the place of this one may seem to take."""
    if rng.random() < 0.15:
        return any_value(rng)
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, 1, None, 0.5, "true", [], {}))
    if isinstance(value, int):
        near = (value + 1, value - 1, value + 2, value + 5, 2 * value + 1, -value, 0, -1, 1)
        far = (10**6, 10**9, 2**31, 2**53, 2**63 - 1, 10**40, float(value), str(value), True, None, [value])
        return rng.choice(near + near + far)
    if isinstance(value, float):
        return rng.choice(
            (math.nan, math.inf, -value, value * 1e30, value + 0.1, int(value) if abs(value) < 1e9 else 0, None)
        )
    if isinstance(value, str):
        return rng.choice((*NEAR_TEXTS, f"{victims}/a.rgb", f"{victims}/a.mp4", f"{victims}/%06d.png", value + "x"))
    return rng.choice(([], {}, None, 0, "x"))


def break_values(data: bytes, rng: Random) -> bytes:
    """Values of a well-formed session, whose checksum fits."""
    import torch
    from safetensors.torch import load, save

    from miga_engine.runtime.session import _checksum

    metadata, tensors = split_safetensors(data)[0]["__metadata__"], load(data)
    record = json.loads(metadata["record"])
    victims = str(CACHE["victims"]) if "victims" in CACHE else "/victims"
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(20)
        if kind < 12:
            node, key = record, rng.choice(("request", "model", "state", "state", "state", "extension"))
            while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.95:
                node = node[key]
                key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key] = near_value(node[key], rng, victims)
        elif kind < 13:  # as far on as any run, if all goes on alike
            state, step = record["state"], rng.choice((2, 4, 100, 10**6, 10**9)) * rng.choice((1, -1))
            run = state.get("run") if isinstance(state, dict) else None
            for name in ("head", "tail", "first", "emitted", "num_passes"):
                if isinstance(run, dict) and isinstance(run.get(name), int):
                    run[name] += step // (2 if name == "num_passes" else 1)
            if isinstance(run, dict) and isinstance(run.get("unified"), list):
                run["unified"] = [level + step for level in run["unified"] if isinstance(level, int)]
            if rng.random() < 0.7 and "state/run/frame_number" in tensors:
                tensors["state/run/frame_number"] += step
        elif kind < 14:
            record["state"], record["extension"] = record["extension"], rng.choice((record["state"], None))
        else:
            name = rng.choice(sorted(tensors))
            tensor = tensors[name].clone()
            if tensor.numel() and rng.random() < 0.75:
                at = rng.randrange(tensor.numel())
                whole = rng.choice((-1, 0, 1, 2, 3, 9, 10, 11, 255, 10**6, 2**31, 2**62, -(2**63)))
                value = whole if tensor.dtype == torch.int64 else rng.choice((math.nan, math.inf, -1e30, 1e38, 0.0))
                flat = tensor.reshape(-1)
                flat[at if rng.random() < 0.6 else slice(None)] = (
                    abs(whole) % 256 if tensor.dtype == torch.uint8 else value
                )
                tensors[name] = tensor
            else:
                odd = (tensor[:0], tensor[:-1], torch.cat([tensor, tensor[-1:]]), tensor.double(), tensor[None])
                tensors[name] = rng.choice(odd)
    metadata["record"] = json.dumps(record)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    metadata["sha256"] = _checksum(metadata["record"], tensors)
    return save(tensors, metadata)


def break_video(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.1:
        return rng.choice((
            b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"", b"RIFF\xff\xff\xff\xffAVI ", b"\x1aE\xdf\xa3" + b"\xff" * 60,
            b"\0\0\0\1ftyp" + b"\xff" * 60,
        ))  # fmt: skip
    if rng.random() < 0.4:  # a box or element of another size
        marks = [i for tag in (b"moov", b"trak", b"stsd", b"udta", b"meta", b"ilst", b"mvhd", b"moof", b"trun",
        b"\xa9cmt", b"data", b"\x12T\xc3g",
                               b"\x16T\xaek", b"COMMENT") if (i := data.find(tag)) >= 4]  # fmt: skip
        at = rng.choice(marks or [4]) - 4 + rng.choice((0, 0, 4, 8, 12, 16))
        return data[:at] + rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4))) + data[at + 4 :]
    return break_bytes(data, rng)


def break_request(data: bytes, rng: Random) -> bytes:
    """Options of Engine.resolve, pickled: a caller can pass what JSON cannot say."""
    options = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(list(options))
        texts = ("", " \n", "x" * 100_000, "a\0b", "\ud800", "\x1b[2J", "é" * 9000, "\u202e", b"bytes", 3, None,
        ["a"], {}, {0: ""},
                 {5: "late"}, {0: "a", 10**30: "b"}, {0: "a", -1: "b"}, {"0": "a"}, {0.5: "a", 0: "b"}, {0: "a",
                 10**9: "b"},
                 {0: "a", 4: "\0"}, dict.fromkeys(range(5000), "a"))  # fmt: skip
        options[name] = rng.choice(texts) if name.endswith("prompt") else any_value(rng)
    return pickle.dumps(options)


# What loads it -----------------------------------------------------------------------------------------------------


def load_options(folder: Folder) -> None:
    """A --config file all the way to a request and the first steps of its run."""
    from miga_engine.cli.config_file import read_config
    from miga_engine.cli.main import _prompt_timeline, _request_options

    settings = read_config(str(folder / "run.yaml"))
    prompt = _prompt_timeline(settings)
    settings.pop("model", None)
    start(tiny(), {"prompt": prompt, **_request_options(tiny(), settings)})


def start(engine: Any, options: dict[str, Any]) -> None:
    """Resolve, and go as far as the buffers of the run where they are small."""
    from miga_engine.prompts import PromptTimeline

    request = engine.resolve(**options)
    PromptTimeline(request.prompt, request.miga.prompt_blend_frames, engine.bundle.first_video_frame)
    json.dumps(request.metadata("x"))


def tiny() -> Any:
    from miga_engine.engine import Engine

    if "tiny" not in CACHE:
        CACHE["tiny"] = Engine.from_pretrained("tiny", "cpu")
    return CACHE["tiny"]


def golden() -> Any:
    from miga_engine.engine import Engine

    if "golden" not in CACHE:
        CACHE["golden"] = Engine.from_pretrained(CACHE["pristine"] / "wan", "cpu", "float32")
        CACHE["golden"].name = "tiny"  # whose sessions need not be told where the model lies
    return CACHE["golden"]


CACHE: dict[str, Any] = {}


def load_transformer(folder: Folder) -> None:
    from miga_engine import models

    models.load_transformer(folder)


def load_vae(folder: Folder) -> None:
    from miga_engine import models

    models.load_vae(folder)


def load_text_encoder(folder: Folder) -> None:
    from miga_engine import models

    models.load_text_encoder(folder)


def load_and_encode(folder: Folder) -> None:
    """A whole folder, and a prompt through tokenizer and text encoder."""
    from miga_engine.models.loading import load_bundle

    bundle = load_bundle(folder)
    bundle.num_video_frames(bundle.window_frames)
    bundle.encode_prompts(["a red balloon, at 3 o'clock", bundle.default_negative_prompt])


def load_tokenizer(folder: Folder) -> None:
    from miga_engine.models.loading import load_tokenizer

    load_tokenizer(folder)(["", "A red balloon over é 木 ❤ 12 hills </s> <pad>"])


def load_clip_tokenizer(folder: Folder) -> None:
    from miga_engine.models.videocrafter2.tokenizer import CLIPTokenizer

    CLIPTokenizer.from_file(folder)(["", "A red balloon over é 木 hills <end_of_text>"])


def convert(folder: Folder) -> None:
    from miga_engine.models.convert import convert

    convert(folder / "model.ckpt", folder / "out.safetensors")


def load_session(folder: Folder) -> None:
    from miga_engine.runtime.session import is_session

    is_session(folder / "run.safetensors")
    golden().resume(folder / "run.safetensors").close()


MOST_CHUNKS = 20  # of a stream that is resumed; one that is longer is cancelled


def resume_session(folder: Folder) -> None:
    """By the command, to the end, as if a stranger's file had been asked about and gone on with; then by the API."""
    from miga_engine import cli
    from miga_engine.engine import Engine
    from miga_engine.runtime.stream import Stream

    before = {path: path.read_bytes() for path in sorted(CACHE["victims"].iterdir())}
    original, following = Engine.from_pretrained, Stream.__next__

    def next_or_cancel(self: Stream) -> Any:
        self.fuzz_chunks = getattr(self, "fuzz_chunks", 0) + 1
        if self.fuzz_chunks == MOST_CHUNKS:
            self.cancel()
        return following(self)

    engine = golden()
    Engine.from_pretrained, Stream.__next__ = lambda *_, **__: engine, next_or_cancel
    WRITTEN.clear()
    file = folder / "run.safetensors"
    try:
        named = [] if any(folder.glob("a*")) else ["-o", str(folder / "a.mkv")]
        for arguments in (["info", str(file)], ["resume", str(file), "-q", *named]):
            status = cli.main(arguments)
            if status not in (0, 2):
                raise AssertionError(f"{arguments[0]} ended with {status}")
        for path, content in before.items():
            if path.read_bytes() != content:
                raise AssertionError(f"{path} was written to")
        if len(list(CACHE["victims"].iterdir())) != len(before):
            raise AssertionError("something was written beside the victims")
        for name in WRITTEN:
            if not os.path.realpath(name).startswith((os.path.realpath(folder), "/dev/", "/proc/")):
                raise AssertionError(f"{name} was opened for writing")
        if not file.exists():  # it was complete, and the session went with it
            return
        with golden().resume(file) as stream:
            for _ in zip(range(MOST_CHUNKS), stream, strict=False):
                pass
    finally:
        Engine.from_pretrained, Stream.__next__ = original, following


WRITTEN: list[str] = []


def watch_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what is opened for writing."""
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    if event == "open" and isinstance(arguments[0], str) and arguments[2] is not None and arguments[2] & flags:
        WRITTEN.append(arguments[0])


def read_video(folder: Folder) -> None:
    from miga_engine.video.reading import read_metadata, read_video

    for path in sorted(folder.glob("a.m*")):
        try:
            read_metadata(path)
        finally:
            read_video(path)


def load_request(folder: Folder) -> None:
    start(tiny(), pickle.loads((folder / "request").read_bytes()))


SESSIONS = {"seed clip": 4, "warm-up": 12, "early": 18, "middle": 26, "done": 10**6}
"""Ticks after which the sessions were saved whose values are broken."""


@dataclasses.dataclass(frozen=True)
class Target:
    layout: str  # folder of the pristine files
    file: str  # the one that is broken
    breaker: Callable[[bytes, Random], bytes]
    load: Callable[[Folder], None]
    weight: int = 1
    is_written: bool = False  # the loader writes into the folder: its files are copies, and no links


DIT, VAE = "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.safetensors"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
TARGETS = {
    "safetensors": Target("wan", DIT, break_safetensors, load_transformer, 6),
    "safetensors (tiny)": Target("tiny", DIT, break_safetensors, load_transformer),
    "safetensors, shard": Target("shards", SHARD, break_safetensors, load_transformer, 2),
    "safetensors, VAE": Target("wan", VAE, break_safetensors, load_vae, 3),
    "safetensors, VAE (tiny)": Target("tiny", VAE, break_safetensors, load_vae),
    "safetensors, text encoder (tiny)": Target(
        "tiny", "models_t5_umt5-xxl-enc-bf16.safetensors", break_safetensors, load_text_encoder, 3
    ),
    "safetensors, VideoCrafter2": Target("vc2", "model.safetensors", break_safetensors, load_and_encode, 2),
    "index": Target("shards", DIT + ".index.json", break_index, load_transformer, 3),
    "config.json": Target("wan", "config.json", break_json, load_transformer, 4),
    "config.json (tiny)": Target("tiny", "config.json", break_json, load_transformer),
    "config.json, VAE": Target("diffusers", "vae/config.json", break_json, load_vae, 2),
    "miga.json": Target("wan", "miga.json", break_json, load_and_encode),
    "tokenizer.json": Target("tiny", "google/umt5-xxl/tokenizer.json", break_json, load_tokenizer, 6),
    "tokenizer.json and text encoder": Target("wan", "google/umt5-xxl/tokenizer.json", break_json, load_and_encode),
    "tokenizer of CLIP": Target("clip", "merges.txt", break_merges, load_clip_tokenizer, 2),
    "tokenizer of CLIP, gz": Target("clip_gz", "bpe_simple_vocab_16e6.txt.gz", break_merges, load_clip_tokenizer, 2),
    "tokenizer of CLIP, JSON": Target("clip_json", "tokenizer.json", break_json, load_clip_tokenizer),
    "pickle, VAE": Target("pth", "Wan2.1_VAE.pth", break_pickle, load_vae, 6),
    "pickle, text encoder": Target("wan", "models_t5_umt5-xxl-enc-bf16.pth", break_pickle, load_text_encoder, 2),
    "pickle, convert": Target("ckpt", "model.ckpt", break_pickle, convert, 2),
    "YAML": Target("options", "run.yaml", break_yaml, load_options, 6),
    "request": Target("options", "request", break_request, load_request, 6),
    "session file": Target("session", "run.safetensors", break_session, load_session, 4),
    **{
        f"session values, {name}": Target(f"session_{name}", "run.safetensors", break_values, resume_session, 2, True)
        for name in SESSIONS
    },
    "video, mp4": Target("mp4", "a.mp4", break_video, read_video, 3),
    "video, mkv": Target("mkv", "a.mkv", break_video, read_video, 2),
}


def build_pristine(root: Path) -> None:
    """One good folder for each layout, small but for the embedded model's."""
    import golden_model
    import numpy as np
    import torch
    import yaml
    from safetensors.torch import load_file, save_file

    from miga_engine.engine import Engine
    from miga_engine.tiny import WEIGHTS_DIR
    from miga_engine.video.sinks import open_sink

    goldens = golden_model.GOLDENS
    for layout in (
        "wan",
        "vc2",
        "shards",
        "pth",
        "ckpt",
        "clip",
        "clip_gz",
        "clip_json",
        "options",
        "session",
        "mp4",
        "mkv",
    ):
        (root / layout).mkdir()
    shutil.copytree(
        WEIGHTS_DIR, root / "tiny", ignore=lambda _, names: [n for n in names if n.startswith("classifier")]
    )
    golden_model.build(root / "wan")
    golden_model.build_videocrafter2(root / "vc2")
    shutil.copytree(goldens / "wan_vae" / "diffusers", root / "diffusers" / "vae")
    torch.save(load_file(goldens / "wan_vae" / "official" / VAE), root / "pth" / "Wan2.1_VAE.pth")
    torch.save({"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2).half()}}, root / "ckpt" / "model.ckpt")

    tensors, weight_map = load_file(root / "wan" / DIT), {}
    for i in range(2):
        file, keys = SHARD.replace("00001", f"0000{i + 1}", 1), sorted(tensors)[i::2]
        save_file({key: tensors[key] for key in keys}, root / "shards" / file)
        weight_map |= dict.fromkeys(keys, file)
    (root / "shards" / f"{DIT}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(root / "wan" / "config.json", root / "shards")
    os.mkfifo(root / "shards" / "pipe.safetensors")
    (root / "shards" / "link.safetensors").symlink_to("/etc/passwd")
    (root / "shards" / "device.safetensors").symlink_to("/dev/zero")

    merges = "#version: 0.2\na b</w>\nc d\nr e\nre d</w>\n"
    (root / "clip" / "merges.txt").write_text(merges)
    (root / "clip_gz" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(merges.encode())  # packed when it is broken
    pairs = [line.split() for line in merges.splitlines()[1:]]
    (root / "clip_json" / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": pairs}}))

    options = {
        "prompt": "a red balloon", "negative_prompt": "blurry", "num_frames": 30, "seed": 3, "height": 64,
        "width": 96, "fps": 12,
        "guidance_scale": 3.0, "num_inference_steps": 24, "solver": "unipc", "shift": 3.0, "eta": 1.0,
        "use_scale_array": False,
    }  # fmt: skip
    (root / "options" / "request").write_text(json.dumps(options))
    extra = {"prompt_at": [[10, "a blue kite"]], "model": "tiny", "device": "cpu", "method": "miga",
    "output": "a.mp4", "overwrite": False,
             "events": None, "zigzag_width": 4, "stage2_steps": 5, "score_drop": 0.2, "judge": "x0",
             "self_reflection": True}  # fmt: skip
    (root / "options" / "run.yaml").write_text(yaml.safe_dump(options | extra))

    engine = Engine.from_pretrained(root / "wan", "cpu", "float32")
    with engine.stream("a kite", num_frames=30, seed=1, miga=golden_model.MIGA, **golden_model.OPTIONS) as stream:
        next(stream)
        stream.save(root / "session" / "run.safetensors")
    for (name, num_ticks), video in zip(SESSIONS.items(), ("a.rgb", "a.mp4", "a.mkv", "a/", "a.rgb"), strict=True):
        folder = root / f"session_{name}"
        folder.mkdir()
        engine.name = "tiny"
        miga = dataclasses.replace(golden_model.MIGA, guidance_anchor=name != "early", score_drop=-1.0, candidates=2)
        ticks = iter(range(1, 10**6))
        stream = engine.stream(
            {0: "a kite", 12: "a balloon"}, num_frames=45, seed=1, miga=miga, **golden_model.OPTIONS,
            is_cancelled=lambda ticks=ticks, num_ticks=num_ticks: next(ticks) > num_ticks,
        )  # fmt: skip
        output = os.path.join(folder, video)
        with stream, open_sink(output, 16, 48, 32, metadata=stream.request.metadata("tiny")) as sink:
            stream.save_every(None, folder / "run.safetensors", sink, keep_extension=True)
            for chunk in stream:
                sink.write(chunk.frames)
            stream.save(folder / "run.safetensors", sink)
        (folder / "run.previous.safetensors").unlink(missing_ok=True)
    victims = root / "victims"
    victims.mkdir()
    for name in ("a.rgb", "a.mp4", "a.mkv", "000000.png", "000001.png", "notes.txt"):
        (victims / name).write_bytes(b"hours of work " * 1000)
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    for suffix in ("mp4", "mkv"):
        with open_sink(root / suffix / f"a.{suffix}", 12, 48, 32, metadata={"prompt": "a kite", "seed": 3}) as sink:
            sink.write(frames)


# The worker --------------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def refused_memory(error: BaseException | None) -> bool:
    """Whether an error began with memory that could not be had."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def work(connection: Connection, pristine: Path) -> None:
    """Load what is asked for; answer (verdict, message, peak bytes)."""
    for number in (1, 2):  # Rust's panics and FFmpeg write there, and the command
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    import torch

    from miga_engine.errors import MigaError

    torch.set_num_threads(1)
    CACHE["pristine"], CACHE["victims"] = pristine, pristine / "victims"
    sys.addaudithook(watch_writes)
    for target in TARGETS.values():  # what libraries hold for good is there before anything is measured
        if target.is_written:
            shutil.copytree(pristine / target.layout, "warm")
            target.load(Path("warm"))
            shutil.rmtree("warm")
        elif target.file not in ("request", "bpe_simple_vocab_16e6.txt.gz"):
            target.load(pristine / target.layout)
    for path in pristine.rglob("out.safetensors"):
        path.unlink()
    resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + ADDRESS_SPACE,) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    del [bytearray(64 * 2**20)][0]
    connection.send(("ready" if status_bytes("VmHWM") - before > 60 * 2**20 else "blind", "", 0))
    while (request := connection.recv()) is not None:
        name, folder = request
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status_bytes("VmRSS")
        try:
            TARGETS[name].load(folder)
            verdict, message = "loaded", ""
        except MigaError as error:
            verdict, message = "refused", str(error)
            if not message.isprintable() or not 20 <= len(message) <= 2000:
                verdict = "NO SENTENCE"
            elif refused_memory(error):
                verdict = "MEMORY REFUSED"
        except Exception as error:
            verdict, message = "OTHER EXCEPTION", f"{type(error).__name__}: {error}"[:500]
        except BaseException as error:
            verdict, message = "PANIC", f"{type(error).__name__}: {error}"[:500]
        peak = status_bytes("VmHWM") - before
        if Path(CANARY).exists():
            verdict = "CODE RAN"
            Path(CANARY).unlink()
        elif peak > MOST_BYTES:
            verdict = "TOO MUCH MEMORY"
        connection.send((verdict, message, peak))


class Worker:
    """The process that loads; started anew when it has died or hung."""

    def __init__(self, pristine: Path) -> None:
        self.pristine = pristine
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.pristine), daemon=True)
        self.process.start()
        other.close()
        if not self.connection.poll(300) or self.connection.recv()[0] != "ready":
            raise RuntimeError("the worker does not load the good files")

    def load(self, name: str, folder: Path) -> tuple[str, str, int]:
        self.connection.send((name, folder))
        try:
            if self.connection.poll(MOST_SECONDS):
                return self.connection.recv()
            verdict = ("HANG", f"not done after {MOST_SECONDS} s", 0)
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            verdict = ("CRASH", signal.Signals(-code).name if code < 0 else f"exit status {code}", 0)
        self.process.kill()
        self.process.join()
        self.start()
        return verdict

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


# The run -----------------------------------------------------------------------------------------------------------


def make_case(target: Target, pristine: Path, folder: Path, rng: Random) -> None:
    """The layout's files as links, and a broken one in the place of one of them."""
    for path in sorted((pristine / target.layout).rglob("*")):
        place = folder / path.relative_to(pristine / target.layout)
        if path.is_dir():
            place.mkdir(parents=True)
        elif place.name != Path(target.file).name:
            place.parent.mkdir(parents=True, exist_ok=True)
            if target.is_written:
                shutil.copy(path, place)
            else:
                os.link(path, place, follow_symlinks=False)
    place = folder / target.file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(target.breaker((pristine / target.layout / target.file).read_bytes(), rng))


def run(count: int, seed: int, only: int | None = None, keep: Path | None = None, start: str = "") -> int:
    """Number of failed cases, of targets whose names begin with `start`; the table of verdicts is printed."""
    failures = 0
    targets = {name: target for name, target in TARGETS.items() if name.startswith(start)}
    table: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in targets}
    peaks: dict[str, int] = dict.fromkeys(targets, 0)
    names, weights = list(targets), [target.weight for target in targets.values()]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        os.chdir(scratch)
        pristine = Path(scratch) / "pristine"
        pristine.mkdir()
        build_pristine(pristine)
        CACHE["victims"] = pristine / "victims"
        worker = Worker(pristine)
        for i in range(count) if only is None else (only,):
            rng = Random(f"{seed} {i}")
            name = names[i] if i < len(names) else rng.choices(names, weights)[0]
            folder = Path(scratch) / "case"
            folder.mkdir()
            make_case(TARGETS[name], pristine, folder, rng)
            verdict, message, peak = worker.load(name, folder)
            table[name][verdict] += 1
            peaks[name] = max(peaks[name], peak)
            if verdict not in ("loaded", "refused"):
                failures += 1
                print(f"case {i}, {name}: {verdict}: {message!r}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / str(i), symlinks=True, ignore=lambda _, names: ["pipe.safetensors"])
            elif only is not None:
                print(f"case {i}, {name}: {verdict}: {message}")
            shutil.rmtree(folder)
        worker.stop()
        os.chdir(ROOT)
    verdicts = sorted({verdict for counts in table.values() for verdict in counts}, key=lambda v: (v.isupper(), v))
    print(f"{'':32}{''.join(f'{verdict:>17}' for verdict in verdicts)}{'peak':>12}")
    for name, counts in table.items():
        print(f"{name:32}{''.join(f'{counts[v]:17}' for v in verdicts)}{peaks[name] / 2**20:8.0f} MiB")
    totals = sum(table.values(), collections.Counter())
    print(f"{'all':32}{''.join(f'{totals[v]:17}' for v in verdicts)}{max(peaks.values()) / 2**20:8.0f} MiB")
    print(f"{sum(totals.values())} cases, {failures} failed")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case and show its sentence")
    parser.add_argument("--keep", type=Path, help="copy the files of failed cases here")
    parser.add_argument("--target", default="", help="only targets whose names begin so, such as 'session values'")
    options = parser.parse_args()
    sys.exit(1 if run(options.count, options.seed, options.only, options.keep, options.target) else 0)
