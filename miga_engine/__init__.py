"""miga_engine: endless, consistent video from short-clip diffusion models, without training.

Importing this package imports nothing heavy: the public names below are loaded when they are first used.
"""

import logging
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine._version import __version__
from miga_engine.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DriftError,
    MigaError,
    NumericsError,
    OutputError,
    SessionError,
)

if TYPE_CHECKING:
    from miga_engine.config import MigaConfig
    from miga_engine.engine import Engine, Video
    from miga_engine.runtime.stream import Chunk, Event, Stream

__all__ = [
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DeviceError",
    "DriftError",
    "Engine",
    "Event",
    "MigaConfig",
    "MigaError",
    "NumericsError",
    "OutputError",
    "SessionError",
    "Stream",
    "Video",
    "__version__",
]

# Without it, records that the application does not ask for would be printed.
logging.getLogger("miga_engine").addHandler(logging.NullHandler())

_LAZY = {
    "MigaConfig": "config",
    **dict.fromkeys(("Engine", "Video"), "engine"),
    **dict.fromkeys(("Chunk", "Event", "Stream"), "runtime.stream"),
}
_KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _CheckoutKernels:
    """Resolves miga_engine.kernels to ../kernels in a source checkout, where no installer has mapped it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "miga_engine.kernels":
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(_KERNELS)]
        return spec


if _KERNELS.is_dir() and _KERNELS.with_name("setup.py").is_file():
    sys.meta_path.append(_CheckoutKernels)
