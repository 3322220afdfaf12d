"""The command line: arguments to one function to an exit code.

stdout is data, stderr is talk.  Whatever costs time to import is imported inside the commands.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from edgedistill import __version__
from edgedistill.cache_place import find_place
from edgedistill.cli_options import (
    CacheOption,
    ExecutorOption,
    ExportsOption,
    JsonOption,
    OnlyOption,
    RayAddressOption,
    RecipePath,
    StudentOption,
)
from edgedistill.cli_options import (
    run_command as _run,
)
from edgedistill.errors import ExitCode
from edgedistill.init_command import init
from edgedistill.search.command import search
from edgedistill.student_commands import dequantize, record, write_text

if TYPE_CHECKING:
    from edgedistill.build import Options

app = typer.Typer(
    name="edgedistill",
    help="Turn a distilled student language model into files that run on devices, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

suite_app = typer.Typer(help="Make evaluation suites.", no_args_is_help=True)
app.add_typer(suite_app, name="suite")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def build(
    recipe: RecipePath,
    student: StudentOption = None,
    exports: ExportsOption = Path("exports"),
    cache: CacheOption = None,
    only: OnlyOption = None,
    rebench: Annotated[bool, typer.Option("--rebench", help="Measure speed again.")] = False,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build every artifact of a recipe, verify, judge and time it, and report."""

    def run() -> int:
        from edgedistill.build import build as build_recipe

        options = dataclasses.replace(
            _options(recipe, student, cache, only, exports=exports),
            rebench=rebench,
            executor=executor,
            ray_address=ray_address,
        )
        report, page = build_recipe(options)
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        else:
            from rich.console import Console

            from edgedistill.report.table import render_table

            Console().print(render_table(report, page))
        return report.exit_code

    _run(run)


@app.command()
def plan(
    recipe: RecipePath,
    student: StudentOption = None,
    cache: CacheOption = None,
    only: OnlyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a build would run, and about what it would cost; run nothing."""

    def run() -> int:
        from edgedistill.preview import describe, preview

        found = preview(_options(recipe, student, cache, only))
        typer.echo(found.model_dump_json(indent=2) if as_json else "\n".join(describe(found)))
        return ExitCode.OK

    _run(run)


@app.command()
def check(recipe: RecipePath, student: StudentOption = None) -> None:
    """Check a recipe and everything that it names; say all that is wrong at once."""

    def run() -> int:
        from edgedistill.low_bits import low_bit_warnings
        from edgedistill.recipe_load import load_recipe

        loaded = load_recipe(recipe, student)
        if loaded.facts is not None:
            for warning in low_bit_warnings(loaded.recipe, loaded.facts):
                typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"{recipe}: {loaded.recipe.name} is in order", err=True)
        return ExitCode.OK

    _run(run)


for command in (init, search, dequantize, record, write_text):
    app.command()(command)


@app.command()
def approve(
    artifact: Annotated[
        Path, typer.Argument(help="exports/RECIPE/RUNG/FORMAT", metavar="ARTIFACT")
    ],
    slice_name: Annotated[str, typer.Option("--slice", help="Where it failed.", metavar="SLICE")],
    because: Annotated[str, typer.Option(help="Why the loss is acceptable.", metavar="REASON")],
    by: Annotated[str, typer.Option(help="Who consents.", metavar="NAME")],
    until: Annotated[str, typer.Option(help="The last day, such as 2026-01-31.", metavar="DATE")],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Default: recipes/RECIPE.yaml.", metavar="RECIPE"),
    ] = None,
) -> None:
    """Consent to what an artifact lost on a slice, for a time, in a file beside the recipe."""

    def run() -> int:
        from edgedistill.evaluate.approve import approve as record
        from edgedistill.evaluate.waivers import describe_waiver, utc_today

        waiver, path = record(
            artifact,
            slice_name=slice_name,
            because=because,
            by=by,
            until=until,
            recipe=recipe,
            today=utc_today(),
        )
        typer.echo(describe_waiver(waiver), nl=False)
        typer.echo(f"added to {path}; commit it, and build again", err=True)
        return ExitCode.OK

    _run(run)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""

    def run() -> int:
        import json

        from edgedistill.recipe import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        return ExitCode.OK

    _run(run)


@app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(help="Artifacts, or files that others made.", metavar="PATH...")
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", help="The student that they should be.", metavar="STUDENT"),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write the matrix as one page.", metavar="HTML")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256)] = 2,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-check artifacts from their manifests, or hold any files against a student."""

    def run() -> int:
        from edgedistill.recheck import Verifier, show

        verifier = Verifier(find_place(cache), threads)
        return show(verifier.recheck(paths, against), page, as_json=as_json)

    _run(run)


@app.command()
def evaluate(
    artifact: Annotated[
        Path, typer.Argument(help="A GGUF, ONNX or Core ML model.", metavar="ARTIFACT")
    ],
    suite: Annotated[
        list[Path], typer.Option("--suite", help="Cases, JSON lines; may be repeated.")
    ],
    reference: Annotated[
        str, typer.Option("--reference", help="The student to compare with.", metavar="DIR")
    ],
    floor: Annotated[
        str | None,
        typer.Option("--floor", help="A recipe, or a floor as JSON.", metavar="RECIPE|JSON"),
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", help="Score so many cases.", metavar="N")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option("--context-tokens", help="Room for a case.", metavar="N")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256)] = 2,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a model file, whoever made it, with its reference on a suite."""

    def run() -> int:
        from edgedistill.evaluate.command import Request, evaluate_artifact

        root = find_place(cache)
        request = Request(
            artifact, tuple(suite), reference, root, floor, sample, context_tokens, threads
        )
        outcome = evaluate_artifact(request)
        if outcome.evaluation is not None and as_json:
            typer.echo(outcome.evaluation.model_dump_json(indent=2))
        elif outcome.evaluation is not None:
            from rich.console import Console

            from edgedistill.evaluate.table import render_evaluation

            width = None if sys.stdout.isatty() else 120  # a file has no width of its own
            Console(width=width).print(render_evaluation(outcome.evaluation, str(artifact)))
        return outcome.code

    _run(run)


@suite_app.command("from-logs")
def suite_from_logs(
    logs: Annotated[Path, typer.Argument(help="JSON lines, a request each.", metavar="LOGS")],
    out: Annotated[Path, typer.Option("--out", help="A new file.", metavar="DRAFT")],
    cases: Annotated[int, typer.Option("--cases", min=1, help="At most so many.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Of the sample.")] = 0,
    redact: Annotated[bool, typer.Option("--redact", help="Replace personal data.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draft a stratified suite from production logs, for a person to complete."""

    def run() -> int:
        from edgedistill.evaluate.draft import describe, draft_suite

        summary = draft_suite(logs, out, cases=cases, seed=seed, redact=redact)
        if as_json:
            typer.echo(summary.model_dump_json(indent=2))
        else:
            typer.echo("\n".join(describe(summary)), err=True)
        return ExitCode.OK

    _run(run)


def _options(
    recipe: Path,
    student: str | None,
    cache: str | None,
    only: list[str] | None,
    *,
    exports: Path = Path("exports"),
) -> Options:
    from edgedistill.build import Options

    return Options(
        recipe=recipe,
        cache=find_place(cache),
        exports=exports.absolute(),
        student=student,
        only=tuple(only or ()),
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Treat a request to end as Ctrl-C: children are ended, nothing is left half-written."""
    raise KeyboardInterrupt
