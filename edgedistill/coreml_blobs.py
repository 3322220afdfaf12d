"""Write the weight file of an ``.mlpackage`` blob by blob: no two weights lie in memory together.

Layout: a header of 64 bytes (uint32 count, uint32 version), then for each blob 64 bytes of metadata
(uint32 sentinel, uint32 type, uint64 size, uint64 place of the data, uint64 bits of padding in the
last byte) and the data, all aligned to 64 bytes.  Source:
``mlmodel/src/MILBlob/Blob/StorageFormat.hpp`` and ``BlobDataType.hpp`` of
https://github.com/apple/coremltools.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

_ALIGNMENT, _VERSION, _SENTINEL = 64, 2, 0xDEADBEEF
# MIL's word for a dtype -> (BlobDataType, bits of an element)
_KINDS: dict[str, tuple[int, int]] = {
    "fp16": (1, 16),
    "uint8": (3, 8),
    "int8": (4, 8),
    "int4": (8, 4),
    "uint2": (10, 2),
    "uint4": (11, 4),
    "uint3": (12, 3),
    "int32": (14, 32),
}


class BlobWriter:
    """A weight file, written from start to end.

    Args:
        path: of the new file, in a directory that is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._file.write(bytes(_ALIGNMENT))
        self._count = 0

    def write(self, name: str, kind: str, count: int, parts: Iterable[npt.NDArray[Any]]) -> int:
        """Append a blob.

        Args:
            name: of the constant, for errors.
            kind: MIL's word for its dtype, such as ``int4``.
            count: elements.
            parts: the stored bytes in order; elements narrower than a byte packed, the first in
                the low bits, without a gap between parts.

        Returns:
            The place of its metadata, which a program names.

        Raises:
            InputError: the parts are fewer or more bytes than so many elements take.
        """
        code, bits = _KINDS[kind]
        size = -(-count * bits // 8)
        place = self._align()
        record = struct.pack(
            "<IIQQQ", _SENTINEL, code, size, place + _ALIGNMENT, 8 * size - count * bits
        )
        self._file.write(record.ljust(_ALIGNMENT, b"\0"))
        written = sum(self._file.write(np.ascontiguousarray(part).data) for part in parts)
        if written != size:
            raise InputError(
                f"{name} has {written} bytes, {count} elements of {kind} take {size}",
                where=str(self._path),
                hint="the student's tensors do not fit together: make it again",
            )
        self._count += 1
        return place

    def close(self) -> None:
        """Write the header."""
        self._file.seek(0)
        self._file.write(struct.pack("<II", self._count, _VERSION))
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _align(self) -> int:
        place = self._file.tell()
        self._file.write(bytes(-place % _ALIGNMENT))
        return self._file.tell()
