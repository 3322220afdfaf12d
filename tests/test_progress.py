from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from edgedistill import progress
from edgedistill.progress import progress_bar, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one; nothing waits."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.delenv(progress.PROGRESS_FD, raising=False)
    return now


def spend(clock: list[float], seconds: float, count: int) -> Iterator[int]:
    for number in range(count):
        clock[0] += seconds
        yield number


def test_quick_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(spend(clock, 0.1, 10), total=10, label="quick")) == list(range(10))
    assert capsys.readouterr() == ("", "")


def test_long_work_writes_a_line_now_and_then_to_stderr(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    list(track(spend(clock, 10.0, 7), total=7, label="slow"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "  slow: 3/7\n  slow: 6/7\n"


def test_a_length_that_is_unknown_is_a_question_mark(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(None, "open") as bar:
        clock[0] = 31.0
        bar.advance(5)
    assert capsys.readouterr().err == "  open: 5/?\n"


def read_to_end(master: int) -> str:
    """All that a terminal was given; it comes in pieces, and its other side must be closed."""
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: no writer is left
        while piece := os.read(master, 65536):
            drawn += piece
    return drawn.decode()


def test_a_terminal_gets_a_bar_that_goes_away(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = os.openpty()
    monkeypatch.setenv(progress.PROGRESS_FD, str(slave))
    monkeypatch.setenv("TERM", "xterm")
    list(track(spend(clock, 3.0, 4), total=4, label="drawing"))
    os.close(slave)
    drawn = read_to_end(master)
    assert "drawing" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is back
    os.close(master)
