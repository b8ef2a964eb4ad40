"""One mend to Triton's interpreter, for the tests and for benchmarks that are tried without a GPU."""

import os


def mend() -> None:
    """Let loops of interpreted kernels run over bounds known at run time.

    Triton 3.6 makes a number of an array of one element there, as numpy 2.5 does no longer.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np

    if np.lib.NumpyVersion(np.__version__) < "2.5.0":
        return
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:  # Triton is for Linux only
        return
    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
