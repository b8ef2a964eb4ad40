"""LoRA files merged into a checkpoint as it is read: W + strength · s · B @ A, and the other changes such files hold.

s is alpha / rank, or alpha / √rank where the file's configuration says so, and 1 without an alpha. Several files act
one after the other. They are checked whole before anything of the checkpoint is read: every key is understood and
means a module that is there, the parts are complete, the shapes fit. Sources: LoRA (arXiv 2106.09685), rank-stabilised
scaling (2312.03732), DoRA (2402.09353).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.lora_changes import Change, Difference, Pair, cast, magnitude_axis
from miga_engine.weights.lora_keys import Scaling, parsed_keys, read_alpha, scale_of, scalings
from miga_engine.weights.untrusted import short

_CHUNK = 2**21  # values that are changed at a time
_log = logging.getLogger("miga_engine")


class Lora(NamedTuple):
    """An opened LoRA file and how strongly it acts: 1 as it was trained, 0 not at all, below 0 the other way."""

    checkpoint: Checkpoint
    strength: float = 1.0


class Names(NamedTuple):
    """What a family knows of the names in LoRA files.

    `official` gives the model's name for a module as a file calls it, or None; `is_left_out` is true of the modules,
    by that name, whose changes a model without them can do without; `size` says how large the model is ("30 blocks").
    """

    official: Callable[[str], str | None]
    is_left_out: Callable[[str], bool]
    size: str


def merged(base: Checkpoint, loras: Sequence[Lora], names: Names) -> Checkpoint:
    """The checkpoint with the changes of the LoRA files, in this order. Raises CheckpointError."""
    changes: dict[str, list[Change]] = {}
    for lora in loras:
        for key, change in _changes(base, lora, names):
            if lora.strength:
                changes.setdefault(key, []).append(change)
    return MergedCheckpoint(base, loras, changes)


def lora_fingerprint(checkpoint: Checkpoint) -> str:
    """A short name of what a LoRA file does, from its scale and sixteen numbers of each tensor."""
    digest = hashlib.blake2b(repr(sorted(scalings(checkpoint).items())).encode(), digest_size=8)
    for key, shape in sorted(checkpoint.shapes.items()):
        tensor = checkpoint.read(key)
        digest.update(f"{key} {shape} {tensor.dtype}".encode())
        flat = tensor.reshape(-1).real  # complex numbers are refused where they would be merged
        digest.update(cast(checkpoint, key, flat[:: max(1, flat.numel() // 16)][:16], torch.float64).numpy().tobytes())
    return digest.hexdigest()


class MergedCheckpoint(Checkpoint):
    """Another checkpoint with changes to some of its tensors, which come in float32; all others are as they were."""

    def __init__(self, base: Checkpoint, loras: Sequence[Lora], changes: Mapping[str, Sequence[Change]]) -> None:
        super().__init__(base.path)
        self._base = base
        self._loras = loras
        self._changes = changes
        self._scratch = torch.empty(0)
        self.shapes = base.shapes
        self.metadata = base.metadata

    def read(self, key: str) -> Tensor:
        return self._changed(key).clone() if self._changes.get(key) else self._base.read(key)

    def fill(self, key: str, out: Tensor) -> None:
        if self._changes.get(key):
            out.copy_(self._changed(key))
        else:
            self._base.fill(key, out)

    def copy(self, key: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        changes = self._changes.get(key)
        if not changes:
            return self._base.copy(key, device, dtype)
        if dtype != self._base.read_dtype(key) or not all(change.is_by_row for change in changes):
            return self._changed(key).to(device=device, dtype=dtype, copy=True)
        # In that dtype without a rounding, so that few rows at a time need be in float32.
        out = self._base.copy(key, torch.device("cpu"), dtype)
        step = max(1, _CHUNK // max(1, math.prod(self.shapes[key][1:])))
        for i in range(0, len(out), step):
            rows = slice(i, min(i + step, len(out)))
            part = out[rows].to(torch.float32, copy=True).contiguous()
            for change in changes:
                change.apply(part, rows)
            out[rows] = part
        return out.to(device)

    def read_dtype(self, key: str) -> torch.dtype:
        return torch.float32 if self._changes.get(key) else self._base.read_dtype(key)

    def _changed(self, key: str) -> Tensor:
        """In float32, in memory that the next one will be in too."""
        shape = self.shapes[key]
        if self._scratch.numel() == 0:
            self._scratch = torch.empty(max(math.prod(self.shapes[key]) for key in self._changes))
        tensor = self._scratch[: math.prod(shape)].view(shape)
        self._base.fill(key, tensor)
        for change in self._changes[key]:
            change.apply(tensor)
        return tensor

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._base.stored_dtype(key)

    def key_in_file(self, key: str) -> str:
        return self._base.key_in_file(key)

    def close(self) -> None:
        self._scratch = torch.empty(0)
        self._base.close()
        for lora in self._loras:
            lora.checkpoint.close()


class _Module(NamedTuple):
    """What a file changes in one module: what the file calls it, and the key of each part."""

    name: str
    keys: dict[str, str]


def _changes(base: Checkpoint, lora: Lora, names: Names) -> Iterator[tuple[str, Change]]:
    """Every change that a file makes, with the key whose tensor it changes, checked."""
    checkpoint, strength = lora
    said = scalings(checkpoint)
    modules = _modules(checkpoint, names)
    left_out = {name for name in modules if not _has(base, name) and names.is_left_out(name)}
    if left_out:
        more = f" and {len(left_out) - 1} more modules" if len(left_out) > 1 else ""
        what = short(next(name for name in modules if name in left_out)) + more
        _log.warning("%s also changes %s, which this model has not and does without", checkpoint.path, what)
    for name, module in modules.items():
        if name in left_out:
            continue
        keys = module.keys
        targets = {part: _target(base, checkpoint, name, part, names) for part in keys}
        if "down" in keys and "up" in keys:
            yield targets["up"], _pair(base, lora, module, targets["up"], said)
        if "up_bias" in keys:
            rank = checkpoint.shapes[keys["down"]][0]
            factor = strength * scale_of(said, module.name, rank, _alpha(checkpoint, keys))
            yield targets["up_bias"], _difference(base, checkpoint, keys["up_bias"], targets["up_bias"], factor)
        for part in ("weight", "bias", "modulation"):
            if part in keys:
                yield targets[part], _difference(base, checkpoint, keys[part], targets[part], strength)


def _modules(checkpoint: Checkpoint, names: Names) -> dict[str, _Module]:
    """By the model's name of it, each module of a LoRA file; all parts are of floats and come with what they need."""
    modules: dict[str, _Module] = {}
    path = checkpoint.path
    for key, (name, part) in parsed_keys(checkpoint).items():
        module = modules.setdefault(names.official(name) or name, _Module(name, {}))
        if part in module.keys:
            raise CheckpointError(
                f"{path} holds both {short(module.keys[part])} and {short(key)}, which mean the same: "
                "give a file of one LoRA"
            )
        module.keys[part] = key
        dtype = checkpoint.stored_dtype(key)
        if part != "alpha" and not dtype.is_floating_point:
            raise CheckpointError(
                f"{path} holds {short(key)} as {str(dtype).removeprefix('torch.')}, from which no change follows: "
                "give a LoRA in float weights"
            )
    for module in modules.values():
        keys = module.keys
        is_pair = keys.keys() & {"down", "up", "up_bias", "magnitude"} or keys.keys() == {"alpha"}
        if is_pair and (missing := {"down", "up"} - keys.keys()):
            raise CheckpointError(
                f"{path} holds {short(next(iter(keys.values())))} without "
                f"{' and '.join(f'its lora_{part}' for part in sorted(missing))}: download it again"
            )
    return modules


