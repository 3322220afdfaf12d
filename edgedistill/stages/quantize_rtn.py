"""Round to nearest on a grid: each group's scale is searched, each weight rounded once.

The baseline of every quantization paper; no calibration data.  The search over clipped ranges is
the one of "min-max with MSE clipping" (Banner et al. 2019, arXiv:1810.05723, section 3).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.grid_choice import GridChoice, MatrixGrids
from edgedistill.progress import track
from edgedistill.quantized import Grid, QTensor
from edgedistill.stage import Stage
from edgedistill.student import Student, StudentWriter

CLIP_RATIOS = tuple(float(r) for r in np.linspace(1.0, 0.7, 13))
BLOCK_WEIGHTS = 262_144  # that a thread works on at once, in its core's cache
# A scale of 7 significant bits times a zero point of 4 bits fits float16's 11 bits, so that GGUF's
# Q4_1, which stores the product, holds the same zero points exactly.
SCALE_BITS_DROPPED = 4

__all__ = ["GridChoice", "QuantizeRtn", "round_to_grid"]

FloatArray = npt.NDArray[np.float32]


class QuantizeRtn(MatrixGrids, Stage):
    """Put every matrix on a grid by rounding to nearest."""

    def run(self, src: Path, dst: Path) -> None:
        """Quantize all matrices of ``src``; norms and biases are carried as they are."""
        student = Student(src)
        facts = student.facts
        matrices = set(facts.matrices())
        with StudentWriter(dst, student) as writer:
            for name in track(student.names(), label=f"rounding to {self.bits} bits"):
                values = student.read(name)
                if not np.isfinite(values).all():
                    raise InputError(f"{name} holds values that are not finite", where=str(src))
                if name in matrices:
                    writer.write(name, round_to_grid(values, self.grid_of(name, facts)))
                else:
                    writer.write(name, values)


def round_to_grid(weights: FloatArray, grid: Grid, importance: FloatArray | None = None) -> QTensor:
    """Quantize a matrix by rounding, each group's scale chosen for the least squared error.

    Args:
        weights: float32 [rows, columns], columns a multiple of ``grid.group_size``.
        grid: any grid; integer zero points for 4 bits.
        importance: float32 [columns], the weight of a column's squared error; default: all alike.

    Returns:
        codes, float16 scales and zero points.
    """
    rows, columns = weights.shape
    step = max(1, BLOCK_WEIGHTS // columns)

    def rounded(start: int) -> _Rounded:
        groups = weights[start : start + step].reshape(-1, grid.group_size)
        along = np.ascontiguousarray(groups.T)  # [group_size, n]: all steps run over groups
        with np.errstate(over="ignore", invalid="ignore"):  # told below, with the value
            if grid.zero == "integer":
                return _round_integer(along, _for_groups(importance, along, grid))
            return _round_fixed(along, grid, _for_groups(importance, along, grid))

    starts = range(0, rows, step)
    if len(starts) == 1:
        parts = [rounded(0)]
    else:
        with ThreadPoolExecutor(round_threads()) as pool:  # numpy lets go of Python's lock
            parts = list(pool.map(rounded, starts))
    codes = np.concatenate([p[0] for p in parts]).reshape(rows, columns)
    scales = np.concatenate([p[1] for p in parts]).reshape(rows, -1)
    if not np.isfinite(scales).all():
        raise InputError(f"weights of up to {np.abs(weights).max():.3g} need scales over float16's")
    zeros = np.concatenate([p[2] for p in parts]).reshape(rows, -1)
    return QTensor(grid, codes, scales, zeros if grid.zero == "integer" else None)


_Rounded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.uint8]]


def round_threads() -> int:
    """The threads that a step is told to use; they change no byte of what comes out."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else 1


