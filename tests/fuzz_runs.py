"""What a run is told broken: YAML, session files, videos, the options of a request."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

from fuzz_models import break_safetensors, split_safetensors
from fuzz_values import CACHE, CANARY, Random, any_value, break_bytes, break_tree


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
