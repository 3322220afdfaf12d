"""Grids and quantized tensors: integers decided once, carried by every format.

A weight on a grid is ``w = (code - zero) * scale``, with one float16 scale (and one integer zero
point) for each group of consecutive weights along a row, the input dimension.  Codes are unsigned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

Bits = Literal[2, 4, 8]
ZeroKind = Literal["fixed", "integer"]

# A change is folded into a matrix of so many bits; fewer would round most of a small one away.
FOLDED_FROM_BITS = 8

FIXED_ZERO: dict[int, int] = {2: 1, 4: 8, 8: 128}


@dataclass(frozen=True)
class Grid:
    """A set of representable weights.

    Attributes:
        bits: width of a code: 2, 4 or 8.
        group_size: consecutive weights of a row that share a scale.
        zero: ``fixed`` (the same zero point everywhere, see ``FIXED_ZERO``) or ``integer``
            (one unsigned zero point a group, as wide as a code).
    """

    bits: Bits
    group_size: int
    zero: ZeroKind = "fixed"

    @property
    def fixed_zero(self) -> int:
        """The zero point of a ``fixed`` grid: 1 for 2 bits, 8 for 4, 128 for 8."""
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
    """Pack codes along the last axis, first element in the low bits.

    Args:
        codes: uint8 [..., n]; a last byte that is not full is padded with zero bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(parts.shape[:-1], dtype=np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << np.uint8(i * bits)
    return packed


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Undo :func:`pack_codes`: uint8 [..., bytes] -> uint8 [..., count]."""
    if bits == 8:
        return np.ascontiguousarray(packed[..., :count])
    mask = np.uint8((1 << bits) - 1)
    parts = [(packed >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
    codes = np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(codes[..., :count])
