"""How much memory this process has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

# ru_maxrss counts kilobytes on Linux and bytes on macOS (getrusage(2)).
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process, or of a child that it has waited for.

    On Linux ``ru_maxrss`` survives exec and so starts at what the *parent* held; VmHWM does not.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_UNIT
    return max(_own_peak_bytes(), children)


def _own_peak_bytes() -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
