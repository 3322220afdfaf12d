"""The result of ``edgedistill verify`` on the terminal: check, value, limit, verdict."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgedistill.recheck import Rechecked, RecheckReport
from edgedistill.report import words
from edgedistill.results import Check

GOOD, BAD, WARN = "green", "bold red", "yellow"


def render_checks(report: RecheckReport) -> Group:
    """One table an artifact, what is wrong in full below it, then the verdict."""
    parts: list[RenderableType] = []
    for item in report.artifacts:
        parts += [_heading(item), _table(item), *_wrong(item), *_notes(item), _verdict(item)]
    if len(report.artifacts) > 1:
        passed = sum(item.passed and not item.unavailable for item in report.artifacts)
        parts.append(Text(f"{passed} of {len(report.artifacts)} verified"))
    return Group(*parts)


def _heading(item: Rechecked) -> Text:
    against = f"against {item.against}" if item.against else "against its manifest"
    name = words.visible(item.name)
    return Text.assemble("\n", (name, "bold"), " ", (words.visible(against), "dim"), "\n")


def _table(item: Rechecked) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("check", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found")
    group = None
    for check in item.verification.checks:
        if group not in (None, _group(check)):
            table.add_row()
        group = _group(check)
        table.add_row(*_row(check))
    return table


def _row(check: Check) -> list[RenderableType]:
    mark = Text("✓", style=GOOD) if check.passed else Text("✗", style=BAD)
    shown = words.visible(check.detail).replace("\n", " ")
    return [
        Text(words.visible(check.name), style="" if check.passed else BAD),
        words.number(check.value) if check.value is not None else "",
        words.check_limit(check),
        mark,
        # One line: the column gives way, the others do not.
        Text(shown, style="dim", no_wrap=True, overflow="ellipsis"),
    ]


def _wrong(item: Rechecked) -> list[RenderableType]:
    lines: list[RenderableType] = [
        Text.assemble(
            ("✗ ", BAD), (words.visible(check.name), "bold"), f": {words.visible(check.detail)}"
        )
        for check in item.verification.checks
        if not check.passed
    ]
    return [Text(""), *lines] if lines else []


def _notes(item: Rechecked) -> list[RenderableType]:
    notes = [note for note in (item.unavailable, item.verification.limitation) if note]
    return [Text(f"\nnote: {words.visible(note)}", style=WARN) for note in notes]


def _verdict(item: Rechecked) -> Text:
    checks = item.verification.checks
    failed = sum(not check.passed for check in checks)
    if failed:
        verdict = (f"not verified: {failed} of {len(checks)} checks fail", BAD)
    elif item.unavailable:
        verdict = ("not decided: a runtime is missing", WARN)
    else:
        verdict = (f"verified: {len(checks)} checks pass", GOOD)
    return Text.assemble("\n", verdict, "\n")


def _group(check: Check) -> str:
    return check.name.partition(":")[0]
