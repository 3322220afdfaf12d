"""The pictures of confidence show every bin and the threshold where the axes say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from edgedistill.choice_results import Reliability, ReliabilityPoint, Router, RouterPoint
from edgedistill.document import Estimate, Interval
from edgedistill.report.confidence import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    reliability_picture,
    router_picture,
)


def estimate(value: float) -> Estimate:
    return Estimate(value=value, interval=Interval(low=value - 0.05, high=value + 0.05))


def point(confidence: float, accuracy: float) -> ReliabilityPoint:
    return ReliabilityPoint(cases=20, share=0.5, confidence=confidence, accuracy=estimate(accuracy))


def router(curve: list[RouterPoint], threshold: float | None = 0.6) -> Router:
    return Router(
        target_accuracy=0.8,
        confidence="the largest probability",
        runtime="llama_cpp",
        threshold=threshold,
        cases_fitted=50,
        cases_reported=50,
        kept=estimate(0.5) if threshold is not None else None,
        accuracy=estimate(0.85) if threshold is not None else None,
        accuracy_elsewhere=0.4,
        curve=curve,
    )


CURVE = [
    RouterPoint(threshold=0.9, kept=0.25, accuracy=0.95),
    RouterPoint(threshold=0.2, kept=1.0, accuracy=0.6),
]


def test_every_bin_of_both_models_is_drawn_where_the_axes_say() -> None:
    curves = Reliability(
        reference=[point(0.25, 0.2), point(0.75, 0.8)], artifact=[point(0.5, 0.25)]
    )
    picture = reliability_picture(curves, "<int4>")
    ElementTree.fromstring(picture)
    assert "&lt;int4&gt;" in picture
    hollow = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.0" class="mark hollow', picture)
    filled = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.0" class="mark filled', picture)
    assert len(hollow) == 2
    ((across, up),) = filled
    assert float(across) == pytest.approx((LEFT + RIGHT) / 2, abs=0.1)
    assert float(up) == pytest.approx(BOTTOM - (BOTTOM - TOP) / 4, abs=0.1)


def test_the_router_shows_its_curve_its_aim_and_its_threshold() -> None:
    picture = router_picture(router(CURVE))
    ElementTree.fromstring(picture)
    assert picture.count("<circle") == len(CURVE)
    assert picture.count("<polygon") == 1
    assert "from 0.900 on: keeps 25.0%, 95.0% right" in picture
    assert 'class="floor"' in picture


def test_a_router_without_a_threshold_shows_its_curve_alone() -> None:
    picture = router_picture(router(CURVE, None))
    assert picture.count("<circle") == len(CURVE)
    assert "<polygon" not in picture
    assert router_picture(router([], None)) == ""
