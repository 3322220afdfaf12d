"""A small SVG canvas and the scales of its axes.

Colours and fonts come from the page's style sheet through classes, so that a picture follows the
light or dark scheme of the page that it stands in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

CHARACTER_WIDTH = 6.4  # pixels of an average character at 12 px, for boxes of text


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, to keep labels off one another."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that two boxes share, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside (or is no number) is drawn at the edge."""
        value = self.high if math.isnan(value) else min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start_px + (value - low) / (high - low) * (self.end_px - self.start_px)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover the range."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


class Canvas:
    """Collects SVG elements; all text is escaped."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._width = width
        self._height = height
        self._title = title
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'
        )

    def rect(self, box: Box, css: str) -> None:
        """A filled rectangle."""
        width, height = box.right - box.left, box.bottom - box.top
        self._parts.append(
            f'<rect x="{box.left:.1f}" y="{box.top:.1f}" width="{max(0.0, width):.1f}" '
            f'height="{max(0.0, height):.1f}" class="{css}"/>'
        )

    def text(self, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
        """A line of text on the baseline ``y``."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">'
            f"{escape(words)}</text>"
        )

    def mark(self, x: float, y: float, shape: str, css: str, tip: str, size: float = 6) -> None:
        """A circle, square, triangle or diamond with a tooltip."""
        tip = f"<title>{escape(tip)}</title>"
        if shape == "circle":
            element = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{css}">'
            self._parts.append(f"{element}{tip}</circle>")
            return
        corners = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        }[shape]
        points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
        self._parts.append(f'<polygon points="{points}" class="{css}">{tip}</polygon>')

    def render(self, css: str = "") -> str:
        """The ``<svg>`` element."""
        return (
            f'<svg viewBox="0 0 {self._width:g} {self._height:g}" role="img" class="{css}" '
            f'aria-label="{escape(self._title, quote=True)}">{"".join(self._parts)}</svg>'
        )


def text_box(x: float, y: float, words: str, anchor: str = "start", size_px: float = 12) -> Box:
    """About the rectangle that a text on the baseline ``y`` covers."""
    width = len(words) * CHARACTER_WIDTH * size_px / 12
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return Box(left, y - 0.85 * size_px, left + width, y + 0.25 * size_px)
