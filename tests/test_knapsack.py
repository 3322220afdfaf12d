"""The knapsack against all combinations, and against an independent solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.knapsack import choose

Items = list[list[tuple[int, float]]]

LOSSES = st.floats(0, 100, allow_subnormal=False) | st.integers(0, 5).map(float)
ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 30), LOSSES), min_size=1, max_size=4),
    min_size=1,
    max_size=6,
)


def solve(items: Items, budget: int) -> list[int]:
    sizes = [np.array([size for size, _ in item], dtype=np.int64) for item in items]
    losses = [np.array([loss for _, loss in item]) for item in items]
    return choose(sizes, losses, budget)


def outcome(items: Items, picked: list[int] | tuple[int, ...]) -> tuple[int, float]:
    options = [item[index] for item, index in zip(items, picked, strict=True)]
    return sum(size for size, _ in options), sum(loss for _, loss in options)


@given(ITEMS, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_no_combination_that_fits_loses_less(items: Items, share: float) -> None:
    least = sum(min(size for size, _ in item) for item in items)
    most = sum(max(size for size, _ in item) for item in items)
    budget = least + int(share * (most - least))
    size, loss = outcome(items, solve(items, budget))
    every = (outcome(items, p) for p in itertools.product(*(range(len(i)) for i in items)))
    best = min(other for other_size, other in every if other_size <= budget)
    assert size <= budget
    assert loss == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_two_hundred_matrices_in_bytes_are_solved_as_an_integer_program_solves_them() -> None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    draw = np.random.default_rng(0)
    weights = draw.choice([110592, 331776, 884736], size=60)
    bytes_ = np.stack([weights // 64 * 18, weights // 32 * 18, weights // 32 * 34], axis=1)
    losses = np.exp(draw.normal(size=(60, 1))) * np.array([1.0, 0.07, 0.0004])
    losses *= np.exp(0.2 * draw.normal(size=losses.shape))
    budget = int(0.6 * bytes_[:, 0].sum() + 0.4 * bytes_[:, 1].sum()) + 17
    picked = choose(list(bytes_), list(losses), budget)
    rows = np.arange(60)
    assert bytes_[rows, picked].sum() <= budget
    one_each = np.kron(np.eye(60), np.ones((1, 3)))
    found = milp(
        losses.reshape(-1),
        integrality=np.ones(180),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bytes_.reshape(1, -1) / 1e6, 0, budget / 1e6),
        ],
        options={"mip_rel_gap": 1e-9},
    )
    assert found.success
    assert losses[rows, picked].sum() == pytest.approx(found.fun, rel=1e-6)


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest"):
        solve([[(3, 1.0), (5, 0.0)], [(4, 0.0)]], 6)
    with pytest.raises(ValueError, match="finite"):
        solve([[(3, float("nan"))]], 6)
