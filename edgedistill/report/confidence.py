"""Pictures of confidence: can it be believed, and what stays on the device at which accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from edgedistill.choice_results import Reliability, ReliabilityPoint, Router
from edgedistill.report import words
from edgedistill.report.svg import Canvas, Scale, nice_ticks

WIDTH, HEIGHT = 430.0, 320.0
LEFT, TOP, RIGHT, BOTTOM = 52.0, 48.0, WIDTH - 24.0, HEIGHT - 46.0


def reliability_picture(reliability: Reliability, name: str) -> str:
    """Share of right answers against confidence, the reference hollow, the artifact filled.

    Args:
        reliability: curves of both, a point for each bin.
        name: of the artifact's rung.
    """
    canvas = Canvas(WIDTH, HEIGHT, "Share of right answers against confidence")
    x, y = Scale(0.0, 1.0, LEFT, RIGHT), Scale(0.0, 1.0, BOTTOM, TOP)
    _axes(canvas, x, y, ("confidence", "right"))
    canvas.line(x(0.0), y(0.0), x(1.0), y(1.0), "reference")
    _curve(canvas, reliability.reference, x, y, "hollow")
    _curve(canvas, reliability.artifact, x, y, "filled")
    canvas.text(
        LEFT, 14, f"filled: {name} · hollow: reference · line: as right as it is sure", "tick"
    )
    return canvas.render("picture small")


def router_picture(router: Router) -> str:
    """Accuracy of the artifact's own answers against the share of traffic that it keeps."""
    if not router.curve:
        return ""
    canvas = Canvas(WIDTH, HEIGHT, "Accuracy against the share of traffic kept on the device")
    low = min(*(point.accuracy for point in router.curve), router.target_accuracy)
    x, y = Scale(0.0, 1.0, LEFT, RIGHT), Scale(nice_ticks(low, 1.0)[0], 1.0, BOTTOM, TOP)
    _axes(canvas, x, y, ("kept on the device", "right"))
    canvas.line(LEFT, y(router.target_accuracy), RIGHT, y(router.target_accuracy), "floor")
    places = [(x(point.kept), y(point.accuracy)) for point in router.curve]
    for (x1, y1), (x2, y2) in pairwise(places):
        canvas.line(x1, y1, x2, y2, "span")
    for point, (across, up) in zip(router.curve, places, strict=True):
        tip = (
            f"from {point.threshold:.3f} on: keeps {words.percent(point.kept)}, "
            f"{words.percent(point.accuracy)} right"
        )
        canvas.mark(across, up, "circle", "mark filled rung-0", tip, 4)
    if router.kept is not None and router.accuracy is not None:
        across, interval = x(router.kept.value), router.accuracy.interval
        canvas.line(across, y(interval.low), across, y(interval.high), "error good")
        tip = f"the threshold {router.threshold:.3f}" if router.threshold is not None else ""
        canvas.mark(across, y(router.accuracy.value), "diamond", "mark filled rung-0", tip, 7)
    canvas.text(LEFT, 14, "line: the aim · diamond: the threshold, with its interval", "tick")
    return canvas.render("picture small")


def _axes(canvas: Canvas, x: Scale, y: Scale, names: tuple[str, str]) -> None:
    for tick in nice_ticks(x.low, x.high):
        canvas.line(x(tick), TOP, x(tick), BOTTOM, "grid")
        canvas.text(x(tick), BOTTOM + 16, words.percent(tick, 0), "tick", "middle")
    for tick in nice_ticks(y.low, y.high):
        canvas.line(LEFT, y(tick), RIGHT, y(tick), "grid")
        canvas.text(LEFT - 6, y(tick) + 4, words.percent(tick, 0), "tick", "end")
    canvas.text(RIGHT, BOTTOM + 36, names[0], "axis-title", "end")
    canvas.text(LEFT - 6, TOP - 12, names[1], "axis-title", "end")


def _curve(
    canvas: Canvas, points: Sequence[ReliabilityPoint], x: Scale, y: Scale, fill: str
) -> None:
    """A mark for each bin, with the interval of its share of right answers."""
    for point in points:
        across, interval = x(point.confidence), point.accuracy.interval
        if fill == "filled":
            canvas.line(across, y(interval.low), across, y(interval.high), "error muted")
        tip = (
            f"{words.percent(point.confidence)} sure, {words.percent(point.accuracy.value)} right "
            f"({point.cases:,} cases)"
        )
        canvas.mark(across, y(point.accuracy.value), "circle", f"mark {fill} rung-0", tip, 4)
