"""Which columns of a matrix go, and what the others become to do their work: least squares.

Optimal brain surgeon (Hassibi and Stork 1993) on whole columns, as ZipLM (Kurtic et al. 2023, arXiv
2302.04089) does for structured pruning: the columns whose loss the others make up for best go
first, a few at a time, and what is left is the exact minimum on the columns that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.errors import StageError

# Columns that go between two looks at what the others have become: so many looks at most.
LOOKS = 512


@dataclass(frozen=True)
class Elimination:
    """What stays of a matrix.

    Attributes:
        kept: ascending places of the groups of columns that stay.
        matrix: float32 [rows, columns], zero in the others.
    """

    kept: npt.NDArray[np.int64]
    matrix: Tensor


def eliminate(
    hessian: Tensor, moment: Tensor, matrix: Tensor, *, width: int, keep: int, damping: float
) -> Elimination:
    """Leave ``keep`` groups of columns, and minimize ``sum |y - V x|^2 + d |V - W|^2`` over them.

    Args:
        hessian: float64 [columns, columns], the sum of ``x x^T`` over what the matrix reads.
        moment: float64 [rows, columns], the sum of ``y x^T``, of what it is to answer.
        matrix: float32 [rows, columns], ``W``: what it is now.
        width: columns of a group, one behind the other.
        keep: groups that stay, at least one.
        damping: ``d`` as a share of the mean of the Hessian's diagonal.

    Raises:
        StageError: the sums are not finite.
    """
    if not (torch.isfinite(hessian).all() and torch.isfinite(moment).all()):
        raise StageError("the student's hidden states on the calibration text are not finite")
    groups = matrix.shape[1] // width
    # All inputs zero (a block without effect): any positive number will do.
    d = damping * float(hessian.diagonal().mean()) or 1.0
    damped = hessian.clone()
    damped.diagonal().add_(d)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    left = (moment + d * matrix.double()) @ inverse
    alive = torch.ones(groups, dtype=torch.bool)
    at_once = max(1, groups // LOOKS)
    while (surplus := int(alive.sum()) - keep) > 0:
        losses = _losses(left, inverse, alive, width)
        gone = losses.argsort(stable=True)[: min(at_once, surplus)]
        alive[gone] = False
        columns = (gone[:, None] * width + torch.arange(width)).reshape(-1)
        _remove(left, inverse, columns)
    return Elimination(alive.nonzero()[:, 0].numpy(), left.float())


def _losses(left: Tensor, inverse: Tensor, alive: Tensor, width: int) -> Tensor:
    """float64 [groups]: the rise of the minimum when a group goes; infinite of those gone."""
    if width == 1:
        losses = left.square().sum(dim=0) / inverse.diagonal()
        return losses.masked_fill(~alive, float("inf"))
    losses = torch.full(alive.shape, float("inf"), dtype=torch.float64)
    for group in alive.nonzero()[:, 0].tolist():
        at = slice(group * width, (group + 1) * width)
        losses[group] = (left[:, at] * torch.linalg.solve(inverse[at, at], left[:, at].T).T).sum()
    return losses


def _remove(left: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Bring the minimum and the inverse to where ``columns`` are zero, in place."""
    rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    left.addmm_(left[:, columns], rows, alpha=-1)
    inverse.addmm_(inverse[:, columns], rows, alpha=-1)
    left[:, columns] = 0.0
    # Of what is gone, one on the diagonal is as good as any number to divide by.
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0
