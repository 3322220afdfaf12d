"""Waivers: losses below the floor that somebody consented to, for a time.

They lie in a file beside the recipe that is committed with it, so that consent is reviewed like
code.  A waiver names the artifact, the slice, the loss that was measured, and the day on which it
ends; nothing else is let through by it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from edgedistill.disk import disk_error
from edgedistill.errors import InputError
from edgedistill.evaluate.capabilities import UNNAMED
from edgedistill.evaluate.judge import LARGEST_VALUE, overall_verdict
from edgedistill.evaluate.text_judge import UNNAMED_TEXTS
from edgedistill.floor import Floor, IsoDate, Words
from edgedistill.recipe_yaml import dotted, read_yaml
from edgedistill.results import Document, Evaluation, FloorCheck

HEADER = (
    "# Losses that somebody consented to, each for a time. `edgedistill approve` adds to this\n"
    "# file; commit it with the recipe.\n"
)
ROUNDING = 1e-9  # a loss of the same size, written and read again

# The clauses whose figure grows with the loss; of the others it falls.
_GROWS = {*LARGEST_VALUE, "protected", UNNAMED, UNNAMED_TEXTS}


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a line break or a character that cannot be seen")
    return text


Line = Annotated[Words, AfterValidator(_one_line)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Waiver(Document):
    """Consent to the loss of one slice in one artifact.

    Attributes:
        by, because: who consents, and why.
        on, until: the days; ``until`` is the last on which it holds.
        recipe, rung, format: the artifact; ``sha256`` of its files, which says what was looked at.
        consented: clause -> the figure that was measured; a broader loss is not covered.
    """

    slice: Line
    by: Line
    because: Line
    on: IsoDate
    until: IsoDate
    recipe: Line
    rung: Line
    format: Line
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    consented: Annotated[dict[Line, Finite], Field(min_length=1)]

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        if self.until < self.on:
            raise ValueError(f"until = {self.until} lies before on = {self.on}")
        return self

    def is_for(self, recipe: str, rung: str, format_name: str) -> bool:
        """Whether it is about this artifact, in whatever version."""
        return (self.recipe, self.rung, self.format) == (recipe, rung, format_name)

    def holds_on(self, today: date) -> bool:
        """Whether it has not expired."""
        return today.isoformat() <= self.until

    def covers(self, check: FloorCheck) -> bool:
        """Whether a failed clause lost no more than what was consented to."""
        consented = self.consented.get(check.clause)
        if consented is None or check.value is None or check.slice != self.slice:
            return False
        excess = check.value - consented if check.clause in _GROWS else consented - check.value
        return excess <= ROUNDING


def waivers_beside(recipe: Path) -> Path:
    """Where the waivers of a recipe lie unless it says otherwise: ``NAME.waivers.yaml``."""
    return recipe.with_suffix(".waivers.yaml")


def read_waivers(path: Path | None) -> list[Waiver]:
    """The waivers in a file; none where there is no file.

    Raises:
        InputError: everything that is wrong in the file, with line, key and value.
    """
    if path is None or not path.exists():
        return []
    try:
        document = read_yaml(path)
    except RecursionError as error:
        raise InputError("is nested too deeply", where=str(path)) from error
    problems: list[Exception] = list(document.problems)
    entries = document.data
    if entries is not None and not isinstance(entries, list):
        problems.append(InputError("is not a list of waivers", where=str(path)))
        entries = None
    waivers = []
    for index, entry in enumerate(entries or []):
        try:
            waivers.append(Waiver.model_validate(entry))
        except ValidationError as error:
            for item in error.errors(include_url=False):
                key = dotted(item["loc"])
                message = item["msg"].removeprefix("Value error, ")
                where = document.where((index, *item["loc"]))
                problems.append(InputError(f"{key}: {message}" if key else message, where=where))
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise InputError(
            f"{count} in the waivers\n{lines}", hint="`edgedistill approve` writes this file"
        )
    return waivers


def append_waiver(path: Path, waiver: Waiver, *, recipe: Path) -> None:
    """Add a waiver at the end of a file, whole or not at all.

    Args:
        path: is made if need be; what it holds already stays as it is.
        waiver: to add.
        recipe: an existing file that is locked, so that two at once come one after the other.

    Raises:
        InputError: the file is damaged; it is left as it is.
        StageError: the disk is full or not writable.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        with recipe.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                _write_aside(aside, path, waiver)
                aside.replace(path)
            finally:  # while nobody else may write there
                aside.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def _write_aside(aside: Path, path: Path, waiver: Waiver) -> None:
    """Write what ``path`` holds and the waiver below it, and read it back."""
    before = read_waivers(path)
    text = path.read_text(encoding="utf-8") if path.exists() else HEADER
    text += "" if text.endswith("\n") else "\n"
    with aside.open("w", encoding="utf-8") as file:
        file.write(text + describe_waiver(waiver))
        file.flush()
        os.fsync(file.fileno())
    if not _holds(aside, [*before, waiver]):
        hint = "write its entries one below the other, as `- slice: ...`"
        raise InputError("nothing can be added at its end", where=str(path), hint=hint)


