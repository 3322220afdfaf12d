"""Columns that go: the exact least-squares minimum on those that stay, chosen well."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgedistill.column_elimination import Elimination, eliminate
from edgedistill.errors import StageError

DAMPING = 0.05


def _problem(columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [tokens, columns], wanted outputs [tokens, 5] and the matrix [5, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = (torch.randn(200, columns, generator=generator) @ mixing).double()
    matrix = torch.randn(5, columns, generator=generator)
    lacking = torch.randn(200, 5, generator=generator).double()
    return inputs, inputs @ matrix.double().T + lacking, matrix


def _run(inputs: Tensor, wanted: Tensor, matrix: Tensor, width: int, keep: int) -> Elimination:
    return eliminate(
        inputs.T @ inputs, wanted.T @ inputs, matrix, width=width, keep=keep, damping=DAMPING
    )


def _best_on(inputs: Tensor, wanted: Tensor, matrix: Tensor, columns: list[int]) -> Tensor:
    """The minimum by a solver of least squares on stacked rows, written out apart."""
    d = DAMPING * float((inputs**2).sum(0).mean())
    rows = torch.cat([inputs[:, columns], d**0.5 * torch.eye(len(columns), dtype=torch.float64)])
    right = torch.cat([wanted, d**0.5 * matrix[:, columns].double().T])
    best: Tensor = torch.linalg.lstsq(rows, right).solution
    return best.T


def _loss(inputs: Tensor, wanted: Tensor, matrix: Tensor, found: Tensor) -> float:
    d = DAMPING * float((inputs**2).sum(0).mean())
    off = ((wanted - inputs @ found.double().T) ** 2).sum()
    return float(off + d * ((found - matrix).double() ** 2).sum())


@pytest.mark.parametrize(("width", "keep"), [(1, 8), (1, 5), (1, 1), (2, 3), (4, 1)])
def test_what_stays_is_the_exact_minimum_on_the_columns_that_stay(width: int, keep: int) -> None:
    inputs, wanted, matrix = _problem(8)
    found = _run(inputs, wanted, matrix, width, keep)
    assert len(found.kept) == keep
    assert np.all(np.diff(found.kept) > 0)
    columns = [int(group) * width + j for group in found.kept for j in range(width)]
    gone = [j for j in range(8) if j not in columns]
    assert not found.matrix[:, gone].any()
    expected = _best_on(inputs, wanted, matrix, columns)
    torch.testing.assert_close(found.matrix[:, columns].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [1, 2])
def test_the_choice_is_near_the_best_of_all_subsets(width: int, seed: int) -> None:
    inputs, wanted, matrix = _problem(8, seed)
    keep = 8 // width - 2
    losses = []
    for groups in combinations(range(8 // width), keep):
        columns = [g * width + j for g in groups for j in range(width)]
        whole = torch.zeros(5, 8, dtype=torch.float64)
        whole[:, columns] = _best_on(inputs, wanted, matrix, columns)
        losses.append(_loss(inputs, wanted, matrix, whole))
    ours = _loss(inputs, wanted, matrix, _run(inputs, wanted, matrix, width, keep).matrix)
    assert ours <= min(losses) + 0.15 * (max(losses) - min(losses))


def test_of_two_columns_that_read_the_same_one_goes_and_costs_nothing() -> None:
    inputs, _, matrix = _problem(8)
    inputs[:, 5] = inputs[:, 2]
    matrix[:, 2] += 10.0  # the largest by far: by its size it would be the last to go
    found = eliminate(
        inputs.T @ inputs,
        matrix.double() @ inputs.T @ inputs,
        matrix,
        width=1,
        keep=7,
        damping=1e-9,
    )
    assert len({2, 5} & set(found.kept.tolist())) == 1
    torch.testing.assert_close(
        inputs @ found.matrix.double().T, inputs @ matrix.double().T, atol=1e-3, rtol=1e-4
    )


def test_many_columns_go_a_few_at_a_time_to_the_same_minimum() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(1500, 1200, generator=generator).double()
    matrix = torch.randn(3, 1200, generator=generator)
    wanted = inputs @ matrix.double().T
    found = _run(inputs, wanted, matrix, 1, 900)
    expected = _best_on(inputs, wanted, matrix, found.kept.tolist())
    torch.testing.assert_close(found.matrix[:, found.kept].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_matrix_that_reads_zeros_keeps_as_many_as_asked() -> None:
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    found = _run(zeros, zeros[:, :2], torch.ones(2, 6), 1, 4)
    assert len(found.kept) == 4
    torch.testing.assert_close(found.matrix[:, found.kept], torch.ones(2, 4))


def test_sums_that_are_not_finite_are_refused() -> None:
    inputs, wanted, matrix = _problem(8)
    inputs[0, 3] = float("inf")
    with pytest.raises(StageError, match="not finite"):
        _run(inputs, wanted, matrix, 1, 4)
