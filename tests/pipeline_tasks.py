"""Small real tasks for the tests of the pipeline."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

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
    """Holds memory for a moment: of its own, in a process that it starts, or of a mapped file."""

    size_bytes: int
    seconds: float = 0.0
    where: Literal["own", "child", "mapped"] = "own"

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        (dst / "text").write_text(str(self.size_bytes))
        if self.where == "own":
            held = b"x" * self.size_bytes
            time.sleep(self.seconds)
            del held
        elif self.where == "child":
            code = f"import time; held = b'x' * {self.size_bytes}; time.sleep({self.seconds})"
            subprocess.run([sys.executable, "-c", code], check=True)
        else:
            with (dst / "zeros").open("w+b") as file:
                file.truncate(self.size_bytes)
                with mmap.mmap(file.fileno(), self.size_bytes) as pages:
                    for start in range(0, self.size_bytes, 4096):
                        pages[start] = 1
                    time.sleep(self.seconds)
            (dst / "zeros").unlink()


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
