"""GPTQ: round a matrix column by column, each rounding's error carried by the columns after it.

Frantar et al. 2022 (arXiv 2210.17323).  What is minimized is the error of the layer's outputs,
``tr((W - Q) H (W - Q)^T)`` with ``H`` the mean of ``x x^T`` over the inputs.  Columns go by
importance, whole groups at once, so a group's scale is chosen when its weights already carry the
errors of those before, and still is one scale for neighbouring columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.errors import StageError
from edgedistill.gptq_polish import FloatArray, blocks, nearest_codes, polish
from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import round_to_grid

Order = Literal["given", "columns", "groups"]
Clipping = Literal["plain", "diagonal", "conditional"]

# From these bits on, GPTQ gains too little to be waited for where it is not asked for.
ROUNDED_FROM_BITS = 8

# How far damping is raised, and in what steps, where a Hessian is not positive definite yet.
DAMPING_STEP, MOST_DAMPING = 10.0, 10.0
# Wider ones are factorized in float32, which the damping makes exact enough: memory and time halve.
EXACT_COLUMNS = 4096
# Triangles of up to this size are inverted by solving.
TRIANGLE_SIZE = 256


@dataclass(frozen=True)
class GptqSettings:
    """The ingredients; the defaults are the best that ``benchmarks/gptq.py`` measured.

    Attributes:
        damping: added to the Hessian's diagonal, as a share of its mean.  The error of what came
            before is undone under it as well, and little of it fits one text too closely.
        order: ``given``; ``columns`` by importance, under scales chosen beforehand; ``groups`` by
            their most important column, and by importance within each.
        clipping: the error for which a scale is chosen: ``plain``, each column's weighted by the
            Hessian's ``diagonal``, or by what is left of it once the columns after it have carried
            what they can (``conditional``).
        sequential: whether inputs come from the matrices that are quantized already, or from the
            student as it was.
        compensation: the share of the error of everything before a matrix that it is made to undo,
            0 to 1; only with ``sequential``.
        polish: how often scales are refitted and codes revised after the rounding.
    """

    damping: float = 0.3
    order: Order = "groups"
    clipping: Clipping = "conditional"
    sequential: bool = True
    compensation: float = 1.0
    polish: int = 2


@dataclass(frozen=True)
class Inputs:
    """The second moments of what a matrix reads.

    Attributes:
        hessian: float32 [columns, columns], the mean of ``x x^T``.
        drift: float32 [columns, columns], the mean of ``(x' - x) x^T``, where the student as it was
            reads ``x'`` in the same place; None for nothing.
        residual: float32 [rows, columns], the mean of ``r x^T``, where ``r`` is what outputs or
            the stream that they are added to lack besides; None for nothing.
    """

    hessian: FloatArray
    drift: FloatArray | None = None
    residual: FloatArray | None = None


class Gptq:
    """Quantizes the matrices that read the same inputs, on grids of one group size.

    Raises:
        StageError: the inputs are not finite.
    """

    def __init__(self, inputs: Inputs, group_size: int, settings: GptqSettings) -> None:
        if not np.isfinite(inputs.hessian).all():
            raise StageError("the student's hidden states on the calibration text are not finite")
        self._inputs = inputs
        self._settings = settings
        self.order = column_order(np.diagonal(inputs.hessian), group_size, settings.order)
        self.hessian, self._upper = _factorize(inputs.hessian, self.order, settings.damping)

    def quantize(self, weights: FloatArray, grid: Grid) -> QTensor:
        """Quantize one of the matrices.

        Args:
            weights: float32 [rows, columns].
            grid: of the group size given above.
        """
        target = self._compensated(weights)
        rounded = self._round(target, grid)
        return polish(rounded, target, self.hessian, self._settings.polish)

    def _compensated(self, weights: FloatArray) -> FloatArray:
        """The weights that bring the outputs nearest to those of the student as it was.

        They solve ``min |W X' + R - V X|^2`` (as Li et al. 2025, arXiv 2504.02692, do inside the
        rounding), of whose step from ``W`` a share is taken.
        """
        share, inputs = self._settings.compensation, self._inputs
        if not share or (inputs.drift is None and inputs.residual is None):
            return weights
        missing = np.zeros_like(weights)
        if inputs.drift is not None:
            missing += weights @ inputs.drift
        if inputs.residual is not None:
            missing += inputs.residual
        step = np.empty_like(weights)
        step[:, self.order] = missing[:, self.order] @ self._upper.T @ self._upper
        return weights + np.float32(share) * step

    def _round(self, target: FloatArray, grid: Grid) -> QTensor:
        order, upper, size = self.order, self._upper, grid.group_size
        importance = self._importance()
        rows, columns = target.shape
        # The columns lie behind each other, the next one in one piece.
        left = np.ascontiguousarray(target[:, order].T)
        codes = np.empty((columns, rows), dtype=np.uint8)
        scales, zeros = self._scales_beforehand(target, grid, importance)
        errors = np.empty((columns, rows), dtype=np.float32)
        for block, behind in blocks(columns, size):
            start = block.start
            if self._settings.order != "columns":
                group = order[start] // size
                members = np.ascontiguousarray(left[block].T)
                chosen = round_to_grid(members, grid, importance[order[block]])
                scales[group], zeros[group] = chosen.scales[:, 0], chosen.zero_points()[:, 0]
            for j in range(start, start + size):
                column = order[j]
                scale, zero = (part[column // size].astype(np.float32) for part in (scales, zeros))
                code = nearest_codes(left[j], scale, zero, grid)
                codes[column] = code
                error = (left[j] - (code - zero) * scale) / upper[j, j]
                left[j + 1 : block.stop] -= np.outer(upper[j, j + 1 : block.stop], error)
                errors[j] = error
            for done, later in behind:
                left[later] -= upper[done, later].T @ errors[done]
        return QTensor(
            grid,
            np.ascontiguousarray(codes.T),
            np.ascontiguousarray(scales.T),
            np.ascontiguousarray(zeros.T) if grid.zero == "integer" else None,
        )

    def _scales_beforehand(
        self, target: FloatArray, grid: Grid, importance: FloatArray
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Scales and zeros [groups, rows], chosen before any column is rounded; else room for them.

        With columns of all groups in any order no group's weights are known beforehand.
        """
        if self._settings.order == "columns":
            chosen = round_to_grid(target, grid, importance)
            return chosen.scales.T.copy(), chosen.zero_points().T.copy()
        shape = target.shape[1] // grid.group_size, target.shape[0]
        return np.zeros(shape, dtype=np.float16), np.zeros(shape, dtype=np.uint8)

    def _importance(self) -> FloatArray:
        """float32 [columns], of mean 1: by how much a column's error counts for its scale."""
        diagonal = np.diagonal(self.hessian)
        if self._settings.clipping == "plain":
            weight = np.ones_like(diagonal)
        elif self._settings.clipping == "diagonal":
            weight = diagonal
        else:
            weight = np.empty_like(diagonal)
            weight[self.order] = 1 / np.square(np.diagonal(self._upper))
        relative: FloatArray = (weight / weight.mean(dtype=np.float64)).astype(np.float32)
        return relative


