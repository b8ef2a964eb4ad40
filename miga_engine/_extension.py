"""The C++ CPU kernels (csrc/, built by setup.py into _C.so): loading them, and saying whether they are there.

Loading registers them with torch for the CPU; without them, or with MIGA_EXTENSION=0 in the environment, the ops'
eager implementations answer.
"""

import os
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("_C.so")


@cache
def load() -> bool:
    """Loads the library once; False if it is not wanted or was not built. One that is there but broken: OSError."""
    if not is_wanted() or not LIBRARY.is_file():
        return False
    import torch

    torch.ops.load_library(LIBRARY)
    return True


def is_wanted() -> bool:
    """Whether the environment asks for the kernels, as it does unless MIGA_EXTENSION is 0."""
    return os.environ.get("MIGA_EXTENSION") != "0"


def status() -> str:
    """One sentence for `miga info`."""
    if not is_wanted():
        return "C++ CPU kernels are left out, because MIGA_EXTENSION is 0; the ops run in eager PyTorch on CPUs."
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
