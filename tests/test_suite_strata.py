from __future__ import annotations

import random
from collections import Counter
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.evaluate.strata import (
    LEAST_DISTINCT,
    OTHER,
    allocate,
    choose,
    count_properties,
    stratify,
    take,
)


def intervals(requests: int) -> list[tuple[float, float]]:
    """Midpoint and width of all stretches of [0, 1) within which no sample can change.

    A sample changes only where the start times an integer up to ``requests`` is an integer.
    """
    ends = np.unique([k / d for d in range(1, requests + 1) for k in range(d + 1)])
    widths = np.diff(ends)
    return list(zip((ends[:-1] + widths / 2).tolist(), widths.tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_the_weighted_mean_is_unbiased(sizes: list[int], data: st.DataObject) -> None:
    """Exactly: the mean over all random starts is the mean over all requests."""
    count = data.draw(st.integers(1, len(sizes)))
    values = [[random.Random(f"{g}/{m}").random() for m in range(s)] for g, s in enumerate(sizes)]
    expected, inclusion = 0.0, Counter[tuple[int, int]]()
    for start, width in intervals(sum(sizes)):
        taken = take(sizes, count, start)
        assert len({t.group for t in taken}) == len(taken) == count
        assert sum(t.weight for t in taken) == pytest.approx(sum(sizes))
        expected += width * sum(t.weight * values[t.group][t.member] for t in taken)
        for t in taken:
            inclusion[t.group, t.member] += 1
    assert expected == pytest.approx(sum(map(sum, values)))
    assert len(inclusion) == sum(sizes)  # every request has a chance


def test_a_sample_without_its_weights_would_be_biased() -> None:
    """What the weights are for: the plain mean of the same samples is not the traffic's."""
    sizes = [8, 1, 1, 1]
    values = [1.0, 0.0, 0.0, 0.0]
    plain = weighted = 0.0
    for start, width in intervals(sum(sizes)):
        taken = take(sizes, 2, start)
        plain += width * sum(values[t.group] for t in taken) / len(taken)
        weighted += width * sum(t.weight * values[t.group] for t in taken) / sum(sizes)
    assert weighted == pytest.approx(8 / 11)
    assert plain == pytest.approx(1 / 2)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_every_stratum_gets_its_minimum_and_no_more_than_it_has(
    traffic: list[int], data: st.DataObject
) -> None:
    available = [data.draw(st.integers(1, requests)) for requests in traffic]
    cases = data.draw(st.integers(len(traffic), 600))
    minimum = data.draw(st.integers(1, 40))
    counts = allocate(traffic, available, cases, minimum=minimum)
    assert sum(counts) == min(cases, sum(available))
    least = min(minimum, cases // len(traffic))
    for count, groups in zip(counts, available, strict=True):
        assert min(least, groups) <= count <= groups


def test_above_the_minimum_cases_follow_the_root_of_the_traffic() -> None:
    traffic = [10_000, 2_500, 400, 100]
    counts = allocate(traffic, traffic, 850, minimum=1)
    roots = [sqrt(requests) for requests in traffic]
    for count, root in zip(counts, roots, strict=True):
        assert abs(count - 850 * root / sum(roots)) <= 1


def test_fewer_cases_than_strata_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(UsageError, match="2 cases are fewer than the 3 kinds") as caught:
        allocate([5, 5, 5], [5, 5, 5], 2, minimum=20)
    assert "60" in str(caught.value.hint)


def test_each_group_goes_to_its_rarest_property_that_is_common_enough() -> None:
    rare, common = LEAST_DISTINCT, 20
    properties = [("all", "rare")] * rare + [("all", "often")] * common + [("once",)]
    groups = [(i,) for i in range(len(properties))]
    assert count_properties(groups, properties) == {"all": 25, "rare": rare, "often": common}
    strata = {s.name: s for s in stratify(groups, properties)}
    assert {name: len(s.groups) for name, s in strata.items()} == {
        "rare": rare,
        "often": common,
        OTHER: 1,
    }
    repeated = [*groups[:rare], *((i, i) for i in range(rare, rare + common)), (99,)]
    assert count_properties(repeated, properties)["often"] == 2 * common


def test_tails_are_over_represented_and_a_seed_decides_which_cases() -> None:
    properties = [("plain", "odd") if i % 50 == 0 else ("plain",) for i in range(2000)]
    strata = stratify([(i,) for i in range(2000)], properties)
    chosen = choose(strata, 100, minimum=20, seed=0)
    counts = {s.name: len(taken) for s, taken in zip(strata, chosen, strict=True)}
    assert counts["odd"] >= 20  # two in traffic's proportions
    assert sum(counts.values()) == 100
    assert choose(strata, 100, minimum=20, seed=0) == chosen
    assert choose(strata, 100, minimum=20, seed=1) != chosen
