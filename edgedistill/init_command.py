"""The command ``edgedistill init``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedistill.cli_options import JsonOption, run_command
from edgedistill.errors import EdgedistillError, ExitCode, UsageError

if TYPE_CHECKING:
    from edgedistill.init_report import Examined, InitReport


def init(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory, a .gguf, pkg://package/file.gguf, hf://org/name@REVISION.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Default: recipes/NAME.yaml.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Where it is to run; may be repeated.", metavar="NAME"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens; default: 4096, or the model's.", metavar="N"),
    ] = None,
    suite: Annotated[
        list[Path] | None,
        typer.Option("--suite", help="Cases, JSON lines; may be repeated.", metavar="FILE"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Text of the app, to calibrate on.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model is and what of it fits where; write a recipe to begin with."""

    def run() -> int:
        from edgedistill.init_report import examine

        if out is not None:
            _refuse_taken(out, force)
        examined = examine(model, device or (), context)
        try:
            path = _write(examined, out, force, bool(device), calibration, suite or [])
        except EdgedistillError:
            _print(examined.report, as_json)
            raise
        _print(examined.report.model_copy(update={"recipe": str(path)}), as_json)
        typer.echo(f"wrote {path}; next: edgedistill plan {path}", err=True)
        return ExitCode.OK

    run_command(run)


def _write(
    examined: Examined,
    out: Path | None,
    force: bool,
    asked_devices: bool,
    text: Path | None,
    suites: list[Path],
) -> Path:
    """Write the recipe, whole and in order, or not at all; returns its path."""
    from edgedistill.init_choice import choose
    from edgedistill.init_recipe import RecipeText, recipe_name
    from edgedistill.recipe_load import load_recipe
    from edgedistill.search.found_recipe import write_found

    if examined.student.problem is not None:
        raise examined.student.problem
    choice = choose(examined, asked_devices=asked_devices, text=text, suites=suites)
    name = recipe_name(out.stem if out is not None else examined.report.student.name)
    path = out if out is not None else Path("recipes") / f"{name}.yaml"
    _refuse_taken(path, force)

    def check(aside: Path) -> None:
        load_recipe(aside)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_found(path, RecipeText(examined, choice, name, path).write(), check)
    return path


def _refuse_taken(path: Path, force: bool) -> None:
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(
            "exists already, and may hold somebody's work",
            where=str(path),
            hint="give --force to replace it, or --out with another name",
        )


def _print(report: InitReport, as_json: bool) -> None:
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    from rich.console import Console

    from edgedistill.init_table import render_init

    width = None if sys.stdout.isatty() else 120  # a file has no width of its own
    Console(width=width).print(render_init(report))
