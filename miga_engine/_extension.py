"""The C++ CPU kernels (csrc/, built by setup.py into _C.so): loading them, and saying whether they are there.

Loading registers them with torch for the CPU; without them the ops' eager implementations answer.
"""

from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("_C.so")


@cache
def load() -> bool:
    """Loads the library once; False if it was not built. A library that is there but broken raises OSError."""
    if not LIBRARY.is_file():
        return False
    import torch

    torch.ops.load_library(LIBRARY)
    return True


def status() -> str:
    """One sentence for `miga info`."""
    try:
        is_loaded = load()
    except OSError as error:
        return f"C++ CPU kernels do not load ({error}): reinstall miga_engine to rebuild them for this torch."
    if is_loaded:
        return f"C++ CPU kernels are loaded from {LIBRARY}."
    return (
        "C++ CPU kernels were not built, because no working C++ compiler or no torch was found at installation; the "
        "ops run in eager PyTorch (reinstall with MIGA_BUILD_EXT=1 to see the reason)."
    )
