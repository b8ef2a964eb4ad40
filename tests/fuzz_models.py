"""A model's files broken: safetensors, GGUF, indexes, pickles, merges of a tokenizer."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from fuzz_values import CANARY, Random, any_value, break_bytes, break_json, break_tree, dump


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


@dataclasses.dataclass
class GgufTensor:
    """A line of the table of a GGUF file."""

    name: bytes
    dims: list[int]
    kind: int
    offset: int


def gguf_text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def split_gguf(data: bytes) -> tuple[list[bytes], list[GgufTensor], bytes]:
    """Key-value pairs, table and numbers of a file whose values are strings and integers of 32 bits."""
    stream = io.BytesIO(data)

    def number(code: str) -> int:
        return struct.unpack("<" + code, stream.read(struct.calcsize("<" + code)))[0]

    stream.seek(8)
    num_tensors, num_pairs = number("Q"), number("Q")
    pairs, tensors = [], []
    for _ in range(num_pairs):
        start = stream.tell()
        stream.seek(number("Q"), 1)
        stream.seek(number("Q") if number("I") == 8 else 4, 1)
        pairs.append(data[start : stream.tell()])
    for _ in range(num_tensors):
        name = stream.read(number("Q"))
        dims = [number("Q") for _ in range(number("I"))]
        tensors.append(GgufTensor(name, dims, number("I"), number("Q")))
    return pairs, tensors, data[-(-stream.tell() // 32) * 32 :]


def join_gguf(
    pairs: list[bytes], tensors: list[GgufTensor], body: bytes, counts: tuple[int, int] | None = None
) -> bytes:
    head = b"GGUF\3\0\0\0" + struct.pack("<QQ", *(counts or (len(tensors), len(pairs)))) + b"".join(pairs)
    for tensor in tensors:
        head += gguf_text(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
        head += struct.pack("<IQ", tensor.kind, tensor.offset)
    return head + b"\0" * (-len(head) % 32) + body


def break_gguf(data: bytes, rng: Random) -> bytes:
    pairs, tensors, body = split_gguf(data)
    tensor, other = rng.choice(tensors), rng.choice(tensors)
    huge = rng.choice((0, 1, 32, 2**16, 2**32, 2**60, 2**63, 2**64 - 1, rng.randrange(2**24)))
    kind = rng.randrange(12)
    if kind == 0:
        return break_bytes(data[: rng.choice((200, 5000, len(data)))], rng)
    if kind == 1:
        counts = (huge, len(pairs)) if rng.random() < 0.5 else (len(tensors), huge)
        return join_gguf(pairs, tensors, body, counts)
    if kind == 2:
        tensor.dims = [huge if rng.random() < 0.5 else n for n in tensor.dims]
    elif kind == 3:  # a product beyond 64 bits, or one that wraps around to the right size
        tensor.dims = rng.choice(
            ([2**32, 2**32], [2**62, 4], [32, 2**62], [2**63, 0], [1] * 5000, [], tensor.dims[::-1])
        )
    elif kind == 4:
        tensor.kind = rng.choice((*range(42), 77, 2**32 - 1))
    elif kind == 5:
        tensor.offset = rng.choice((other.offset, tensor.offset + 4, huge & ~31, huge))
    elif kind == 6:
        number = rng.choice((b"10", b"999999", b"9" * 30, b"-1", b"\xd9\xa3", b""))
        digits = b"".join(bytes([c]) if not 48 <= c < 58 else number for c in tensor.name)
        tensor.name = rng.choice((digits, b"a\nb", b"\x1b[31m", b"\0", b"", b"x" * 100_000, b"\xff", other.name))
    elif kind == 7:  # the shape that it once had
        shape = rng.choice(([0], [-1, -1], tensor.dims, [2**31 - 1] * 3, [1] * 70, [*tensor.dims, 1], []))
        value = struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *(n % 2**31 for n in shape))
        pairs.append(gguf_text(b"comfy.gguf.orig_shape." + tensor.name) + struct.pack("<I", 9) + value)
    elif kind == 8:
        pairs.append(gguf_text(b"general.alignment") + struct.pack("<II", rng.choice((4, 5, 6)), huge % 2**32))
    elif kind == 9:  # arrays that are longer than the file, of arrays, of nothing
        value = struct.pack("<IIQ", 9, rng.choice((0, 4, 7, 8, 9, 12, 13)), huge)
        pairs.append(gguf_text(rng.choice((b"x", b"tokenizer.ggml.tokens"))) + value + rng.randbytes(64))
    elif kind == 10:
        pairs.insert(0, struct.pack("<Q", huge) + rng.randbytes(rng.choice((0, 8, 300))))
    else:  # any bits as numbers and scales
        start = rng.randrange(len(body))
        body = body[:start] + rng.randbytes(min(3000, len(body) - start)) + body[start + 3000 :]
    return join_gguf(pairs, tensors, body)


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
