"""Hashes of what files hold: the identity of every input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edgedistill.errors import InputError


def sha256_file(path: Path) -> str:
    """Sha256 of the bytes, as 64 hex digits.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def sha256_json(value: Any) -> str:
    """Sha256 of the canonical JSON (sorted keys, no spaces), as 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def files_below(path: Path) -> list[Path]:
    """All files of a directory, sorted by their relative path; hidden ones left out."""
    found = (p for p in path.rglob("*") if p.is_file())
    return sorted(
        (p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)),
        key=lambda p: p.relative_to(path).as_posix(),
    )


class ContentHashes:
    """Hashes of files and directories; each file is read once in the life of this object."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """The hash of a file's bytes, or of a directory's names and bytes."""
        if path.is_dir():
            return self.of_files(path, files_below(path))
        resolved = path.resolve()
        if resolved not in self._known:
            self._known[resolved] = sha256_file(resolved)
        return self._known[resolved]

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
        """The hash of some files of the directory ``root``, their relative names included."""
        return sha256_json({f.relative_to(root).as_posix(): self.of(f) for f in files})


def map_paths(value: Any, change: Callable[[Path], Any]) -> Any:
    """A copy of ``value`` with every ``Path`` in it changed; models stay models of their type.

    ``change`` has to return a Path where a model's field holds one.
    """
    if isinstance(value, Path):
        return change(value)
    if isinstance(value, BaseModel):
        fields = {name: map_paths(getattr(value, name), change) for name in value.model_fields_set}
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {key: map_paths(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_paths(item, change) for item in value)
    return value


def plain(value: Any, hashes: ContentHashes) -> Any:
    """``value`` as JSON data, every ``Path`` in it replaced by the hash of its contents."""
    if isinstance(value, Path):
        return {"sha256": hashes.of(value)}
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name), hashes) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): plain(item, hashes) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, hashes) for item in value]
    return value
