"""``edgedistill build``: from a recipe to published artifacts and a report."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import edgedistill
from edgedistill.assemble import Assembled, assemble
from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.decoder import DecoderFacts
from edgedistill.disk import disk_error
from edgedistill.errors import UsageError
from edgedistill.kept_scores import keep_scores
from edgedistill.low_bits import low_bit_warnings
from edgedistill.lowered import lowered_clauses, read_manifests
from edgedistill.manifest import make_manifest
from edgedistill.pipeline import Pipeline, Say, say
from edgedistill.plan import BuildSteps, plan_build
from edgedistill.publish import NEW, exports_lock, publish_artifact, replace_files
from edgedistill.recipe import Recipe
from edgedistill.recipe_load import load_recipe
from edgedistill.results import BuildReport, LoweredClause

Executor = Literal["local", "ray"]


@dataclass(frozen=True)
class Options:
    """Where things are, what to run and where; nothing here changes a byte of what is built."""

    recipe: Path
    cache: CachePlace
    exports: Path = Path("exports")
    student: str | None = None
    only: tuple[str, ...] = ()
    rebench: bool = False
    executor: Executor = "local"
    ray_address: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A recipe with its student and its steps."""

    recipe: Recipe
    facts: DecoderFacts
    steps: BuildSteps


def prepare(options: Options) -> Prepared:
    """Load and check the recipe, find the student, plan the steps; no work is done.

    Raises:
        RecipeError: with every mistake in the recipe.
        UsageError: ``only`` names something that the recipe lacks.
        UnavailableError: the student lies on a hub that cannot be reached.
    """
    from edgedistill.bench.machine import fingerprint

    loaded = load_recipe(options.recipe, options.student)
    student, facts = loaded.fetched()
    steps = plan_build(
        loaded.recipe, student, options.only, machine=fingerprint(), rebench=options.rebench
    )
    return Prepared(loaded.recipe, facts, steps)


def build(options: Options, tell: Say = say) -> tuple[BuildReport, Path]:
    """Run what the cache lacks, publish the artifacts, write the report.

    Returns:
        The report, whose ``exit_code`` is the command's, and the path of the HTML page.

    Raises:
        EdgedistillError: as :func:`prepare`; or publishing failed.  A step that fails is in the
            report instead.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    prepared = prepare(options)
    for warning in low_bit_warnings(prepared.recipe, prepared.facts):
        tell(f"warning: {warning}")
    pipeline = _pipeline(options, prepared, tell)
    step_reports = pipeline.run(prepared.steps.ordered())
    assembled = assemble(prepared.recipe, prepared.steps, pipeline)
    lowered = find_lowered(prepared.recipe, options.exports)
    for clause in lowered:
        tell(f"warning: the floor was lowered since an earlier release: {clause}")
    report = BuildReport(
        recipe=prepared.recipe.name,
        edgedistill=edgedistill.__version__,
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - clock,
        license=prepared.recipe.license,
        student=student_name(prepared.recipe.student),
        context_tokens=prepared.recipe.context_tokens,
        parameters=prepared.facts.parameters,
        reference=assembled.reference,
        artifacts=[a.report for a in assembled.artifacts],
        judgements=assembled.judgements,
        steps=step_reports,
        peak_ram_limit_bytes=prepared.recipe.build.peak_ram_bytes,
        machine=_machine(),
        exit_code=assembled.exit_code,
        floor_lowered=lowered,
        rungs=assembled.rungs,
    )
    page = _publish(prepared.recipe, assembled, report, options.exports)
    keep_scores(prepared.steps, pipeline, options.exports / prepared.recipe.name)
    return report, page


def _pipeline(options: Options, prepared: Prepared, tell: Say) -> Pipeline:
    if options.executor == "local":
        if options.ray_address is not None:
            raise UsageError(
                f"--ray-address {options.ray_address}: nothing runs there",
                hint="add --executor ray",
            )
        limit_bytes = prepared.recipe.build.peak_ram_bytes
        return Pipeline(open_cache(options.cache), tell, peak_ram_bytes=limit_bytes)
    from edgedistill.preview import estimate_peaks
    from edgedistill.ray_cluster import LOCAL, Asked, need_ray
    from edgedistill.ray_executor import RayPipeline

    need_ray()
    limits = prepared.recipe.build
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or LOCAL
    asked = Asked(address, limits.threads, limits.peak_ram_bytes)
    return RayPipeline(options.cache, tell, asked=asked, peak_bytes=estimate_peaks(prepared))


def find_lowered(recipe: Recipe, exports: Path) -> list[LoweredClause]:
    """What the artifacts among the exports were held to more strictly than the recipe says now."""
    return lowered_clauses(read_manifests(exports / recipe.name), recipe.floor, recipe.slices)


def student_name(source: str) -> str:
    """What people call the student: without the directories of one machine."""
    return source if "://" in source else Path(source).name


def _publish(recipe: Recipe, assembled: Assembled, report: BuildReport, exports: Path) -> Path:
    from edgedistill.report.build import write_reports

    directory = exports / recipe.name
    with exports_lock(directory):
        for artifact in assembled.artifacts:
            manifest = make_manifest(
                recipe,
                report.student,
                artifact.report,
                artifact.steps.export,
                artifact.record,
                lowered=report.floor_lowered,
            )
            publish_artifact(artifact.files, manifest, exports / artifact.report.path)
        aside = directory / f"{NEW}report"
        try:
            aside.mkdir(exist_ok=True)
            write_reports(report, aside)
            replace_files(aside, directory)
            shutil.rmtree(aside)
        except OSError as error:
            raise disk_error(error, directory) from error
    return directory / "report.html"


def _machine() -> dict[str, str]:
    from edgedistill.bench.machine import describe_machine

    return describe_machine()
