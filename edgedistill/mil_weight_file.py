"""The weight file of an ``.mlpackage``: Core ML's blob storage, memory-mapped.

A header of 64 bytes (uint32 count, uint32 version 2), then for each blob 64 bytes of metadata
(uint32 sentinel, uint32 type, uint64 size, uint64 offset of its data) and the data, all aligned to
64 bytes.  Source: ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp`` and ``BlobDataType.hpp`` of
https://github.com/apple/coremltools.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
STORAGE_VERSION = 2
# BlobDataType -> its name
BLOB_TYPES: dict[int, str] = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    14: "int32",
}


class WeightFile:
    """The blobs of a weight file, mapped, not loaded.

    Raises:
        InputError: the file is missing, truncated or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be read ({error})", where=str(path)) from error
        if self._bytes.size < ALIGNMENT:
            raise self._damaged("shorter than its header")
        self._count, version = struct.unpack_from("<II", self._bytes[:8].tobytes())
        if version != STORAGE_VERSION:
            raise self._damaged(f"its version is {version}, not {STORAGE_VERSION}")

    @property
    def data_bytes(self) -> int:
        """Bytes of all blobs, headers and padding left out."""
        total, metadata = 0, ALIGNMENT
        for _ in range(self._count):
            _, start, size = self._blob(metadata)
            total += size
            metadata = -(-(start + size) // ALIGNMENT) * ALIGNMENT
        return total

    def read(self, offset: int, dtype: str) -> npt.NDArray[np.uint8]:
        """The bytes of the blob whose metadata lie at ``offset``, and which holds ``dtype``."""
        stored, start, size = self._blob(offset)
        if stored != dtype:
            raise self._damaged(f"the blob at {offset} holds {stored}, the program wants {dtype}")
        return self._bytes[start : start + size]

    def _blob(self, offset: int) -> tuple[str, int, int]:
        if offset + ALIGNMENT > self._bytes.size:
            raise self._damaged(f"a blob at byte {offset} of {self._bytes.size}")
        header = self._bytes[offset : offset + 24].tobytes()
        sentinel, kind, size, start = struct.unpack("<IIQQ", header)
        if sentinel != SENTINEL or kind not in BLOB_TYPES:
            raise self._damaged(f"no blob that is known here at byte {offset}")
        if start + size > self._bytes.size:
            raise self._damaged(
                f"the blob at {offset} ends at byte {start + size} of {self._bytes.size}"
            )
        return BLOB_TYPES[kind], start, size

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"not a whole Core ML weight file: {why}",
            where=str(self._path),
            hint="the file is truncated or damaged: export it again",
        )