def _for_groups(importance: FloatArray | None, groups: FloatArray, grid: Grid) -> FloatArray | None:
    """The importance of every weight of [group_size, n], whose groups run along rows."""
    if importance is None:
        return None
    along = importance.reshape(-1, grid.group_size)
    return np.ascontiguousarray(np.tile(along, (groups.shape[1] // len(along), 1)).T)


def _round_fixed(groups: FloatArray, grid: Grid, importance: FloatArray | None) -> _Rounded:
    """[group_size, n] -> codes [n, group_size], scales, zeros [n]; the scale's sign is free."""
    zero = np.full(groups.shape[1], grid.fixed_zero, dtype=np.uint8)
    if grid.bits == 8:
        # 1..255, as -127..127: symmetric, and fine enough that clipping never pays.
        scale = (np.abs(groups).max(axis=0) / np.float32(127)).astype(np.float16)
        return _codes(groups, scale, zero, 1, 255), scale, zero
    # The wider side of the grid (-8 of -8..7, +2 of -1..2) takes the group's largest magnitude.
    below, above = -grid.fixed_zero, grid.max_code - grid.fixed_zero
    wider = below if -below > above else above
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=0)[None], axis=0)[0]
    candidates = [
        ((peak * np.float32(r)) / np.float32(wider)).astype(np.float16) for r in CLIP_RATIOS
    ]
    return _best(groups, candidates, [zero] * len(candidates), grid.max_code, importance)


def _round_integer(groups: FloatArray, importance: FloatArray | None) -> _Rounded:
    """[group_size, n] -> codes [n, group_size], scales, zeros [n], with 4-bit zero points."""
    low = np.minimum(groups.min(axis=0), 0)
    high = np.maximum(groups.max(axis=0), 0)
    scales, zeros = [], []
    for ratio in CLIP_RATIOS:
        scale = shorten(((high - low) * np.float32(ratio / 15)).astype(np.float16))
        exact_zero = np.rint(-low * np.float32(ratio) / _divisors(scale))
        scales.append(scale)
        zeros.append(np.clip(exact_zero, 0, 15).astype(np.uint8))
    return _best(groups, scales, zeros, 15, importance)


def _best(
    groups: FloatArray,
    scales: list[npt.NDArray[np.float16]],
    zeros: list[npt.NDArray[np.uint8]],
    max_code: int,
    importance: FloatArray | None,
) -> _Rounded:
    """The candidate with the least squared error, for each group; ties go to the earliest."""
    least = np.full(groups.shape[1], np.inf, dtype=np.float32)
    best_scale, best_zero = scales[0].copy(), zeros[0].copy()
    off = np.empty_like(groups)
    for scale, zero in zip(scales, zeros, strict=True):
        below = -zero.astype(np.float32)
        np.divide(groups, _divisors(scale), out=off)
        np.rint(off, out=off)
        np.maximum(off, below, out=off)
        np.minimum(off, below + np.float32(max_code), out=off)
        off *= scale.astype(np.float32)
        off -= groups
        if importance is None:
            error = np.einsum("ij,ij->j", off, off)
        else:
            error = np.einsum("ij,ij,ij->j", off, off, importance)
        better = error < least
        least[better] = error[better]
        best_scale[better], best_zero[better] = scale[better], zero[better]
    return _codes(groups, best_scale, best_zero, 0, max_code), best_scale, best_zero


def _codes(
    groups: FloatArray,
    scale: npt.NDArray[np.float16],
    zero: npt.NDArray[np.uint8],
    least: int,
    most: int,
) -> npt.NDArray[np.uint8]:
    """The codes nearest to [group_size, n], half to even: uint8 [n, group_size]."""
    codes = np.rint(groups / _divisors(scale)) + zero.astype(np.float32)
    return np.ascontiguousarray(np.clip(codes, least, most).astype(np.uint8).T)


def _divisors(scale: npt.NDArray[np.float16]) -> FloatArray:
    """float32 [n]: infinite where the scale is 0, so that the quotient is 0."""
    wide = scale.astype(np.float32)
    return np.where(wide == 0, np.float32(np.inf), wide)


def shorten(scale: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Round positive float16 values to 7 significant bits, half away from zero."""
    half = np.uint16(1 << (SCALE_BITS_DROPPED - 1))
    mask = np.uint16(0xFFFF << SCALE_BITS_DROPPED & 0xFFFF)
    return ((scale.view(np.uint16) + half) & mask).view(np.float16)
