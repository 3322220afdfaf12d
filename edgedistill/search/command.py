"""The command ``edgedistill search``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgedistill.cache_place import find_place
from edgedistill.cli_options import (
    CacheOption,
    JsonOption,
    RecipePath,
    StudentOption,
    run_command,
)


def search(
    recipe: RecipePath,
    student: StudentOption = None,
    cache: CacheOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Default: NAME.found.yaml beside the recipe.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            "--budget-minutes", min=0.0, help="Then start no more candidates.", metavar="N"
        ),
    ] = None,
    try_all: Annotated[
        bool, typer.Option("--all", help="Try what nothing is expected of, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be tried.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the smallest rung that passes a recipe's floor and budgets; write it as a recipe."""

    def run() -> int:
        from edgedistill.search.climb import Limits
        from edgedistill.search.run import SearchOptions, plan_search, search_recipe

        seconds = None if budget_minutes is None else 60 * budget_minutes
        options = SearchOptions(
            recipe=recipe,
            cache=find_place(cache),
            student=student,
            out=out,
            overwrite=overwrite,
            limits=Limits(try_all, seconds),
        )
        report = plan_search(options) if dry_run else search_recipe(options)
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        else:
            from rich.console import Console

            from edgedistill.search.table import render_search

            width = None if sys.stdout.isatty() else 120  # a file has no width of its own
            Console(width=width).print(render_search(report))
        return report.exit_code

    run_command(run)
