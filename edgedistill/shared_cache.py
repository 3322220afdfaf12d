"""A cache that machines share: any file system that fsspec opens, behind a cache on this disk.

<url>/files/<sha256>    what outputs hold, each file once, under the hash of its bytes
<url>/steps/<key>.json  the marker of a finished step: which files, written after all of them

A step is looked up by its marker alone; files come when something reads them, and are hashed as
they come.  Nothing is locked between machines: two that run a step at once write the same files,
and the later marker stays.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from edgedistill.cache import Cache, FileRecord, StepRecord, record_files
from edgedistill.content import sha256_file
from edgedistill.disk import FULL, disk_error
from edgedistill.errors import EdgedistillError, UnavailableError, UsageError


class SharedCache(Cache):
    """Steps on this disk, and behind it those that other machines finished.

    Args:
        root: the directory on this machine.
        url: of the shared files, such as ``s3://bucket/prefix`` or ``file:///mnt/shared``.

    Raises:
        UsageError: no file system answers to such a URL.
        UnavailableError: the package that does is not installed.
    """

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        self.store = Store(url)

    def is_there(self) -> bool:
        """Always: what this machine lacks is fetched."""
        return True

    def look_up(self, key: str) -> StepRecord | None:
        """The record of a step that is finished here or anywhere; no file of it is fetched.

        Raises:
            UnavailableError: the shared files cannot be reached.
        """
        return self.find(key) or self.store.read_marker(key)

    def share(self, record: StepRecord) -> None:
        """Push a step that is finished here alone, perhaps because the other side was away.

        Raises:
            UnavailableError: the shared files cannot be reached.
        """
        if self.find(record.key) is not None and self.store.read_marker(record.key) is None:
            self._push(record)

    def fetch(self, key: str) -> StepRecord | None:
        """The record of a finished step, once its files lie here; the caller holds the lock.

        None where there is no such step, or what came is not what was written; then the shared
        entry is removed, and running the step writes it anew.

        Raises:
            UnavailableError: the shared files cannot be reached.
            StageError: this disk does not take them.
        """
        record = self.find(key) or self.store.read_marker(key)
        if record is None or self.find(key) is not None:
            return record
        with self.scratch(key) as scratch:
            damaged = [f for f in record.files if not self._pull(f, scratch / "out")]
            if damaged:
                self.store.remove(key, damaged)
                return None
            here = record.model_copy(update={"files": record_files(scratch / "out")})
            super().commit(scratch, here)
        return here

    def commit(self, scratch: Path, record: StepRecord) -> None:
        """As of any cache, and push it.

        Raises:
            UnavailableError: the shared files cannot be reached; the step is finished here.
        """
        super().commit(scratch, record)
        self._push(record)

    def _push(self, record: StepRecord) -> None:
        for file in record.files:
            self.store.put(self.out(record.key) / file.path, file.sha256)
        self.store.write_marker(record)

    def _pull(self, file: FileRecord, out: Path) -> bool:
        """Whether the file came as it was written."""
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:  # no step writes outside its output
            return False
        return self.store.get(file.sha256, out / path)


class Store:
    """Files by the hash of their bytes, and markers by their keys, on one fsspec file system."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._files, self._root = url_to_fs(self.url)
        except ImportError as error:
            raise UnavailableError(
                f"{url}: {error}", hint="s3:// needs the package s3fs, gs:// gcsfs, az:// adlfs"
            ) from error
        except ValueError as error:
            raise UsageError(
                f"--cache {url}: {error}",
                hint="a directory, or a URL such as s3://bucket/prefix or file:///mnt/shared",
            ) from error

    def read_marker(self, key: str) -> StepRecord | None:
        """The record of a finished step; None where there is none, or it is damaged."""
        with self._reaching():
            try:
                return StepRecord.model_validate_json(self._files.cat_file(self._marker(key)))
            except (FileNotFoundError, ValidationError):
                return None

    def write_marker(self, record: StepRecord) -> None:
        """Make a step known, all of whose files are there."""
        data = record.model_dump_json(indent=2).encode()
        with self._reaching():
            self._write(self._marker(record.key), lambda to: self._files.pipe_file(to, data))

    def put(self, path: Path, sha256: str) -> None:
        """Write a file, unless one of that hash and size is there."""
        with self._reaching():
            name = self._file(sha256)
            with suppress(FileNotFoundError):
                if self._files.info(name)["size"] == path.stat().st_size:
                    return
            self._write(name, lambda to: self._files.put_file(str(path), to))

    def get(self, sha256: str, path: Path) -> bool:
        """Read a file to ``path``; False where there is none, or its hash is another one."""
        with self._reaching():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._file(sha256), str(path))
            except FileNotFoundError:
                return False
        return sha256_file(path) == sha256

    def remove(self, key: str, damaged: list[FileRecord]) -> None:
        """Remove a marker, then files that are not what their names say."""
        with self._reaching():
            for name in (self._marker(key), *(self._file(f.sha256) for f in damaged)):
                with suppress(FileNotFoundError):
                    self._files.rm_file(name)

    def _marker(self, key: str) -> str:
        return f"{self._root}/steps/{key}.json"

    def _file(self, sha256: str) -> str:
        return f"{self._root}/files/{sha256}"

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        """Write a file that is there whole or not at all."""
        from fsspec.implementations.local import LocalFileSystem

        # On a disk a rename makes it so; a store of objects does it by itself.
        on_disk = isinstance(self._files, LocalFileSystem)
        target = f"{name}.{uuid.uuid4().hex}.part" if on_disk else name
        try:
            write(target)
        except FileNotFoundError:
            self._files.makedirs(name.rpartition("/")[0], exist_ok=True)
            write(target)
        if on_disk:
            Path(target).replace(name)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except EdgedistillError:
            raise
        # Each file system raises errors of its own: of credentials, HTTP, the network.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_error(error, Path(error.filename or self.url)) from error
            raise UnavailableError(
                f"the shared cache cannot be used: {str(error) or type(error).__name__}",
                where=self.url,
                hint="check the address, the credentials and the network; "
                "finished steps are kept on this machine",
            ) from error
