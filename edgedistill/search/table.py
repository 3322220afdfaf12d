"""A search on the terminal, and in the comment on top of the recipe that it found."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgedistill.report import words
from edgedistill.report.table import STYLES
from edgedistill.results import SliceQuality
from edgedistill.search.results import SearchedCandidate, SearchReport, State

TONES: dict[State, words.Tone] = {
    "wins": "good",
    "passes": "good",
    "fails": "bad",
    "left out": "muted",
    "not tried": "muted",
    "to try": "warn",
}
SHOWN_SLICES = 3
SLICES = "lost where most, points"


def render_search(report: SearchReport) -> Group:
    """All candidates and what follows, to be printed by a rich console."""
    return Group(_candidates(report), Text(""), *_reasons(report), *_outcome(report))


def header_lines(report: SearchReport, command: str) -> list[str]:
    """The search in plain lines: what was tried, with figures.

    Args:
        report: with a winner.
        command: that found it.
    """
    rows = [_plain_row(report, c) for c in report.candidates]
    heading = ["candidate", f"MB, {report.formats[0]}", "retention", "KL", "outcome"]
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading) - 1)]
    formats = ", ".join(report.formats)
    yet = "" if report.complete else " The time ended the search: smaller ones may pass."
    lines = [
        f"Found by `{command}` with edgedistill {report.edgedistill}:",
        f"{report.winner} is the smallest candidate that passes the floor and the budgets as "
        f"{formats}.{yet}",
        "",
    ]
    for row in [heading, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
        lines.append("  " + "  ".join([*cells, row[-1]]))
    return lines


def _plain_row(report: SearchReport, candidate: SearchedCandidate) -> list[str]:
    reason = words.visible(" ".join(candidate.reason.split()))
    outcome = f"{candidate.state}: {reason}" if reason else candidate.state
    return [
        candidate.name,
        _size(report, candidate),
        _retention(candidate),
        _kl(candidate),
        outcome,
    ]


def _candidates(report: SearchReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("candidate", no_wrap=True)
    for heading in (f"MB\n{report.formats[0]}", "retention\n% ±95%", "KL\nnats"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(SLICES, overflow="fold", max_width=44)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for candidate in report.candidates:
        tone = TONES[candidate.state]
        table.add_row(
            Text(words.visible(candidate.name)),
            _size(report, candidate),
            _retention(candidate, interval=True),
            _kl(candidate),
            Text(words.visible(_slices(candidate))),
            _time(candidate),
            Text(f"{words.MARKS[tone]} {candidate.state}", style=STYLES[tone]),
        )
    return table


def _size(report: SearchReport, candidate: SearchedCandidate) -> str:
    """Of the files, or about that of the weights where there are no files."""
    name = report.formats[0]
    if name in candidate.size_bytes:
        return words.megabytes(candidate.size_bytes[name])
    if name in candidate.planned_bytes:
        return f"~{words.megabytes(candidate.planned_bytes[name])}"
    return "–"


def _retention(candidate: SearchedCandidate, *, interval: bool = False) -> str:
    overall = candidate.slices[0] if candidate.slices else None
    if overall is None or not overall.cases:
        return "–"
    text = words.percent(overall.retention)
    if not interval:
        return text
    half = (overall.retention_interval.high - overall.retention_interval.low) / 2
    return f"{text.rstrip('%')} ±{words.percent(half).rstrip('%')}"


def _kl(candidate: SearchedCandidate) -> str:
    return "–" if candidate.kl_mean is None else words.number(candidate.kl_mean, 2)


def _slices(candidate: SearchedCandidate) -> str:
    """The slices that lost most of their score."""
    lost = [(_points(s), s.slice) for s in candidate.slices[1:] if s.cases]
    lost = sorted((p, name) for p, name in lost if math.isfinite(p) and p < 0)
    shown = (f"{name} {words.signed(points, 1)}" for points, name in lost[:SHOWN_SLICES])
    return ", ".join(shown) or "–"


def _points(found: SliceQuality) -> float:
    return 100 * (found.score - found.reference_score)


def _time(candidate: SearchedCandidate) -> str:
    if candidate.state in ("wins", "passes", "fails"):
        return words.duration(candidate.seconds) + ("" if candidate.ran else "°")
    return f"~{words.duration(candidate.planned_seconds)}" if candidate.planned_seconds else "–"


def _reasons(report: SearchReport) -> Iterator[RenderableType]:
    for candidate in report.candidates:
        if candidate.reason:
            text = words.visible(f": {candidate.reason}")
            yield Text.assemble((words.visible(candidate.name), "bold"), text)
    for note in report.notes:
        yield Text(words.visible(note), style="dim")
    legend = "~ by arithmetic: of weights alone, of time without exports and verification"
    if any(c.seconds and not c.ran for c in report.candidates):
        legend += "; ° from the cache"
    yield Text(f"\n{legend}\n", style="dim")


def _outcome(report: SearchReport) -> Iterator[RenderableType]:
    if not report.complete:
        yield Text("The time ended the search; the same command goes on.", style=STYLES["warn"])
    if report.winner is not None:
        won = next(c for c in report.candidates if c.name == report.winner)
        sizes = ", ".join(f"{words.megabytes(b)} MB {f}" for f, b in won.size_bytes.items())
        name = (words.visible(won.name), "bold green")
        yield Text.assemble(
            ("✓ ", STYLES["good"]), "the smallest that passes: ", name, f", {sizes}"
        )
    elif any(c.state == "to try" for c in report.candidates):
        count = sum(c.state == "to try" for c in report.candidates)
        yield Text(f"{count} candidates to try, fewer if one spares another; nothing was run")
    else:
        yield Text.assemble(("✗ ", STYLES["bad"]), "no candidate passes")
    if report.written is not None:
        yield Text.assemble("recipe: ", (words.visible(report.written), "cyan"))
