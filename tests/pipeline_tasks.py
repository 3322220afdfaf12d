"""Small real tasks for the tests of the pipeline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from edgedistill.errors import InputError, UnavailableError
from edgedistill.task import Task


class Write(Task):
    """Writes a text, after those of its inputs; a line in ``witness`` tells that it ran."""

    text: str
    witness: str = ""
    seconds: float = 0.0

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        if self.witness:
            with Path(self.witness).open("a") as file:
                file.write(f"{self.text}\n")
        (dst / "half").write_text(self.text)
        time.sleep(self.seconds)
        before = "".join((path / "text").read_text() for path in inputs.values())
        (dst / "half").rename(dst / "text")
        (dst / "text").write_text(before + self.text)


class Orphan(Task):
    """Kills what started its process, and so itself, as often as ``witness`` tells of less."""

    witness: str
    times: int

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        with Path(self.witness).open("a") as file:
            file.write("begun\n")
        if len(Path(self.witness).read_text().splitlines()) <= self.times:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        (dst / "text").write_text("at last")


class Copy(Task):
    """Copies a file; its contents are part of the key."""

    source: Path

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        (dst / "text").write_bytes(self.source.read_bytes())


class Fill(Task):
    """Writes zeros."""

    size_bytes: int

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        with (dst / "zeros").open("wb") as file:
            for _ in range(self.size_bytes // 4096):
                file.write(bytes(4096))


class Hold(Task):
    """Holds memory for a moment."""

    size_bytes: int

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        (dst / "text").write_text(str(len(b"x" * self.size_bytes)))


class Fail(Task):
    """Ends in one of the ways in which a step can fail."""

    how: str

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        (dst / "half").write_text("half")
        if self.how == "input":
            raise InputError("the value 7 is wrong", where="file.json: key", hint="make it 8")
        if self.how == "unavailable":
            raise UnavailableError("the device is away")
        if self.how == "bug":
            raise ZeroDivisionError("a bug in a stage")
        os.write(2, b"native code says goodbye\n")
        os.kill(os.getpid(), signal.Signals[self.how])
