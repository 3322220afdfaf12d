"""How an ONNX file stores what: the layout of ``MatMulNBits``, without the onnx package."""

from __future__ import annotations

import math

from edgedistill.quantized import Grid

# That ``MatMulNBits`` has a CPU kernel for (ONNX Runtime 1.32).
KERNEL_BITS = (2, 4, 8)
# ``GroupQueryAttention`` takes heads of a multiple of 8, and rotates multiples of 16 of a multiple
# of 16 alone (ONNX Runtime 1.32, group_query_attention_helper.h).
HEAD_MULTIPLE, ROTATED_MULTIPLE = 8, 16
# Cosines and sines, and those of sliding layers where they have others.
ROPE_TABLES = ("rope.cos", "rope.sin")
SLIDING_ROPE_TABLES = ("rope.sliding.cos", "rope.sliding.sin")


def stores_zeros(grid: Grid) -> bool:
    """Whether zero points are written; where they are not, ORT assumes ``2^(bits - 1)``."""
    return grid.zero == "integer" or grid.fixed_zero != 1 << (grid.bits - 1)


def stored_bytes(shape: tuple[int, ...], grid: Grid | None) -> int:
    """Bytes of a tensor: codes, float32 scales, zeros packed by row; float32 without a grid."""
    if grid is None:
        return 4 * math.prod(shape)
    rows, columns = shape
    groups = columns // grid.group_size
    zeros = -(-groups * grid.bits // 8) if stores_zeros(grid) else 0
    return rows * (columns * grid.bits // 8 + 4 * groups + zeros)
