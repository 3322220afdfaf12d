"""What a run of GPTQ over a student goes on from: finished tensors, and what enters the next block.

``state.json`` is written last, aside and renamed, and names every file that it stands on with its
CRC-32: whatever it does not name is not there.  A killed process loses nothing that it wrote; a
machine that lost its power may, and then a sum does not fit and the run begins anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from edgedistill.document import Document
from edgedistill.safetensors_file import SafetensorsFile

STATE_FILE = "state.json"
READ_BYTES = 1 << 20

# What a quantized tensor is stored as: arrays by their names in a student.
Packed = dict[str, npt.NDArray[Any]]


class _Part(Document):
    """The quantized tensors of a file, in the order of their use, and the arrays of each."""

    file: str
    tensors: dict[str, list[str]]


class _State(Document):
    """Finished parts; CRC-32 by file, of those and of the hidden states that enter the next."""

    finished: list[_Part]
    crc32: dict[str, int]


class GptqState:
    """The state in a directory: as a killed run left it there, or nothing yet.

    Args:
        directory: that outlives a killed run, and serves one student and choice alone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state = _read(directory)

    @property
    def finished(self) -> int:
        """Parts that are done: embedding and head are the first, then each block is one."""
        return len(self._state.finished)

    def finish(self, tensors: Mapping[str, Packed], hidden: Iterable[Path]) -> None:
        """Count a part as done.

        Args:
            tensors: by the name of the matrix, in the order of their use.
            hidden: files in the directory that the next part starts from; those of the part
                before are not needed any more.
        """
        from safetensors.numpy import save_file

        file = f"part-{self.finished}.safetensors"
        save_file({n: a for arrays in tensors.values() for n, a in arrays.items()}, self._at(file))
        kept = {part.file: self._state.crc32[part.file] for part in self._state.finished}
        fresh = {path.name: _crc32(path) for path in (self._at(file), *hidden)}
        part = _Part(file=file, tensors={name: list(arrays) for name, arrays in tensors.items()})
        state = _State(finished=[*self._state.finished, part], crc32=kept | fresh)
        aside = self._at(f"{STATE_FILE}.new")
        aside.write_text(state.model_dump_json(), encoding="utf-8")
        aside.rename(self._at(STATE_FILE))
        self._state = state

    def tensors(self) -> Iterator[tuple[str, Packed]]:
        """All finished matrices, one by one, in the order of their use."""
        for part in self._state.finished:
            stored = SafetensorsFile(self._at(part.file))
            for name, arrays in part.tensors.items():
                yield name, {array: stored.read(array) for array in arrays}

    def _at(self, file: str) -> Path:
        return self.directory / file


def _read(directory: Path) -> _State:
    """What was left, if it is whole."""
    try:
        state = _State.model_validate_json((directory / STATE_FILE).read_bytes())
        whole = all(_crc32(directory / file) == crc for file, crc in state.crc32.items())
    except (FileNotFoundError, ValidationError):
        whole = False
    return state if whole else _State(finished=[], crc32={})


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
