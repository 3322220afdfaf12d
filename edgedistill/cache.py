"""The content-addressed cache: a step's outputs under the hash of all that decides them.

<root>/steps/<key>/out/       what the step wrote
<root>/steps/<key>/step.json  the marker, written last: an entry without it does not exist
<root>/scratch/<key>/         a step at work; a rename to steps/ commits it
<root>/locks/<key>.lock       held while a step is at work; the kernel lets go of a dead holder
<root>/work/<key>/            what a killed step can go on from; weeks old ones are swept
<root>/logs/<key>.log         what a failed step said
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from edgedistill.content import files_below, sha256_file
from edgedistill.disk import disk_error

MARKER = "step.json"
WORK_SECONDS = 14 * 24 * 3600  # after which nobody is coming back for it


class FileRecord(BaseModel):
    """One file of an entry; the time of its last change betrays a write into the cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path, root: Path) -> FileRecord:
        """Hash and measure ``file``, a file below ``root``."""
        stat = file.stat()
        name = file.relative_to(root).as_posix()
        return cls(
            path=name,
            sha256=sha256_file(file),
            size_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
        )


class StepRecord(BaseModel):
    """The marker of a finished step.

    Attributes:
        fields: of its task, input files replaced by hashes of their contents.
        code: the code version; ``libraries`` the versions of the third-party code in it.
        inputs: name -> key of the step that made it.
        seconds: wall time.
        peak_rss_bytes: of its process, with pages of mapped files.
        peak_own_bytes: without, of the process and those that it started; 0: it was not looked at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    label: str
    task: str
    fields: dict[str, Any]
    code: str
    libraries: dict[str, str]
    inputs: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    peak_own_bytes: int = 0
    files: list[FileRecord]


class Cache:
    """Entries under one root directory, shared safely by any number of builds."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def out(self, key: str) -> Path:
        """Where the outputs of an entry lie."""
        return self.root / "steps" / key / "out"

    def log(self, key: str) -> Path:
        """Where the output of a failed step is kept."""
        return self.root / "logs" / f"{key}.log"

    def is_there(self) -> bool:
        """Whether the directory of finished steps still lies where they were put."""
        return (self.root / "steps").is_dir()

    def find(self, key: str) -> StepRecord | None:
        """The record of a finished step whose files are all as they were written."""
        marker = self.root / "steps" / key / MARKER
        try:
            record = StepRecord.model_validate_json(marker.read_bytes())
        except (OSError, ValidationError):
            return None
        return record if all(_unchanged(self.out(key), f) for f in record.files) else None

    def look_up(self, key: str) -> StepRecord | None:
        """The record of a finished step, wherever its files lie."""
        return self.find(key)

    def share(self, record: StepRecord) -> None:
        """Let other machines have a step that is finished here."""

    def fetch(self, key: str) -> StepRecord | None:
        """The record of a finished step, once its files lie here; the caller holds the lock."""
        return self.find(key)

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None]) -> Iterator[int]:
        """Hold the key; yields the lock's descriptor, for a child process to hold it too.

        Args:
            key: of the step.
            waiting: called once when another build holds it.
        """
        path = self.root / "locks" / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            if not _try_lock(descriptor):
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """An empty directory on the cache's own disk; whatever is left in it goes at the end.

        The caller holds the key's lock, so what an earlier holder left behind is nobody's.
        """
        path = self.root / "scratch" / key
        try:
            shutil.rmtree(path, ignore_errors=True)
            (path / "out").mkdir(parents=True)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def work(self, key: str) -> Path:
        """A directory that outlives a killed step, for what it may go on from.

        The caller holds the key's lock.
        """
        path = self.root / "work" / key
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    def end_work(self, key: str) -> None:
        """Remove what a step that is finished would have gone on from."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def commit(self, scratch: Path, record: StepRecord) -> None:
        """Make the contents of ``scratch/out`` the entry of ``record.key``."""
        final = self.root / "steps" / record.key
        try:
            for path in scratch.iterdir():
                if path.name != "out":
                    path.unlink()
            (scratch / MARKER).write_text(record.model_dump_json(indent=2), encoding="utf-8")
            self.forget(record.key)
            final.parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(final)
        except OSError as error:
            raise disk_error(error, final) from error

    def forget(self, key: str) -> None:
        """Remove an entry; its marker goes first, so that half an entry is none."""
        entry = self.root / "steps" / key
        (entry / MARKER).unlink(missing_ok=True)
        shutil.rmtree(entry, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed builds left; directories of living ones stay.

        What a step can go on from stays for two weeks, or until the step is finished.
        """
        for path in (self.root / "scratch").glob("*"):
            self._remove_if_free(path)
        for path in (self.root / "work").glob("*"):
            finished = (self.root / "steps" / path.name / MARKER).exists()
            if finished or _age_seconds(path) > WORK_SECONDS:
                self._remove_if_free(path)

    def _remove_if_free(self, path: Path) -> None:
        lock = self.root / "locks" / f"{path.name}.lock"
        if not lock.exists():
            return
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _try_lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def record_files(root: Path) -> list[FileRecord]:
    """Hash all files below ``root``."""
    return [FileRecord.of(file, root) for file in files_below(root)]


def _age_seconds(path: Path) -> float:
    """Since its last change; 0 where another build has just removed it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unchanged(root: Path, file: FileRecord) -> bool:
    try:
        stat = (root / file.path).stat()
    except OSError:
        return False
    return stat.st_size == file.size_bytes and stat.st_mtime_ns == file.mtime_ns