def _has(base: Checkpoint, module: str) -> bool:
    return any(f"{module}.{part}" in base.shapes for part in ("weight", "bias"))


def _target(base: Checkpoint, checkpoint: Checkpoint, name: str, part: str, names: Names) -> str:
    """The key of the model that a part changes."""
    ending = {"bias": "bias", "up_bias": "bias", "modulation": "modulation"}.get(part, "weight")
    key = f"{name}.{ending}"
    if key not in base.shapes and part == "weight":
        key = name  # a parameter of its own
    if key not in base.shapes and part != "alpha":
        what = short(key if _has(base, name) else name)
        raise CheckpointError(
            f"{checkpoint.path} changes {what}, and this model has {names.size} and nothing of that name: "
            "give a LoRA made for this model"
        )
    return key


def _pair(base: Checkpoint, lora: Lora, module: _Module, target: str, said: Mapping[str, Scaling]) -> Pair:
    checkpoint, keys = lora.checkpoint, module.keys
    down, up = checkpoint.shapes[keys["down"]], checkpoint.shapes[keys["up"]]
    if len(down) < 2 or len(up) < 2 or not down[0] or math.prod(up[1:]) != down[0]:
        raise CheckpointError(
            f"{checkpoint.path} holds {short(keys['down'])} {list(down)} and {short(keys['up'])} {list(up)}, which "
            "are not of one rank above 0: download it again"
        )
    shape, change = base.shapes[target], [up[0], math.prod(down[1:])]
    if len(shape) < 2 or [shape[0], math.prod(shape[1:])] != change:
        raise _misfit(checkpoint, target, change, shape)
    magnitude = keys.get("magnitude")
    if magnitude is not None and magnitude_axis(checkpoint.shapes[magnitude], shape) is None:
        raise _misfit(checkpoint, short(magnitude), checkpoint.shapes[magnitude], shape)
    scale = scale_of(said, module.name, down[0], _alpha(checkpoint, keys))
    return Pair(checkpoint, keys["down"], keys["up"], magnitude, scale, lora.strength)


def _difference(base: Checkpoint, checkpoint: Checkpoint, key: str, target: str, factor: float) -> Difference:
    if checkpoint.shapes[key] != base.shapes[target]:
        raise _misfit(checkpoint, target, checkpoint.shapes[key], base.shapes[target])
    return Difference(checkpoint, key, factor)


def _misfit(checkpoint: Checkpoint, what: str, given: Sequence[int], model: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} changes {what} as {list(given)} where the model has {list(model)}: "
        "give a LoRA made for this model"
    )


def _alpha(checkpoint: Checkpoint, keys: Mapping[str, str]) -> float | None:
    return read_alpha(checkpoint, keys["alpha"]) if "alpha" in keys else None
