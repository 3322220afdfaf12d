"""How much memory of its own a running process holds, with all that it started, seen from outside.

Counted is what only swapping could take away: anonymous memory, shared memory (files of a tmpfs
are that) and what is swapped already.  Pages of mapped files are not: where memory is short the
kernel drops them, or writes them to their file.  Linux alone tells them apart for another process
(``RssAnon``, ``RssShmem``, ``VmSwap`` of proc_pid_status(5)); elsewhere all resident memory counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgedistill.errors import StageError

INTERVAL_SECONDS = 0.2
COUNTED = ("RssAnon:", "RssShmem:", "VmSwap:")


class MemoryWatch:
    """The most that was seen, a look every ``INTERVAL_SECONDS``; a shorter peak may be missed.

    Args:
        pid: of the process; what it forks counts what it shares with it once more.
        limit_bytes: None: there is none.
    """

    def __init__(self, pid: int, limit_bytes: int | None) -> None:
        self._pid = pid
        self._limit_bytes = limit_bytes
        self._next_look = time.monotonic()
        self.peak_bytes = 0

    def look(self) -> None:
        """Look, if it is time to.

        Raises:
            StageError: more than the limit is held.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + INTERVAL_SECONDS
        held = sum(_own_bytes(pid) for pid in _family(self._pid))
        self.peak_bytes = max(self.peak_bytes, held)
        if self._limit_bytes is not None and held > self._limit_bytes:
            raise StageError(
                f"was stopped: it held {held / 1e9:.3g} GB of memory, "
                f"and the recipe allows {self._limit_bytes / 1e9:.3g} GB",
                where="build: peak_ram_gb",
                hint="allow more, or give the step less to hold (docs/builds.md says what decides "
                "it); finished steps and blocks are kept and the build goes on from there",
            )


def _family(pid: int) -> Iterator[int]:
    """The process and all that it started."""
    yield pid
    if sys.platform != "linux":
        try:
            yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
        except psutil.Error:
            return
        return
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(listed).split():
            yield from _family(int(child))


def _own_bytes(pid: int) -> int:
    if sys.platform != "linux":
        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return 0
    lines = (line.split() for line in _read(Path(f"/proc/{pid}/status")).splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0] in COUNTED)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""
