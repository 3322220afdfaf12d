"""Pictures of quality against size, of an interval in a row, of raw values, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgedistill.report import words
from edgedistill.report.svg import Box, Canvas, Scale, nice_ticks, text_box
from edgedistill.results import (
    ArtifactReport,
    BuildReport,
    Evaluation,
    Interval,
    SliceQuality,
    Timing,
)

SHAPES = ("circle", "square", "triangle", "diamond")
WIDTH = 900
HEIGHT = 430
PLOT = Box(62, 34, WIDTH - 22, HEIGHT - 52)
COLOURS = 6  # classes rung-0 ... of the style sheet, then again from the first
CLUSTER_PX = 40


@dataclass(frozen=True)
class _Point:
    """An artifact in the picture of quality against size."""

    artifact: ArtifactReport
    evaluation: Evaluation
    shape: str
    colour: int

    @property
    def size_mb(self) -> float:
        return self.artifact.size_bytes / 1e6

    @property
    def kept(self) -> float:
        return self.evaluation.overall.retention

    @property
    def interval(self) -> Interval:
        return self.evaluation.overall.retention_interval

    @property
    def is_sample(self) -> bool:
        return words.is_sample(self.evaluation)

    @property
    def tip(self) -> str:
        return (
            f"{self.artifact.rung} {self.artifact.format}: kept {words.percent(self.kept)} "
            f"({words.percent_interval(self.interval)}) on {self.evaluation.cases:,} "
            f"cases, {words.megabytes(self.artifact.size_bytes)} MB"
        )


def formats(report: BuildReport) -> list[str]:
    """All formats, in the order of their appearance."""
    return list(dict.fromkeys(artifact.format for artifact in report.artifacts))


def rungs(report: BuildReport) -> list[str]:
    """All rungs, in the order of their appearance."""
    return list(dict.fromkeys(artifact.rung for artifact in report.artifacts))


def quality_against_size(report: BuildReport) -> str | None:
    """Retention over megabytes with intervals, the floor as a dashed line; None without a suite.

    Retention, because formats that answered different samples share no other scale.
    """
    # The whole suite's marks are drawn last, over those of samples.
    points = sorted(_points(report), key=lambda point: not point.is_sample)
    if not points:
        return None
    canvas = Canvas(WIDTH, HEIGHT, "Quality against size, with the floor")
    floors = _floor_retentions(report)
    x, y = _axes(canvas, points, floors)
    taken = _floor_lines(canvas, floors, report, y)
    for point in points:
        _error_bar(canvas, point, x(point.size_mb), y)
    marks = [(x(p.size_mb), y(p.kept)) for p in points]
    for point, (left, top) in zip(points, marks, strict=True):
        fill = "filled" if point.artifact.shippable else "hollow"
        canvas.mark(left, top, point.shape, f"mark {fill} rung-{point.colour}", point.tip)
    taken += [Box(left - 9, top - 9, left + 9, top + 9) for left, top in marks]
    _labels(canvas, _clusters(points, marks), taken)
    _format_legend(canvas, report)
    return canvas.render("picture")


def _error_bar(canvas: Canvas, point: _Point, at: float, y: Scale) -> None:
    """The interval; a sample's is pale, and has no end where it leaves the picture."""
    interval = point.interval
    css = f"error rung-{point.colour}{' pale' if point.is_sample else ''}"
    canvas.line(at, y(interval.low), at, y(interval.high), css)
    for end in (interval.low, interval.high):
        if y.low <= end <= y.high:
            canvas.line(at - 4, y(end), at + 4, y(end), css)


def _clusters(
    points: Sequence[_Point], marks: Sequence[tuple[float, float]]
) -> list[tuple[_Point, float, float]]:
    """One label for the marks of a rung that stand close together, at the rightmost of them."""
    found: list[tuple[_Point, float, float]] = []
    for point, (x, y) in sorted(zip(points, marks, strict=True), key=lambda pair: pair[1][0]):
        near = [
            i
            for i, (other, left, top) in enumerate(found)
            if other.artifact.rung == point.artifact.rung
            and abs(x - left) < CLUSTER_PX
            and abs(y - top) < CLUSTER_PX
        ]
        if near:
            found[near[-1]] = (point, x, found[near[-1]][2])
        else:
            found.append((point, x, y))
    return found


