"""Progress on stderr: a bar on a terminal, else a line now and then; nothing under two seconds.

stdout is data and never sees any of it.  In a step's process stderr is a log, and the terminal is
the descriptor that the variable ``EDGEDISTILL_PROGRESS_FD`` names.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

PROGRESS_FD = "EDGEDISTILL_PROGRESS_FD"
QUIET_SECONDS = 2.0
LINE_SECONDS = 30.0


def track(iterable: Iterable[Item], total: int | None = None, label: str = "") -> Iterator[Item]:
    """Yield the items, showing how many are done; ``total`` defaults to the iterable's length."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress_bar(total, label) as bar:
        for item in iterable:
            yield item
            bar.advance()


@contextmanager
def progress_bar(total: int | None, label: str) -> Iterator[Bar]:
    """A bar to :meth:`Bar.advance` by hand."""
    bar = Bar(total, label)
    try:
        yield bar
    finally:
        bar.close()


class Bar:
    """Counts work done, and shows it once it has taken over two seconds."""

    def __init__(self, total: int | None, label: str) -> None:
        self._total = total
        self._label = label
        self._done = 0
        self._started = time.monotonic()
        self._next_line = self._started + LINE_SECONDS
        self._progress: Progress | None = None

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self._done += count
        now = time.monotonic()
        if now - self._started < QUIET_SECONDS:
            return
        stream = _stream()
        if stream.isatty():
            self._draw(stream)
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            stream.write(f"  {self._label}: {self._done}/{self._total or '?'}\n")
            stream.flush()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()

    def _draw(self, stream: TextIO) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(file=stream), transient=True)
            self._progress.add_task(self._label, total=self._total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=self._done)


def _stream() -> TextIO:
    descriptor = os.environ.get(PROGRESS_FD)
    return _opened(int(descriptor)) if descriptor else sys.stderr


@cache
def _opened(descriptor: int) -> TextIO:
    try:
        return os.fdopen(descriptor, "w", encoding="utf-8")
    except OSError:  # a process that a step started does not inherit it
        return sys.stderr
