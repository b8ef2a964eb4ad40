"""Processors that others want too: how the command's threads wait, how many there are, and a word when they starve.

OpenMP's threads spin while they wait for each other, for milliseconds by default. Where another process wants the
processor that one of them spins on, the one that is waited for does not run, and a network of small operations takes
twenty times as long. A short spin costs next to nothing where the processors are free.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

SPIN_COUNT = 2000
"""Turns that a thread of GNU's OpenMP waits before it sleeps (`bench/bench_shared.py` measures it)."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def share_processors(environment: MutableMapping[str, str] = os.environ) -> None:
    """For a process of our own, before torch is loaded: wait politely, with no more threads than there are processors.

    What the user has set stays as it is.
    """
    if "torch" in sys.modules:
        return
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        environment["KMP_BLOCKTIME"] = "0"  # milliseconds; of the OpenMP of LLVM and Intel
    quota = processor_quota()
    if "OMP_NUM_THREADS" not in environment and quota is not None and quota < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(quota)


def processor_quota(path: Path = _CGROUP) -> int | None:
    """Processors that a container may use, rounded up; None where it is not limited."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


class StarvationWatch:
    """Sees, from time to time, whether this process's threads are pushed off the processors they wait on."""

    LEAST_SECONDS = 10.0
    MOST_SWITCHES = (
        50.0  # a second, that a thread did not ask for; some 250 where it shares a processor, below 10 if not
    )

    def __init__(self) -> None:
        self._since, self._switches = time.monotonic(), _forced_switches()
        self._has_told = False

    def look(self) -> str | None:
        """What to say, the first time that there is something to say."""
        seconds = time.monotonic() - self._since
        if self._has_told or seconds < self.LEAST_SECONDS:
            return None
        switches = _forced_switches()
        rate = (switches - self._switches) / seconds
        self._since, self._switches = time.monotonic(), switches
        if rate < self.MOST_SWITCHES:
            return None
        self._has_told = True
        return (
            f"other processes want the processors of this one ({rate:.0f} forced switches a second): give it fewer "
            "threads (OMP_NUM_THREADS), and let them sleep while they wait (GOMP_SPINCOUNT=0, before torch is loaded)"
        )


def _forced_switches() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
