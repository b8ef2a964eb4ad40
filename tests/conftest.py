"""Environment that has to be set before Triton is first imported."""

import os

import interpreter

# One thread: the suite shares its machine, and sums do not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests load no weights from the network; every checkpoint they use is made or shipped.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # which does not import Triton

# A GPU that this PyTorch cannot use is none, as for the tests' own choice of a device.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreter.mend()
