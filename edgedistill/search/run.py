"""A whole search: from a recipe to the winning rung, written as a recipe."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import edgedistill
from edgedistill.build import student_name
from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.errors import StageError
from edgedistill.pipeline import Pipeline, Say, say
from edgedistill.plan import plan_build
from edgedistill.recipe_load import load_recipe
from edgedistill.recipe_yaml import read_yaml
from edgedistill.search.candidates import Candidate, Field, find_candidates, judged_first
from edgedistill.search.climb import Climb, Limits, describe_candidate
from edgedistill.search.found_recipe import found_path, read_text, with_rung, write_found
from edgedistill.search.measure import Measurer
from edgedistill.search.results import SearchedCandidate, SearchReport
from edgedistill.search.table import header_lines


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What to search, where things are, how far to go.

    Attributes:
        out: of the recipe that is written; by default NAME.found.yaml beside the recipe's
            NAME.yaml.
        overwrite: whether that may replace a file.
    """

    recipe: Path
    cache: CachePlace
    student: str | None = None
    out: Path | None = None
    overwrite: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)


def plan_search(options: SearchOptions) -> SearchReport:
    """What a search would try, by arithmetic; nothing is run or written.

    Raises:
        EdgedistillError: as :func:`search_recipe`.
    """
    began = time.monotonic()
    field = find_candidates(options.recipe, options.student, options.cache)
    results = [
        left_out(c) if c.left_out is not None else describe_candidate(c, "to try", "")
        for c in field.candidates
    ]
    return _report(field, results, began)


def search_recipe(options: SearchOptions, tell: Say = say) -> SearchReport:
    """Climb; write the winner as a recipe, and all that was found beside it.

    Raises:
        RecipeError: with every mistake in the recipe.
        UsageError: the recipe has no floor, or the recipe to write exists.
        UnavailableError: the student lies on a hub that cannot be reached.
        EdgedistillError: the reference cannot be made or scored, or a file cannot be written.
    """
    began = time.monotonic()
    path = found_path(options.recipe, options.out, overwrite=options.overwrite)
    field = find_candidates(options.recipe, options.student, options.cache)
    _tell_left_out(field, tell)
    limit_bytes = field.prepared.recipe.build.peak_ram_bytes
    pipeline = Pipeline(open_cache(options.cache), tell, peak_ram_bytes=limit_bytes)
    measurer = Measurer(field, pipeline)
    climb = Climb(field.open, measurer, tell, options.limits)
    winner = None
    if field.open:
        measurer.run_reference()
        winner = climb.run()
    results = [left_out(c) if c.left_out is not None else climb.result(c) for c in field.candidates]
    for result in results:
        if result.state == "not tried":
            tell(f"{result.name}: not tried: {result.reason}")
    report = _report(field, results, began).model_copy(
        update={
            "winner": winner.name if winner else None,
            "complete": climb.complete,
            "written": path.name if winner else None,
            "exit_code": int(climb.exit_code),
        }
    )
    if winner is not None:
        _write_winner(options, field, winner, report, path)
    record = options.recipe.with_suffix(".search.json")
    write_found(record, report.model_dump_json(indent=2) + "\n", lambda _: None)
    return report


def left_out(candidate: Candidate) -> SearchedCandidate:
    """A candidate that arithmetic rules out."""
    return describe_candidate(candidate, "left out", candidate.left_out or "")


def _tell_left_out(field: Field, tell: Say) -> None:
    for note in field.notes:
        tell(note)
    for candidate in field.candidates:
        if candidate.left_out is not None:
            tell(f"{candidate.name}: left out: {candidate.left_out}")


def _report(field: Field, results: Sequence[SearchedCandidate], began: float) -> SearchReport:
    recipe = field.prepared.recipe
    formats = judged_first(recipe, [t.format for t in recipe.all_targets().values()])
    return SearchReport(
        recipe=recipe.name,
        edgedistill=edgedistill.__version__,
        student=student_name(recipe.student),
        formats=formats,
        candidates=list(results),
        winner=None,
        complete=True,
        written=None,
        notes=list(field.notes),
        seconds=time.monotonic() - began,
        exit_code=0,
    )


def _write_winner(
    options: SearchOptions, field: Field, winner: Candidate, report: SearchReport, path: Path
) -> None:
    """Write the recipe, once a build of it is known to need no step that was not run."""
    measured = {step.key for step in field.steps_of(winner.name).ordered()}

    def check(written: Path) -> None:
        loaded = load_recipe(written, options.student)
        student, _ = loaded.fetched()
        machine = _machine()
        steps = plan_build(loaded.recipe, student, machine=machine).ordered()
        if {step.key for step in steps} != measured:
            raise StageError(
                f"the rung {winner.name} could not be put into the recipe's text",
                where=str(options.recipe),
                hint=f"put it there by hand: {winner.steps}",
            )

    text = with_rung(
        read_text(options.recipe),
        winner.name,
        winner.steps,
        header=header_lines(report, f"edgedistill search {options.recipe.name}"),
        waivers=_unsaid_waivers(options.recipe, field),
    )
    write_found(path, text, check)


def _unsaid_waivers(path: Path, field: Field) -> str | None:
    """The recipe's file of waivers, which a recipe of another name would not find by itself."""
    waivers = field.prepared.recipe.waivers
    data = read_yaml(path).data
    said = isinstance(data, dict) and "waivers" in data
    return waivers.name if waivers is not None and waivers.exists() and not said else None


def _machine() -> str:
    from edgedistill.bench.machine import fingerprint

    return fingerprint()
