"""Grids and quantized tensors: integers decided once, carried by every format.

A weight on a grid is ``w = (code - zero) * scale``, with one float16 scale (and one integer zero
point) for each group of consecutive weights along a row, the input dimension.  Codes are unsigned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

Bits = Literal[2, 3, 4, 5, 8]
ZeroKind = Literal["fixed", "integer"]

# A change is folded into a matrix of so many bits; fewer would round most of a small one away.
FOLDED_FROM_BITS = 8

FIXED_ZERO: dict[int, int] = {2: 1, 3: 4, 4: 8, 5: 16, 8: 128}


@dataclass(frozen=True)
class Grid:
    """A set of representable weights.

    Attributes:
        bits: width of a code: 2, 3, 4, 5 or 8.
        group_size: consecutive weights of a row that share a scale.
        zero: ``fixed`` (the same zero point everywhere, see ``FIXED_ZERO``) or ``integer``
            (one unsigned zero point a group, as wide as a code).
    """

    bits: Bits
    group_size: int
    zero: ZeroKind = "fixed"

    @property
    def fixed_zero(self) -> int:
        """The zero point of a ``fixed`` grid: 1 for 2 bits, from 3 bits on half of all codes."""
        return FIXED_ZERO[self.bits]

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def bits_per_weight(self) -> float:
        """Bits of code, float16 scale and zero point for one weight, without any padding."""
        zero_bits = self.bits if self.zero == "integer" else 0
        return self.bits + (16 + zero_bits) / self.group_size

    def __str__(self) -> str:
        """Such as ``int4 group 32 (integer zero)``."""
        return f"int{self.bits} group {self.group_size} ({self.zero} zero)"


@dataclass(frozen=True)
class QTensor:
    """A matrix on a grid.

    Attributes:
        grid: where the values live.
        codes: uint8 [rows, columns], one code an element, not packed.
        scales: float16 [rows, columns / group_size].
        zeros: uint8 [rows, columns / group_size] on an ``integer`` grid, else None.
    """

    grid: Grid
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Refuse shapes and dtypes that do not belong together."""
        rows, columns = self.codes.shape
        groups = (rows, columns // self.grid.group_size)
        if columns % self.grid.group_size or self.scales.shape != groups:
            raise InputError(
                f"codes {self.codes.shape} and scales {self.scales.shape} do not fit {self.grid}"
            )
        if self.codes.dtype != np.uint8 or self.scales.dtype != np.float16:
            raise InputError(f"codes are {self.codes.dtype}, scales are {self.scales.dtype}")
        if (self.zeros is not None) != (self.grid.zero == "integer"):
            raise InputError(f"zero points and {self.grid} contradict each other")
        if self.zeros is not None and (self.zeros.shape != groups or self.zeros.dtype != np.uint8):
            raise InputError(
                f"zero points {self.zeros.shape} {self.zeros.dtype} do not fit {groups}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), rows being output features."""
        rows, columns = self.codes.shape
        return rows, columns

    def zero_points(self) -> npt.NDArray[np.uint8]:
        """uint8 [rows, groups], also on a grid whose zero is fixed."""
        if self.zeros is not None:
            return self.zeros
        return np.full(self.scales.shape, self.grid.fixed_zero, dtype=np.uint8)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [rows, columns]: ``(code - zero) * scale``, the product taken in float32."""
        rows, columns = self.shape
        grouped = self.codes.reshape(rows, -1, self.grid.group_size).astype(np.float32)
        grouped -= self.zero_points()[:, :, None].astype(np.float32)
        grouped *= self.scales[:, :, None].astype(np.float32)
        return grouped.reshape(rows, columns)


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes along the last axis into a stream of bits, first element in the low bits.

    A code of 3 or 5 bits may lie across two bytes: its low bits are the high bits of the first.

    Args:
        codes: uint8 [..., n]; a last byte that is not full is padded with zero bits.
        bits: 2, 3, 4, 5 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    run_codes, run_bytes = _run(bits)
    runs = _in_runs(codes, run_codes)
    words = np.zeros(runs.shape[:-1], dtype=_word(run_bytes))
    for i in range(run_codes):
        words |= runs[..., i].astype(words.dtype) << words.dtype.type(i * bits)
    packed = words[..., None].view(np.uint8)[..., :run_bytes].reshape(*codes.shape[:-1], -1)
    return np.ascontiguousarray(packed[..., : -(-codes.shape[-1] * bits // 8)])


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Undo :func:`pack_codes`: uint8 [..., bytes] -> uint8 [..., count]."""
    if bits == 8:
        return np.ascontiguousarray(packed[..., :count])
    run_codes, run_bytes = _run(bits)
    runs = _in_runs(packed, run_bytes)
    words = np.zeros(runs.shape[:-1], dtype=_word(run_bytes))
    for i in range(run_bytes):
        words |= runs[..., i].astype(words.dtype) << words.dtype.type(8 * i)
    mask, shifts = words.dtype.type((1 << bits) - 1), range(0, run_codes * bits, bits)
    parts = [((words >> words.dtype.type(s)) & mask).astype(np.uint8) for s in shifts]
    codes = np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(codes[..., :count])


def _run(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and these: 8 in 5 (5 bits), 2 in 1 (4 bits)."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def _word(run_bytes: int) -> np.dtype[np.unsignedinteger]:
    """What holds the bits of a run, the first byte lowest."""
    return np.dtype("u1" if run_bytes == 1 else "<u4" if run_bytes <= 4 else "<u8")


def _in_runs(values: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """uint8 [..., n] -> uint8 [..., ceil(n / size), size], zeros at the end."""
    padding = -values.shape[-1] % size
    if padding:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)])
    return values.reshape(*values.shape[:-1], -1, size)
