"""Weights in eight bits with a scale: floats of them, by the one rule that all who write such files keep.

W = float(weight)·scale, the scale being one number, or one a row. Names: `X.scale_weight` (ComfyUI, Kijai),
`X.weight_scale` (newer ComfyUI, LightX2V). What such files say beside it is about activations in eight bits, and is
left out. A weight whose scale is missing would give pictures of nothing without any error, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import short

_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant", *_SCALES)
_MARK = "scaled_fp8"  # of a whole file
_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_TABLES = ("shared.weight", "embedding.weight", "embed_tokens.weight", "attention_bias.weight")  # looked up, unscaled
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_CHUNK = 2**18  # values that are unpacked at a time, which a processor keeps at hand
_MOST_BYTES = 2**16  # of what one layer says of its format


class ScaledCheckpoint(Checkpoint):
    """Another checkpoint whose scales are multiplied in, in float32, and gone. Raises CheckpointError."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source.path)
        self._source = source
        self.metadata = source.metadata
        self.is_held = source.is_held
        self.shapes = {key: shape for key, shape in source.shapes.items() if not _is_beside(key)}
        _refuse_formats(source)
        self._scale_of = {key: scale for key in self.shapes if (scale := _scale_of(source, key)) is not None}
        _refuse_left_over(source, self._scale_of.values())
        is_scaled = bool(self._scale_of) or any(key.endswith(_MARK) for key in source.shapes)
        for key in self.shapes:
            if key not in self._scale_of and key.endswith(".weight"):
                _refuse_unscaled(source, key, is_scaled)

    def read(self, key: str) -> Tensor:
        if key not in self._scale_of:
            return self._source.read(key)
        out = torch.empty(self.shapes[key])
        self.fill(key, out)
        return out

    def fill(self, key: str, out: Tensor) -> None:
        """Rounded once, from float32; values in fp8 by a table of the 256 that a byte can stand for."""
        if key not in self._scale_of:
            self._source.fill(key, out)
            return
        scale = self._source.read(self._scale_of[key]).float().reshape(-1, 1)
        if not bool(scale.isfinite().all()):
            name = self._source.key_in_file(self._scale_of[key])
            raise CheckpointError(f"{self.path} holds {name} with values that are not finite: download it again")
        weight = torch.atleast_1d(self._source.read(key)).unsqueeze(-1).flatten(1)
        rows, step = out.view(weight.shape), max(1, _CHUNK // max(1, weight.shape[1]))
        table = torch.arange(256, dtype=torch.uint8)
        values = table.view(weight.dtype).float().numpy() if weight.dtype in _FLOATS else None
        for i in range(0, len(weight), step):
            part = weight[i : i + step]
            if values is None:
                floats = part.to(torch.float32, copy=True)
            else:
                floats = torch.from_numpy(values.take(part.contiguous().view(torch.uint8).numpy(), mode="clip"))
            rows[i : i + step] = floats.mul_(scale if len(scale) == 1 else scale[i : i + step])

    def read_dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key in self._scale_of else self._source.read_dtype(key)

    def stored_dtype(self, key: str) -> torch.dtype:
        return torch.bits8 if key in self._scale_of else self._source.stored_dtype(key)

    def key_in_file(self, key: str) -> str:
        return self._source.key_in_file(key)

    def close(self) -> None:
        self._source.close()


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with floats for weights that are in eight bits; itself where none is. Raises CheckpointError."""
    is_quantized = any(_is_beside(key) or key.endswith((".qweight", ".absmax")) for key in checkpoint.shapes) or any(
        key.endswith(".weight") and checkpoint.stored_dtype(key) in (torch.int8, torch.uint8)
        for key in checkpoint.shapes
    )
    is_quantized = is_quantized or "_quantization_metadata" in checkpoint.metadata
    return ScaledCheckpoint(checkpoint) if is_quantized else checkpoint


def _is_beside(key: str) -> bool:
    return key.endswith(_BESIDE) or key.rpartition(".")[2] == _MARK


def _scale_of(source: Checkpoint, key: str) -> str | None:
    """The key of a weight's scale, whose shape is known to fit; None where there is none."""
    stored = source.stored_dtype(key)
    if not key.endswith(".weight") or not (stored.is_floating_point or stored is torch.int8):
        return None
    layer = key.removesuffix(".weight")
    scale = next((layer + suffix for suffix in _SCALES if layer + suffix in source.shapes), None)
    if scale is None:
        return None
    shape, num_rows = source.shapes[scale], source.shapes[key][:1]
    if shape not in ((), (1,), num_rows, (*num_rows, 1)) or not source.stored_dtype(scale).is_floating_point:
        dtype = str(source.stored_dtype(scale)).removeprefix("torch.")
        found, weight = short(str(list(shape))), short(str(list(source.shapes[key])))
        raise CheckpointError(
            f"{source.path} holds {source.key_in_file(scale)} as {dtype} {found}, which is neither one scale nor one "
            f"for each row of {weight}: give weights in fp8 or int8 with such scales, or in bf16"
        )
    return scale


def _refuse_unscaled(source: Checkpoint, key: str, is_scaled: bool) -> None:
    """CheckpointError where a weight without a scale is not one that was meant to have none."""
    dtype = source.stored_dtype(key)
    is_linear = len(source.shapes[key]) == 2 and not key.endswith(_TABLES)
    # fp8 without any scale is a format too
    if dtype is torch.int8 or (is_scaled and is_linear and dtype in _FLOATS):
        name, stored = source.key_in_file(key), str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source.path} holds {name} as {stored} without a {name.removesuffix('.weight')}.scale_weight or "
            ".weight_scale, and without its scale it is worth nothing: download it again"
        )


