"""An evaluation on the terminal: quality by slice, what was held, which answers changed."""

from __future__ import annotations

import math

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgedistill.evaluate.text_judge import CLAUSE as TEXT_CLAUSE
from edgedistill.report import words
from edgedistill.report.table import STYLES
from edgedistill.results import Evaluation, FieldQuality, Flip, FloorCheck, SliceQuality

SHOWN_FLIPS = 5
SHOWN_CHARACTERS = 100
VERDICTS = {
    "pass": "pass: the floor is met",
    "fail": "fail: the floor is not met",
    "underpowered": "underpowered: the suite cannot decide",
    "unjudged": "unjudged: no floor was given",
    "not measured": "not measured",
}
HEADINGS = ("cases", "score\n%", "ref.\n%", "retention\n% (95%)", "lost/\nwon")


def render_evaluation(evaluation: Evaluation, name: str) -> Group:
    """What is said of an artifact, to be printed by a rich console.

    Args:
        evaluation: of the artifact against its reference.
        name: of the artifact, as the user wrote it.
    """
    parts: list[RenderableType] = [_heading(evaluation, name), Text(""), _slices(evaluation)]
    if evaluation.fields:
        parts += [Text(""), _fields(evaluation.fields)]
    parts.append(Text(""))
    parts += [_check(check) for check in evaluation.floor]
    parts += _flips(evaluation.flips)
    tone = words.VERDICT_TONES[evaluation.verdict]
    mark = words.MARKS[tone]
    parts.append(Text(f"{mark} {VERDICTS[evaluation.verdict]}", style=STYLES[tone]))
    return Group(*parts)


def _heading(evaluation: Evaluation, name: str) -> Text:
    cases = f"{evaluation.cases:,} cases"
    if evaluation.cases < evaluation.cases_in_suite:
        cases = f"a sample of {evaluation.cases:,} of {evaluation.cases_in_suite:,} cases"
    text = Text.assemble((words.visible(name), "bold"), f": {cases} in {evaluation.runtime}")
    return text.append(f", {words.duration(evaluation.seconds)}")


def _slices(evaluation: Evaluation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("slice", overflow="fold", max_width=32)
    columns = list(HEADINGS)
    chosen = any(math.isfinite(found.log_score) for found in evaluation.slices)
    read = any(found.text_cases for found in evaluation.slices)
    columns += ["log-score\nloss"] if chosen else []
    columns += ["bits/byte\n(loss)"] if read else []
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for found in evaluation.slices:
        row = _answered(found)
        row += [_finite(found.log_score_loss)] if chosen else []
        row += [_bits(found)] if read else []
        table.add_row(Text(words.visible(found.slice)), *row)
    return table


def _answered(found: SliceQuality) -> list[str]:
    count = f"{found.cases + found.text_cases:,}"
    if not found.cases:
        return [count, "–", "–", "–", "–"]
    interval = words.percent_interval(found.retention_interval).rstrip("%")
    return [
        count,
        words.percent(found.score).rstrip("%"),
        words.percent(found.reference_score).rstrip("%"),
        f"{words.percent(found.retention).rstrip('%')} ({interval})",
        f"{found.broken_cases}/{found.fixed_cases}",
    ]


def _finite(value: float) -> str:
    return words.signed(value) if math.isfinite(value) else "–"


def _bits(found: SliceQuality) -> str:
    if found.bits_per_byte is None or found.bits_per_byte_loss is None:
        return "–"
    return f"{found.bits_per_byte:.3f} ({words.signed(found.bits_per_byte_loss)})"


def _fields(fields: list[FieldQuality]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("field", no_wrap=True, max_width=32)
    for heading in ("cases", "F1", "reference\nF1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in fields:
        table.add_row(
            Text(words.visible(found.field)),
            f"{found.cases:,}",
            f"{found.f1:.3f}",
            f"{found.reference_f1:.3f}",
        )
    return table


def _check(check: FloorCheck) -> Text:
    tone = words.VERDICT_TONES[check.verdict]
    text = _text_check(check) if check.clause == TEXT_CLAUSE else words.floor_check(check)
    where = "" if check.slice == "all" else f"{check.slice}: "
    text += f" ({check.note})" if check.note else ""
    return Text.assemble((f"{words.MARKS[tone]} ", STYLES[tone]), words.visible(f"{where}{text}"))


def _text_check(check: FloorCheck) -> str:
    text = f"bits per byte loss ≤ {words.number(check.limit)}: "
    if check.value is None or check.interval is None:
        return f"{text}no text was scored"
    if not math.isfinite(check.interval.high):
        return f"{text}{words.signed(check.value, 4)}; one text decides nothing"
    text += f"{words.signed(check.value, 4)} ({words.signed_interval(check.interval, 4)})"
    return f"{text}; needs {check.cases_needed:,} more texts" if check.cases_needed else text


def _flips(flips: list[Flip]) -> list[RenderableType]:
    if not flips:
        return []
    lines: list[RenderableType] = [Text(""), Text("changed answers, the heaviest first", "dim")]
    for flip in flips[:SHOWN_FLIPS]:
        lines.append(
            Text.assemble(
                (f"{flip.kind} ", STYLES["bad" if flip.kind == "broken" else "good"]),
                _short(f"{flip.id}: {flip.prompt}"),
                (
                    f"\n  expected {_short(flip.expected)!r}, "
                    f"was {_short(flip.reference_answer)!r}, is {_short(flip.artifact_answer)!r}",
                    "dim",
                ),
            )
        )
    return [*lines, Text("")]


def _short(text: str) -> str:
    text = words.visible(" ".join(text.split()))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
