"""After the rounding: scales fitted to the codes, codes to the scales, for the outputs' error.

Both go one at a time to where the error of the outputs is least while the others stand, so neither
can raise it: coordinate descent, as Behdin et al. 2023 (QuantEase, arXiv 2309.01885) do for codes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import shorten

FloatArray = npt.NDArray[np.float32]

SCALE_SWEEPS = 4
CHUNK_VALUES = 4_000_000  # of the largest array that refitting scales holds


def polish(quantized: QTensor, target: FloatArray, hessian: FloatArray, passes: int) -> QTensor:
    """Refit all scales, then revise all codes, ``passes`` times.

    Args:
        quantized: where to start.
        target: float32 [rows, columns], the weights that are to be met.
        hessian: float32 [columns, columns], positive definite.
        passes: 0 leaves everything as it is.
    """
    for _ in range(passes):
        quantized = refit_scales(quantized, target, hessian)
        quantized = revise_codes(quantized, target, hessian)
    return quantized


def nearest_codes(
    values: FloatArray, scale: FloatArray, zero: FloatArray, grid: Grid
) -> FloatArray:
    """The codes nearest to ``values`` [rows], as float32, under scale and zero point [rows] each.

    Half goes to even; where the scale is 0, so is the value.
    """
    quotient = values / np.where(scale == 0, np.float32(1), scale)
    steps = np.rint(np.where(scale == 0, np.float32(0), quotient))
    least = 1 if grid.bits == 8 else 0  # symmetric: -127..127
    return np.clip(steps + zero, least, grid.max_code).astype(np.float32)


def refit_scales(quantized: QTensor, target: FloatArray, hessian: FloatArray) -> QTensor:
    """The codes under new scales, each the best that can be stored while the others stand."""
    rows, columns = quantized.shape
    groups = quantized.scales.shape[1]
    chunk = max(1, CHUNK_VALUES // max(columns, groups * groups))
    scales = [
        _refit(_rows(quantized, start, start + chunk), target[start : start + chunk], hessian)
        for start in range(0, rows, chunk)
    ]
    return QTensor(quantized.grid, quantized.codes, np.concatenate(scales), quantized.zeros)


def _rows(quantized: QTensor, start: int, stop: int) -> QTensor:
    zeros = None if quantized.zeros is None else quantized.zeros[start:stop]
    rows = slice(start, stop)
    return QTensor(quantized.grid, quantized.codes[rows], quantized.scales[rows], zeros)


def _refit(quantized: QTensor, target: FloatArray, hessian: FloatArray) -> npt.NDArray[np.float16]:
    """The error of a row is quadratic in its scales: ``s A s - 2 b s + ...``, A of all groups."""
    grid, (rows, _) = quantized.grid, quantized.shape
    groups = quantized.scales.shape[1]
    ones = QTensor(grid, quantized.codes, np.ones_like(quantized.scales), quantized.zeros)
    steps = ones.dequantize()  # code - zero
    grouped = (rows, groups, grid.group_size)
    linear = (steps * (target @ hessian)).reshape(grouped).sum(axis=2)
    quadratic = np.empty((groups, rows, groups), dtype=np.float32)
    for group in range(groups):
        members = slice(group * grid.group_size, (group + 1) * grid.group_size)
        product = steps[:, members] @ hessian[members]
        quadratic[group] = (product * steps).reshape(grouped).sum(axis=2)
    scales = quantized.scales.astype(np.float32)
    for _ in range(SCALE_SWEEPS):
        for group in range(groups):
            own = quadratic[group, :, group]
            missing = linear[:, group] - (quadratic[group] * scales).sum(axis=1)
            best = scales[:, group] + missing / np.where(own > 0, own, np.float32(1))
            stored, possible = _storable(best, grid)
            scales[:, group] = np.where(possible & (own > 0), stored, scales[:, group])
    return scales.astype(np.float16)


def _storable(scale: FloatArray, grid: Grid) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """The nearest scales that the grid has, and where there are any."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    possible = np.isfinite(half) & (half != 0)
    if grid.zero == "integer":
        possible &= half > 0
        half = shorten(np.where(possible, half, np.float16(1)))
        possible &= np.isfinite(half)
    return half.astype(np.float32), possible


def revise_codes(quantized: QTensor, target: FloatArray, hessian: FloatArray) -> QTensor:
    """New codes under the scales, column by column, each the best while the others stand."""
    grid, (rows, columns) = quantized.grid, quantized.shape
    size = grid.group_size
    values = np.ascontiguousarray(quantized.dequantize().T)  # [columns, rows]
    codes = np.empty((columns, rows), dtype=np.uint8)
    pull = hessian @ (target.T - values)
    for start in range(0, columns, size):
        block = slice(start, start + size)
        scale = quantized.scales[:, start // size].astype(np.float32)
        zero = quantized.zero_points()[:, start // size].astype(np.float32)
        moved = np.empty((size, rows), dtype=np.float32)
        for j in range(start, start + size):
            wanted = values[j] + pull[j] / hessian[j, j]
            code = nearest_codes(wanted, scale, zero, grid)
            step = (code - zero) * scale - values[j]
            pull[block] -= np.outer(hessian[block, j], step)
            moved[j - start], codes[j] = step, code
        pull[:start] -= hessian[:start, block] @ moved
        pull[block.stop :] -= hessian[block.stop :, block] @ moved
    return QTensor(grid, np.ascontiguousarray(codes.T), quantized.scales, quantized.zeros)