def column_order(
    importance: npt.NDArray[np.floating], group_size: int, order: Order
) -> npt.NDArray[np.int64]:
    """In which order the columns are rounded: int64 [columns]; equal ones stay as they are.

    Args:
        importance: [columns], larger goes first.
        group_size: of the grid.
        order: see :class:`GptqSettings`.
    """
    columns = len(importance)
    if order == "given":
        return np.arange(columns)
    if order == "columns":
        return np.argsort(-importance, kind="stable")
    grouped = importance.reshape(-1, group_size)
    groups = np.argsort(-grouped.max(axis=1), kind="stable")
    within = np.argsort(-grouped, axis=1, kind="stable")
    return (groups[:, None] * group_size + within[groups]).reshape(-1)


def output_error(weights: FloatArray, quantized: QTensor, hessian: FloatArray) -> float:
    """``tr((W - Q) H (W - Q)^T)``: the mean squared error of all outputs together."""
    off = (weights - quantized.dequantize()).astype(np.float64)
    return float(np.vdot(off @ hessian, off))


def _factorize(
    hessian: FloatArray, order: npt.NDArray[np.int64], damping: float
) -> tuple[FloatArray, FloatArray]:
    """The damped Hessian, and ``U`` with ``U^T U`` its inverse in the order of rounding.

    With the columns backwards the Hessian's Cholesky factor is ``L``, whose inverse, read backwards
    again, is ``U``: nothing but a triangle is ever inverted.  A column that reads nothing is left
    with the damping alone, so it is rounded to nearest and carries no error of others.

    Raises:
        StageError: it is not positive definite, however much it is damped.
    """
    mean = float(np.diagonal(hessian).mean(dtype=np.float64)) or 1.0
    backwards = order[::-1]
    dtype = torch.float64 if len(order) <= EXACT_COLUMNS else torch.float32
    share = damping
    while share <= max(damping, MOST_DAMPING):
        factor = torch.from_numpy(hessian[np.ix_(backwards, backwards)]).to(dtype)
        factor.diagonal().add_(share * mean)
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if not info:
            invert_lower(factor)
            damped = hessian.copy()
            diagonal = np.diagonal(hessian).astype(np.float64) + share * mean
            np.fill_diagonal(damped, diagonal.astype(np.float32))
            return damped, factor.float().flip(0, 1).numpy()
        share *= DAMPING_STEP
    raise StageError(f"a Hessian is not positive definite, even with {MOST_DAMPING:g} of damping")


def invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix [n, n] in place, by halves: products do nearly all of it."""
    size = len(lower)
    if size <= TRIANGLE_SIZE:
        identity = torch.eye(size, dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower(first)
    invert_lower(second)
    below.copy_((second @ below @ first).neg_())