def _holds(path: Path, waivers: list[Waiver]) -> bool:
    try:
        return read_waivers(path) == waivers
    except InputError:
        return False


def describe_waiver(waiver: Waiver) -> str:
    """The lines of a waiver in the file; texts are quoted, so that they stay texts."""
    fields = waiver.model_dump(exclude={"consented"})
    lines = [f"{name}: {_quoted(value)}" for name, value in fields.items()]
    lines += ["consented:", *(f"  {_quoted(k)}: {v!r}" for k, v in waiver.consented.items())]
    return "".join(f"{'  ' if i else '- '}{line}\n" for i, line in enumerate(lines))


def _quoted(text: str) -> str:
    dumped: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=1_000_000)
    return dumped.strip()


def apply_waivers(
    evaluation: Evaluation, waivers: Sequence[Waiver], *, floor: Floor | None, today: date
) -> Evaluation:
    """The evaluation with what was consented to passing, and said so.

    Args:
        evaluation: as the judge left it.
        waivers: of this artifact, expired ones too.
        floor: of the recipe, which says what undecided clauses mean.
        today: decides which have expired.
    """
    checks = [_apply(check, waivers, today) for check in evaluation.floor]
    if checks == evaluation.floor:
        return evaluation
    verdict = overall_verdict(checks, floor)
    return evaluation.model_copy(update={"floor": checks, "verdict": verdict})


def _apply(check: FloorCheck, waivers: Sequence[Waiver], today: date) -> FloorCheck:
    """The last waiver that covers a failed clause counts; else the last that would have."""
    if check.verdict != "fail":
        return check
    meant = [w for w in waivers if w.slice == check.slice and check.clause in w.consented]
    for waiver in reversed(meant):
        if waiver.holds_on(today) and waiver.covers(check):
            note = f"waived by {waiver.by} until {waiver.until}: {waiver.because}"
            return check.model_copy(update={"verdict": "pass", "waived": True, "note": note})
    return check.model_copy(update={"note": _why_not(meant[-1], check, today)}) if meant else check


def _why_not(waiver: Waiver, check: FloorCheck, today: date) -> str:
    if not waiver.holds_on(today):
        return f"the waiver by {waiver.by} expired on {waiver.until}"
    consented = waiver.consented[check.clause]
    return f"{waiver.by} consented to {consented:.4g}, and it is {check.value:.4g}"


def utc_today() -> date:
    """The day by which waivers expire: the same everywhere."""
    return datetime.now(UTC).date()


def in_force(
    waivers: Sequence[Waiver], recipe: str, today: date
) -> Mapping[tuple[str, str], list[Waiver]]:
    """(rung, format) -> the waivers that hold today."""
    found: dict[tuple[str, str], list[Waiver]] = {}
    for waiver in waivers:
        if waiver.recipe == recipe and waiver.holds_on(today):
            found.setdefault((waiver.rung, waiver.format), []).append(waiver)
    return found
