"""Texts: a loss in a slice that nobody named is found, and chance is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from edgedistill.evaluate.text_judge import TOLERATED_LOSS, UNNAMED_TEXTS, judge_texts
from edgedistill.evaluate.text_statistics import LEAST_TEXTS, TextPairs
from edgedistill.floor import Floor, SliceSpec
from edgedistill.report.words import floor_check


def pairs(count: int, loss: float, seed: int = 0, noise: float = 0.05) -> TextPairs:
    rng = np.random.default_rng(seed)
    reference = rng.uniform(0.8, 1.4, count)
    artifact = reference + loss + rng.normal(0.0, noise, count)
    return TextPairs(np.ones(count), rng.uniform(50.0, 500.0, count), reference, artifact)


def found(slices: dict[str, TextPairs], floor: Floor | None, **specs: SliceSpec) -> list[str]:
    slices = {"all": pairs(500, 0.0), **slices}
    checks = judge_texts(slices, floor, specs)
    return [check.slice for check in checks if check.clause == UNNAMED_TEXTS]


def test_a_loss_that_nobody_named_fails_by_its_name() -> None:
    slices = {"code": pairs(60, 0.1), "prose": pairs(60, 0.0, 1)}
    (check,) = judge_texts({"all": pairs(500, 0.0), **slices}, Floor(score=0.5), {})
    assert (check.clause, check.slice, check.verdict) == (UNNAMED_TEXTS, "code", "fail")
    assert check.limit == TOLERATED_LOSS
    assert check.value == pytest.approx(0.1, abs=0.02)
    assert floor_check(check).startswith("unnamed loss in texts: +0.")
    assert floor_check(check).endswith("bits per byte, tolerated +0.02")


def test_what_was_named_or_is_tolerated_or_small_does_not_fail() -> None:
    slices = {"code": pairs(60, 0.1)}
    assert found(slices, Floor(score=0.5)) == ["code"]
    assert found(slices, Floor(score=0.5), code=SliceSpec(sacrificed="no code in the app")) == []
    assert found(slices, Floor(max_bits_per_byte_loss=0.2)) == []
    assert found({"code": pairs(60, 0.01, noise=0.001)}, Floor(score=0.5)) == []
    assert found({"code": pairs(LEAST_TEXTS - 1, 0.5)}, Floor(score=0.5)) == []
    assert found(slices, None) == []  # nothing is judged


def test_chance_is_rarely_taken_for_a_loss() -> None:
    alarms = 0
    for seed in range(100):
        slices = {f"s{i}": pairs(30, 0.0, 100 * seed + i, noise=0.3) for i in range(5)}
        alarms += bool(found(slices, Floor(score=0.5)))
    # 2.5 are expected; ten or more come with a chance of 2e-4.
    assert alarms < 10
