"""A checkpoint brought into a network: built without memory, checked whole, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import first_line

Module = TypeVar("Module", bound=nn.Module)


class _Uninitialised(TorchFunctionMode):
    """`torch.nn.init` does nothing: on the meta device torch would import its compiler to draw numbers for nobody."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_module(
    build: Callable[[], Module],
    checkpoint: Checkpoint,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
    keeps_fp32: Callable[[str], bool] = lambda name: False,
) -> Module:
    """Build a module without memory, then give it the checkpoint's tensors one by one, cast on arrival.

    Keys and shapes must agree exactly. The module comes back in evaluation mode, without gradients. For the `meta`
    device no data are read; for any other the checkpoint is closed afterwards, so that nothing of it stays mapped.
    Raises CheckpointError.
    """
    try:
        with torch.device("meta"), _Uninitialised():
            module = build()
    except CheckpointError:
        raise
    except Exception as error:  # sizes that fit no network fail anywhere in its layers
        raise CheckpointError(
            f"{checkpoint.path} does not describe a network ({first_line(error)}): download it again"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_keys(checkpoint, expected)
    dtypes = {name: torch.float32 if keeps_fp32(name) else dtype for name in expected}
    return _filled(module, checkpoint, torch.device(device or "cpu"), dtypes)


def _filled(module: Module, checkpoint: Checkpoint, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Module:
    """The module, built on `meta`, with a checkpoint's tensors; on `meta` shapes are all that is wanted."""
    if device.type == "meta":
        shapes = checkpoint.shapes
        state = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name, dtype in dtypes.items()}
    else:
        state = {name: _copied(checkpoint, name, device, dtype) for name, dtype in dtypes.items()}
        checkpoint.close()
    module.requires_grad_(False)  # before it has tensors, for those of inference mode can have no gradients
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device).eval()


def _copied(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied off the map: the file may later change, and its alignment would decide how kernels round."""
    try:
        return checkpoint.copy(name, device, dtype)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{checkpoint.path} holds {checkpoint.key_in_file(name)} as {checkpoint.type_name(name)} "
            f"{list(checkpoint.shapes[name])}, which cannot be brought to {device} as "
            f"{str(dtype).removeprefix('torch.')} ({first_line(error)}): free memory or choose a smaller dtype"
        ) from error


def _check_keys(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    path, shapes = checkpoint.path, checkpoint.shapes
    has_config = any((folder / "config.json").is_file() for folder in (path, path.parent))
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]} {list(expected[missing[0]])}{_and_more(missing)}: "
            f"give the complete weights {'that belong to its config.json' if has_config else 'of the model'}"
        )
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        first = unexpected[0]
        raise CheckpointError(
            f"{path} holds {checkpoint.key_in_file(first)} {list(shapes[first])}{_and_more(unexpected)}, "
            "which this model has no place for: "
            f"give weights of the model {'that its config.json describes' if has_config else 'alone'}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            key = checkpoint.key_in_file(name)
            raise CheckpointError(
                f"{path} holds {key} as {list(shapes[name])} where the model has {list(shape)}: "
                f"give weights {'and config.json ' if has_config else ''}of one and the same model"
            )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