def _format_legend(canvas: Canvas, report: BuildReport) -> None:
    at = PLOT.right
    for index, name in reversed(list(enumerate(formats(report)))):
        canvas.text(at, 16, name, "tick", "end")
        at = text_box(at, 16, name, "end").left - 9
        canvas.mark(at, 12, SHAPES[index % len(SHAPES)], "mark key", name, 4.5)
        at -= 20


def _points(report: BuildReport) -> list[_Point]:
    order, shapes = rungs(report), formats(report)
    return [
        _Point(
            artifact=artifact,
            evaluation=artifact.evaluation,
            shape=SHAPES[shapes.index(artifact.format) % len(SHAPES)],
            colour=order.index(artifact.rung) % COLOURS,
        )
        for artifact in report.artifacts
        if artifact.evaluation is not None and _is_finite(artifact.evaluation.overall)
    ]


def _is_finite(quality: SliceQuality) -> bool:
    """Whether there is a retention to draw: a reference that knows nothing leaves none."""
    interval = quality.retention_interval
    return all(map(math.isfinite, (quality.retention, interval.low, interval.high)))


def _floor_retentions(report: BuildReport) -> dict[str, float]:
    """Clause with its limit -> the retention that it demands; the clauses about right answers."""
    found: dict[str, float] = {}
    for artifact in report.artifacts:
        for check in artifact.evaluation.floor if artifact.evaluation else ():
            if check.slice != "all" or check.clause not in ("score", "retention"):
                continue
            reference = (report.reference.score if report.reference else 0.0) or 1.0
            whole = reference if check.clause == "score" else 1.0
            found[words.clause_limit(check.clause, check.limit)] = check.limit / whole
    return found


def _axes(
    canvas: Canvas, points: Sequence[_Point], floors: dict[str, float]
) -> tuple[Scale, Scale]:
    levels = [1.0, *floors.values()]
    for point in points:
        levels.append(point.kept)
        if not point.is_sample:  # their long intervals would flatten all others
            levels += [point.interval.low, point.interval.high]
    y_ticks = nice_ticks(max(0.0, min(levels) - 0.005), max(levels) + 0.005)
    x_ticks = nice_ticks(0.0, 1.06 * max(p.artifact.size_bytes for p in points) / 1e6, 6)
    x = Scale(0.0, x_ticks[-1], PLOT.left, PLOT.right)
    y = Scale(y_ticks[0], y_ticks[-1], PLOT.bottom, PLOT.top)
    digits = 0 if all(math.isclose(100 * tick, round(100 * tick)) for tick in y_ticks) else 1
    for tick in y_ticks:
        canvas.line(PLOT.left, y(tick), PLOT.right, y(tick), "grid")
        canvas.text(PLOT.left - 10, y(tick) + 4, words.percent(tick, digits), "tick", "end")
    for tick in x_ticks:
        canvas.line(x(tick), PLOT.bottom, x(tick), PLOT.bottom + 5, "axis")
        canvas.text(x(tick), PLOT.bottom + 20, words.number(tick), "tick", "middle")
    canvas.line(PLOT.left, PLOT.bottom, PLOT.right, PLOT.bottom, "axis")
    canvas.text(
        PLOT.left - 48, 16, "right answers kept of the reference's, with 95% interval", "axis-title"
    )
    canvas.text(PLOT.right, HEIGHT - 10, "size of the files that ship, MB", "axis-title", "end")
    return x, y