def _refuse_left_over(source: Checkpoint, used: Collection[str]) -> None:
    """CheckpointError where a scale is of no weight: it would be dropped without a word."""
    if over := next((key for key in source.shapes if key.endswith(_SCALES) and key not in used), None):
        raise CheckpointError(
            f"{source.path} holds {source.key_in_file(over)} and no weight that it scales: download it again"
        )


def _refuse_formats(source: Checkpoint) -> None:
    """CheckpointError for formats that pack several values into a byte, or scale blocks of a row."""
    for layer, format in _formats(source):
        if format not in _FORMATS:
            raise CheckpointError(
                f"{source.path} holds {short(layer)} in the format {short(format)}, which is not read: give weights in "
                f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}, in bf16, or as GGUF"
            )
    for key in source.shapes:
        is_packed = key.endswith((".weight_scale_2", ".qweight", ".qzeros", ".absmax", ".quant_map"))
        if is_packed or (key.endswith(".weight") and source.stored_dtype(key) is torch.uint8):
            raise CheckpointError(
                f"{source.path} holds {source.key_in_file(key)}, of a format that packs values of four bits (nvfp4, "
                "awq, bitsandbytes), which is not read: give weights in fp8 with scales, in bf16, or as GGUF"
            )


def _formats(source: Checkpoint) -> Iterator[tuple[str, str]]:
    """What a file says of its layers: (layer, format). Raises CheckpointError where it is no JSON of that form."""
    texts = {"": source.metadata["_quantization_metadata"]} if "_quantization_metadata" in source.metadata else {}
    try:
        for text in texts.values():
            for layer, said in json.loads(text)["layers"].items():
                yield str(layer), str(said["format"])
        for key in source.shapes:
            if key.endswith(".comfy_quant"):
                if source.stored_dtype(key) is not torch.uint8 or torch.Size(source.shapes[key]).numel() > _MOST_BYTES:
                    raise ValueError(f"{short(key)} is no text")
                said = json.loads(bytes(source.read(key).flatten().tolist()))
                yield key.removesuffix(".comfy_quant"), str(said["format"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{source.path} does not say how its weights are quantised ({short(str(error))}): download it again"
        ) from error
