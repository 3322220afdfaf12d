"""The picture of how far each artifact's predictions lie from the judge's, by text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgedistill.report import words
from edgedistill.report.pictures import SHAPES, WIDTH
from edgedistill.report.svg import Canvas, Scale, text_box
from edgedistill.results import BuildReport, TextDivergence

MIN_KL = 1e-8  # the left end of the axis; what is closer is drawn there


def divergence_by_text(report: BuildReport) -> str | None:
    """Mean KL of each text on a logarithmic axis, a row for each artifact; None unverified."""
    rows = [(a, a.verification) for a in report.artifacts if a.verification is not None]
    if not rows:
        return None
    row_px, top, left, right = 26.0, 34.0, 128.0, WIDTH - 22.0
    bottom = top + row_px * len(rows)
    canvas = Canvas(WIDTH, bottom + 46, "Mean KL by text")
    values = [t.kl_mean for _, v in rows for t in (*v.against_weights, *v.against_reference)]
    values = [value for value in values if math.isfinite(value)]
    low, high = 10.0 ** _power_below(min(values, default=1e-3)), 1.0
    x = Scale(low, high, left, right, logarithmic=True)
    power = low
    while power <= high * 1.01:
        canvas.line(x(power), top - 4, x(power), bottom, "grid")
        canvas.text(x(power), bottom + 18, words.number(power), "tick", "middle")
        power *= 10
    names = list(dict.fromkeys(t.text for _, v in rows for t in v.against_reference))
    for index, (artifact, verification) in enumerate(rows):
        middle = top + row_px * (index + 0.5)
        if index and artifact.rung != rows[index - 1][0].rung:
            canvas.line(0, middle - row_px / 2, right, middle - row_px / 2, "grid")
        canvas.text(0, middle + 4, artifact.rung, "label")
        canvas.text(left - 16, middle + 4, artifact.format, "tick", "end")
        _texts(canvas, verification.against_weights, x, middle, names, "hollow")
        _texts(canvas, verification.against_reference, x, middle, names, "filled")
    canvas.text(right, bottom + 40, "mean KL, nats a token (logarithmic)", "axis-title", "end")
    at = 0.0
    for index, name in enumerate(names):
        canvas.mark(at + 6, 12, SHAPES[index % len(SHAPES)], "mark filled rung-0", name, 5)
        canvas.text(at + 17, 16, name, "tick")
        at += 17 + text_box(0, 0, name).right + 22
    canvas.text(right, 16, "filled: to the reference · hollow: to its own weights", "tick", "end")
    return canvas.render("picture")


def _texts(
    canvas: Canvas,
    texts: Sequence[TextDivergence],
    x: Scale,
    middle: float,
    names: Sequence[str],
    fill: str,
) -> None:
    if not texts:
        return
    at = [x(t.kl_mean) for t in texts]
    canvas.line(min(at), middle, max(at), middle, "span")
    for text, left in zip(texts, at, strict=True):
        shape = SHAPES[names.index(text.text) % len(SHAPES)] if text.text in names else "circle"
        tip = f"{text.text}: mean KL {words.number(text.kl_mean)} over {text.tokens:,} tokens"
        canvas.mark(left, middle, shape, f"mark {fill} rung-0", tip, 5)


def _power_below(value: float) -> int:
    """The exponent of the power of ten below a value, between MIN_KL and a tenth."""
    return min(-1, math.floor(math.log10(max(value, MIN_KL))))