def _floor_lines(
    canvas: Canvas, floors: dict[str, float], report: BuildReport, y: Scale
) -> list[Box]:
    """Draw the reference and the floor; return what their labels cover."""
    taken: list[Box] = []
    lines = [(f"floor: {clause}", score, "floor") for clause, score in floors.items()]
    if floors:
        canvas.rect(Box(PLOT.left, y(max(floors.values())), PLOT.right, PLOT.bottom), "below")
    if report.reference is not None:
        name = f"reference: {words.percent(report.reference.score)} right"
        lines.append((name, 1.0, "reference"))
    for label, score, css in sorted(lines, key=lambda line: -line[1]):
        canvas.line(PLOT.left, y(score), PLOT.right, y(score), css)
        # Above its line, or below it where another label stands already.
        for baseline in (y(score) - 6, y(score) + 15):
            box = text_box(PLOT.right - 4, baseline, label, "end")
            if not any(box.overlap(other) for other in taken):
                break
        canvas.text(PLOT.right - 4, baseline, label, f"{css}-label", "end")
        taken.append(box)
    return taken


def _labels(
    canvas: Canvas, clusters: Sequence[tuple[_Point, float, float]], taken: list[Box]
) -> None:
    """Put each label where it covers least, near its mark, with a thin line when it is far."""
    for point, x, y in clusters:
        name = point.artifact.rung
        places = [
            (x + dx, y + 4 + dy, anchor)
            for distance in (0, 18, 36, 54, 72, 90)
            for dy in (distance, -distance)
            for dx, anchor in ((13, "start"), (-13, "end"))
        ]
        left, baseline, anchor = min(
            places, key=lambda at: _cover(text_box(at[0], at[1], name, at[2]), taken, at[1] - y)
        )
        taken.append(text_box(left, baseline, name, anchor))
        if abs(baseline - 4 - y) > 12:
            canvas.line(x, y, left + (-3 if anchor == "start" else 3), baseline - 4, "leader")
        canvas.text(left, baseline, name, f"label rung-{point.colour}", anchor)


def _cover(box: Box, taken: Sequence[Box], distance: float) -> float:
    """How bad a place for a label is: what it covers, how far it lies in and out of the plot."""
    outside = max(0.0, PLOT.left - box.left) + max(0.0, box.right - PLOT.right)
    outside += max(0.0, box.bottom - PLOT.bottom) + max(0.0, PLOT.top - box.top)
    return sum(box.overlap(other) for other in taken) + 50 * outside + 0.6 * abs(distance)


def whisker(
    value: float, interval: Interval, low: float, high: float, limit: float | None, tone: str
) -> str:
    """One figure with its interval on the scale ``low`` ... ``high``, 1.0 as a thin line."""
    width, height = 190, 22
    canvas = Canvas(width, height, f"{words.percent(value)} {words.percent_interval(interval)}")
    x, middle = Scale(low, high, 6, width - 6), height / 2
    if low < 1.0 < high:
        canvas.line(x(1.0), 1, x(1.0), height - 1, "axis")
    if limit is not None:
        canvas.line(x(limit), 1, x(limit), height - 1, "floor")
    canvas.line(x(interval.low), middle, x(interval.high), middle, f"error {tone}")
    for end in (interval.low, interval.high):
        if low <= end <= high:  # an interval that goes on beyond the scale has no end
            canvas.line(x(end), middle - 3.5, x(end), middle + 3.5, f"error {tone}")
    tip = f"{words.percent(value)}, 95% interval {words.percent_interval(interval)}"
    canvas.mark(x(value), middle, "circle", f"mark filled {tone}", tip, 4)
    return canvas.render("whisker")


def strip(timing: Timing, slowest: float) -> str:
    """The raw values of a measurement as dots from 0 to ``slowest``, p50 as a line."""
    width, height = 150, 18
    canvas = Canvas(width, height, f"{len(timing.raw)} repeats")
    x = Scale(0.0, slowest * 1.02, 2, width - 4)
    canvas.line(2, height / 2, width - 2, height / 2, "grid")
    for value in timing.raw:
        canvas.mark(x(value), height / 2, "circle", "raw", words.number(value), 3)
    canvas.line(x(timing.p50), 2, x(timing.p50), height - 2, "median")
    return canvas.render("strip")
