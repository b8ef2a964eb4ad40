"""Environment that has to be set before torch and Triton are first imported."""

import os
from pathlib import Path

HAS_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))

# One thread: the suite shares its machine, and sums do not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tests load no weights from the network; every checkpoint they use is made or shipped.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
