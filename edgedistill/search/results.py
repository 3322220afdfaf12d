"""What a search finds, as typed documents: the contents of ``NAME.search.json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edgedistill.document import Document
from edgedistill.results import SliceQuality

State = Literal["wins", "passes", "fails", "left out", "not tried", "to try"]


class SearchedCandidate(Document):
    """One candidate: what it would be, and what came of it.

    Attributes:
        what: it does, for people.
        source: the ladder, or a rung of the recipe.
        steps: of its rung, as the YAML of a recipe has them.
        planned_bytes: format -> bytes of its weights, by arithmetic; empty when it is left out.
        planned_seconds: of what the cache lacks, without exports and verification.
        size_bytes: format -> bytes of all files that ship, of what was exported.
        state: ``left out`` was decided by arithmetic, ``not tried`` by other candidates or the
            clock; ``to try`` is what a dry run says.
        reason: one sentence.
        exit_code: that a build of it would end with, as far as it was measured.
        kl_mean: to the reference on the worst text, nats a token, in the format that judges.
        slices: quality in that format, all cases first.
        seconds: that its own steps took, now or when the cache got them.
        ran: whether any of them ran now.
    """

    name: str
    what: str
    source: Literal["ladder", "recipe"]
    steps: list[dict[str, Any]]
    planned_bytes: dict[str, int] = Field(default={})
    planned_seconds: float = 0.0
    size_bytes: dict[str, int] = Field(default={})
    state: State
    reason: str
    exit_code: int | None = None
    kl_mean: float | None = None
    slices: list[SliceQuality] = Field(default=[])
    seconds: float = 0.0
    ran: bool = False


class SearchReport(Document):
    """A whole search.

    Attributes:
        formats: that a winner passes in; the first is the one that candidates are judged in.
        candidates: in the order in which they come up.
        winner: the smallest that passes; None if none does, and in a dry run.
        complete: False where the clock ended the search: something smaller may pass.
        written: file name of the recipe that was written.
        notes: what else there is to know, such as stages that are not installed.
        seconds: of this run.
    """

    schema_version: Literal[1] = 1
    recipe: str
    edgedistill: str
    student: str
    formats: list[str]
    candidates: list[SearchedCandidate]
    winner: str | None
    complete: bool
    written: str | None
    notes: list[str]
    seconds: float
    exit_code: int
