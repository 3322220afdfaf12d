"""After the rounding: scales fitted to the codes, codes to the scales, for the outputs' error.

Both go one at a time to where the error of the outputs is least while the others stand, so neither
can raise it: coordinate descent, as Behdin et al. 2023 (QuantEase, arXiv 2309.01885) do for codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import shorten

FloatArray = npt.NDArray[np.float32]

SCALE_SWEEPS = 4
CHUNK_VALUES = 32_000_000  # of the largest array that refitting scales holds
SPAN_COLUMNS = 256  # worked on before all that come behind them learn of it


def polish(quantized: QTensor, target: FloatArray, hessian: FloatArray, passes: int) -> QTensor:
    """Refit all scales, then revise all codes, ``passes`` times.

    Args:
        quantized: where to start.
        target: float32 [rows, columns], the weights that are to be met.
        hessian: float32 [columns, columns], positive definite.
        passes: 0 leaves everything as it is.
    """
    if not passes:
        return quantized
    wanted = target @ hessian
    for _ in range(passes):
        quantized = refit_scales(quantized, wanted, hessian)
        quantized = revise_codes(quantized, wanted, hessian)
    return quantized


def blocks(columns: int, size: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Blocks of ``size`` columns in order, each with the updates that are due behind it.

    An update is (columns that changed, later columns that are to learn of it).  Those of the same
    span learn at once, all others at the span's end: a wide matrix is not walked through for each
    block.
    """
    span = max(size, SPAN_COLUMNS // size * size)
    for start in range(0, columns, size):
        stop = start + size
        first = start // span * span
        last = min(first + span, columns)
        if stop < last:
            yield slice(start, stop), [(slice(start, stop), slice(stop, last))]
        else:
            yield slice(start, stop), [(slice(first, last), slice(last, columns))]


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


def refit_scales(quantized: QTensor, wanted: FloatArray, hessian: FloatArray) -> QTensor:
    """The codes under new scales, each the best that can be stored while the others stand.

    Args:
        quantized: [rows, columns].
        wanted: float32 [rows, columns], the target times the Hessian.
        hessian: float32 [columns, columns], positive definite.
    """
    rows, columns = quantized.shape
    groups = quantized.scales.shape[1]
    chunk = max(1, CHUNK_VALUES // max(columns, groups * groups))
    scales = [
        _refit(_rows(quantized, start, start + chunk), wanted[start : start + chunk], hessian)
        for start in range(0, rows, chunk)
    ]
    return QTensor(quantized.grid, quantized.codes, np.concatenate(scales), quantized.zeros)


def _rows(quantized: QTensor, start: int, stop: int) -> QTensor:
    zeros = None if quantized.zeros is None else quantized.zeros[start:stop]
    rows = slice(start, stop)
    return QTensor(quantized.grid, quantized.codes[rows], quantized.scales[rows], zeros)


def _refit(quantized: QTensor, wanted: FloatArray, hessian: FloatArray) -> npt.NDArray[np.float16]:
    """The error of a row is quadratic in its scales: ``s A s - 2 b s + ...``, A of all groups."""
    grid, (rows, _) = quantized.grid, quantized.shape
    groups = quantized.scales.shape[1]
    ones = QTensor(grid, quantized.codes, np.ones_like(quantized.scales), quantized.zeros)
    steps = ones.dequantize()  # code - zero
    grouped = (rows, -1, grid.group_size)
    linear = np.einsum("rgk,rgk->rg", steps.reshape(grouped), wanted.reshape(grouped))
    quadratic = np.empty((groups, rows, groups), dtype=np.float32)
    for group in range(groups):
        first = group * grid.group_size
        members = slice(first, first + grid.group_size)
        # A is symmetric: what lies before the group is known from there.
        product = (steps[:, members] @ hessian[members, first:]).reshape(grouped)
        here = np.einsum("rgk,rgk->rg", product, steps[:, first:].reshape(grouped))
        quadratic[group, :, group:] = here
        quadratic[group:, :, group] = here.T
    scales = quantized.scales.astype(np.float32)
    for _ in range(SCALE_SWEEPS):
        for group in range(groups):
            own = quadratic[group, :, group]
            missing = linear[:, group] - np.einsum("rg,rg->r", quadratic[group], scales)
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


def revise_codes(quantized: QTensor, wanted: FloatArray, hessian: FloatArray) -> QTensor:
    """New codes under the scales, column by column, each the best while the others stand.

    Args:
        quantized, wanted, hessian: as of :func:`refit_scales`.
    """
    grid, (rows, columns) = quantized.grid, quantized.shape
    size = grid.group_size
    values = np.ascontiguousarray(quantized.dequantize().T)  # [columns, rows]
    codes = np.empty((columns, rows), dtype=np.uint8)
    pull = wanted.T - hessian @ values
    moved = np.empty((columns, rows), dtype=np.float32)
    for block, behind in blocks(columns, size):
        scale = quantized.scales[:, block.start // size].astype(np.float32)
        zero = quantized.zero_points()[:, block.start // size].astype(np.float32)
        for j in range(block.start, block.stop):
            best = values[j] + pull[j] / hessian[j, j]
            code = nearest_codes(best, scale, zero, grid)
            step = (code - zero) * scale - values[j]
            pull[j : block.stop] -= np.outer(hessian[j : block.stop, j], step)
            moved[j], codes[j] = step, code
        for done, later in behind:
            pull[later] -= hessian[later, done] @ moved[done]
    return QTensor(grid, np.ascontiguousarray(codes.T), quantized.scales, quantized.zeros)
