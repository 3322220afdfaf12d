"""Read a GGUF file lazily: the header at once, a tensor when it is asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  The reader is ours because the
``gguf`` package's believes every length that the file states, and a damaged file makes it loop or
raise from deep inside numpy; this one holds each length against the file's size first.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError, UnavailableError
from edgedistill.gguf_blocks import Q2_0
from edgedistill.quantized import unpack_codes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
# Value types 0..12 of the specification; 8 is a string, 9 an array.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        type_id: ggml's number of the block type.
        shape: rows first, as numpy has it (the file states the reverse).
        start: first byte in the file.
        size_bytes: length of its blocks.
    """

    type_id: int
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class GgufFile:
    """Metadata and tensors of one file.

    Attributes:
        metadata: key -> str, bool, int, float, or a list of one of them.
        tensors: name -> place.

    Raises:
        InputError: the file is missing, truncated, or not a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if file.read(4) != MAGIC:
                    raise InputError(
                        "is not a GGUF file: it does not begin with GGUF", where=str(path)
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    header = _Header(path, data)
                    self.metadata, self.tensors = header.read()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, a row of the tensor a row: uint8 [..., bytes of a row]."""
        tensor = self.tensors[name]
        shape = (*tensor.shape[:-1], tensor.size_bytes // max(1, math.prod(tensor.shape[:-1])))
        if tensor.size_bytes == 0:
            return np.zeros(shape, dtype=np.uint8)
        return np.memmap(self.path, np.uint8, "r", tensor.start, shape)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, dequantized by the ``gguf`` package."""
        tensor, blocks = self.tensors[name], self.blocks(name)
        if tensor.type_id == Q2_0.type_id:
            return _dequantize_q2_0(blocks)
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        try:
            values = gguf.quants.dequantize(blocks, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{name} has the type {kind.name}, which is not read", where=str(self.path)
            ) from error
        return np.array(values, dtype=np.float32).reshape(tensor.shape)


class _Header:
    """A cursor over the header that never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 4
        self._size = len(data)

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._scalar("I")
        if version not in VERSIONS:
            raise InputError(
                f"is GGUF version {version}; versions {VERSIONS} are read", where=str(self._path)
            )
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return metadata, {info[0]: self._place(*info, base) for info in infos}

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, base: int
    ) -> GgufTensor:
        block, block_bytes = _block_size(type_id, name, self._path)
        if not shape or shape[-1] % block:
            raise self._damaged(f"{name} of shape {shape} does not divide into blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if base + offset + size > self._size:
            raise self._damaged(
                f"{name} ends at byte {base + offset + size}, the file at {self._size}"
            )
        return GgufTensor(type_id, shape, base + offset, size)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise self._damaged(f"a value has the unknown type {kind}")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in SCALARS:
            code = SCALARS[inner]
            start = self._advance(count * struct.calcsize(code))
            return list(struct.unpack_from(f"<{count}{code}", self._data, start))
        if inner != STRING:
            raise self._damaged(f"a list holds values of the type {inner}")
        return [self._string() for _ in range(count)]

    def _scalar(self, code: str) -> Any:
        start = self._advance(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._advance(length)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"the string at byte {start} is not UTF-8") from error

    def _advance(self, count: int) -> int:
        start = self._at
        if count > self._size - start:
            raise self._damaged(
                f"byte {start} of its header asks for {count} more, the file has {self._size}"
            )
        self._at += count
        return start

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"not a whole GGUF file: {why}",
            where=str(self._path),
            hint="the file is truncated or damaged: copy or download it again",
        )


def gguf_package() -> Any:
    """The ``gguf`` package, which is imported when it is needed.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UnavailableError(
            f"the gguf package is not installed ({error})", hint="pip install 'edgedistill[gguf]'"
        ) from error
    return gguf


def _block_size(type_id: int, name: str, path: Path) -> tuple[int, int]:
    if type_id == Q2_0.type_id:
        return Q2_0.block, Q2_0.block_bytes
    gguf = gguf_package()
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{name} has the tensor type {type_id}, which is not known here", where=str(path)
        ) from error
    return block, block_bytes


def _dequantize_q2_0(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    # The gguf package 0.19 does not know the type: w = (code - 1) * scale.
    parts = np.asarray(blocks).reshape(blocks.shape[0], -1, Q2_0.block_bytes)
    scales = np.ascontiguousarray(parts[..., :2]).view("<f2").astype(np.float32)
    codes = unpack_codes(parts[..., 2:], 2, Q2_0.block).astype(np.float32)
    return ((codes - 1.0) * scales).reshape(blocks.shape[0], -1)
