"""Read a safetensors file lazily, a tensor at a time, and write a set of tensors in shards.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, a JSON header,
then the data).  The reader is ours because the library's numpy door knows no bfloat16 and loads
eagerly; it checks every offset before it believes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

MAX_HEADER_BYTES = 100_000_000
STORED_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "I8": "|i1",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``dtype`` by safetensors' own name, ``start`` in bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class SafetensorsFile:
    """The tensors of one file; opening reads the header alone.

    Raises:
        InputError: the file is missing, truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = _read_header(path)

    def split_rows(self, name: str, parts: Mapping[str, int]) -> None:
        """Give the rows of a tensor names of their own, in the place of its: nothing is read.

        Args:
            name: of the tensor, a matrix or a vector.
            parts: name -> rows, in their order; together they are all of them.

        Raises:
            InputError: the tensor has another number of rows.
        """
        whole, rows = self.tensors[name], sum(parts.values())
        if not whole.shape or whole.shape[0] != rows:
            raise InputError(
                f"{name} of shape {whole.shape} does not hold the {rows} rows of "
                f"{', '.join(parts)} together",
                where=str(self.path),
            )
        del self.tensors[name]
        row_bytes, start = whole.size_bytes // rows, whole.start
        for part, count in parts.items():
            shape, size_bytes = (count, *whole.shape[1:]), count * row_bytes
            self.tensors[part] = StoredTensor(whole.dtype, shape, start, size_bytes)
            start += size_bytes

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """The tensor, or some of its rows, as stored; bfloat16 widened to float32 (exactly)."""
        tensor = self.tensors[name]
        if tensor.size_bytes == 0:
            return np.zeros(tensor.shape, dtype=STORED_DTYPES[tensor.dtype])
        data: npt.NDArray[Any] = np.memmap(
            self.path,
            dtype=STORED_DTYPES[tensor.dtype],
            mode="r",
            offset=tensor.start,
            shape=tensor.shape or (1,),
        )
        if rows is not None:
            data = data[rows]
        shape = tensor.shape if rows is None else data.shape
        if tensor.dtype == "BF16":
            widened = data.astype(np.uint32) << np.uint32(16)
            return widened.view(np.float32).reshape(shape)
        return np.array(data).reshape(shape)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes, the file has {file_bytes}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table")
    header.pop("__metadata__", None)
    return {name: _check_entry(path, name, e, 8 + length, file_bytes) for name, e in header.items()}


def _check_entry(path: Path, name: str, entry: Any, base: int, file_bytes: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(path, f"the entry of {name} is malformed") from error
    if dtype not in STORED_DTYPES:
        raise InputError(
            f"{name} has the dtype {dtype}, which edgedistill does not read",
            where=str(path),
            hint=f"convert the checkpoint to one of {', '.join(STORED_DTYPES)}",
        )
    size = math.prod(shape) * np.dtype(STORED_DTYPES[dtype]).itemsize
    if begin < 0 or any(n < 0 for n in shape) or end - begin != size:
        raise _damaged(path, f"{name} of shape {shape} has {end - begin} bytes, not {size}")
    if base + end > file_bytes:
        raise _damaged(path, f"{name} ends at byte {base + end}, the file at {file_bytes}")
    return StoredTensor(dtype, shape, base + begin, size)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"not a whole safetensors file: {why}",
        where=str(path),
        hint="the file is truncated or damaged: copy or download it again",
    )
