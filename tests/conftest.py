"""Environment that has to be set before Triton is first imported, and one mend to its interpreter."""

import contextlib
import os

# One thread: the suite shares its machine, and sums do not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests load no weights from the network; every checkpoint they use is made or shipped.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch  # which does not import Triton

# A GPU that this PyTorch cannot use is none, as for the tests' own choice of a device.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _mend_interpreter() -> None:
    """Triton 3.6 makes a number of an array of one element, the bound of a loop, as numpy 2.5 does no longer."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1" and np.lib.NumpyVersion(np.__version__) >= "2.5.0":
    with contextlib.suppress(ImportError):  # Triton is for Linux only
        import triton

        if triton.__version__.startswith("3.6."):
            _mend_interpreter()
