"""Grids in GGUF's block layouts: codes, scales and zeros packed as they are, never rounded again.

Layouts: ggml's ``block_q8_0``, ``block_q5_0``, ``block_q4_0``, ``block_q4_1`` and ``block_q2_0``
(ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.quantized import Grid, QTensor, pack_codes


@dataclass(frozen=True)
class BlockLayout:
    """One of ggml's block types.

    Attributes:
        name: as llama.cpp prints it.
        type_id: ggml's number.
        file_type: llama.cpp's number of a file that is mostly made of it (``llama_ftype``).
        block: weights in a block; ``block_bytes`` its size.
    """

    name: str
    type_id: int
    file_type: int
    block: int
    block_bytes: int


F32 = BlockLayout("F32", 0, 0, 1, 4)
F16 = BlockLayout("F16", 1, 1, 1, 2)
Q4_0 = BlockLayout("Q4_0", 2, 2, 32, 18)
Q4_1 = BlockLayout("Q4_1", 3, 3, 32, 20)
Q5_0 = BlockLayout("Q5_0", 6, 8, 32, 22)
Q8_0 = BlockLayout("Q8_0", 8, 7, 32, 34)
# The gguf package 0.19 does not name it; llama.cpp runs it since 2026.
Q2_0 = BlockLayout("Q2_0", 42, 41, 64, 18)

LAYOUTS: dict[Grid, BlockLayout] = {
    Grid(8, 32): Q8_0,
    Grid(5, 32): Q5_0,
    Grid(4, 32): Q4_0,
    Grid(4, 32, "integer"): Q4_1,
    Grid(2, 64): Q2_0,
}


def pack_blocks(tensor: QTensor, name: str) -> npt.NDArray[np.uint8]:
    """The blocks of a tensor.

    Args:
        tensor: on one of the grids in ``LAYOUTS``.
        name: for the message of an error.

    Returns:
        uint8 [rows, columns / block * block_bytes].

    Raises:
        InputError: no layout holds the grid, or a zero point times its scale is not a float16.
    """
    layout = LAYOUTS.get(tensor.grid)
    if layout is None:
        raise InputError(f"{name} is {tensor.grid}, which no GGUF block holds")
    rows, columns = tensor.shape
    codes = tensor.codes.reshape(rows, columns // layout.block, layout.block)
    parts = [_little_endian_bytes(tensor.scales)]
    if layout is Q8_0:
        # Signed: code - 128, which flips the top bit.
        parts.append(codes ^ np.uint8(0x80))
    elif layout is Q2_0:
        parts.append(pack_codes(codes, 2))
    else:
        if layout is Q4_1:
            parts.append(_little_endian_bytes(_minima(tensor, name)))
        elif layout is Q5_0:
            # The fifth bits stand by themselves, element i's in bit i of four bytes.
            parts.append(np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little"))
            codes = codes & np.uint8(0x0F)
        # A byte holds element i in its low half and element i + 16 in its high half.
        parts.append(codes[..., :16] | codes[..., 16:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _minima(tensor: QTensor, name: str) -> npt.NDArray[np.float16]:
    # w = code * d + m, so m = -zero * scale; the product is exact in float32 (4 + 11 bits).
    exact = -(tensor.zero_points().astype(np.float32) * tensor.scales.astype(np.float32))
    stored = exact.astype(np.float16)
    lost = int(np.count_nonzero(stored.astype(np.float32) != exact))
    if lost:
        raise InputError(
            f"{name}: zero * scale is not a float16 in {lost} of {exact.size} groups, "
            "so Q4_1 would round the weights again",
            hint="quantize with scales of 7 significant bits, or on the grid with a fixed zero",
        )
    return stored


def _little_endian_bytes(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """float16 [rows, blocks] -> uint8 [rows, blocks, 2]."""
    return np.ascontiguousarray(values, dtype="<f2")[..., None].view(np.uint8)
