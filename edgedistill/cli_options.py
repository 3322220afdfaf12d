"""What the commands share: options, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgedistill.errors import EdgedistillError, ExitCode, RecipeError

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
StudentOption = Annotated[
    str | None, typer.Option("--student", help="Start from this student instead.", metavar="DIR")
]
ExportsOption = Annotated[
    Path, typer.Option("--exports", help="Where artifacts and report go.", metavar="DIR")
]
CacheOption = Annotated[
    str | None,
    typer.Option("--cache", help="Default: $XDG_CACHE_HOME/edgedistill.", metavar="DIR|URL"),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", help="Only this part; may be repeated.", metavar="RUNG[/FORMAT]"),
]
ExecutorOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", help="What runs the steps: this machine, or a Ray cluster."),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="Default: $RAY_ADDRESS, or this machine.", metavar="HOST:PORT"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def run_command(command: Callable[[], int]) -> None:
    """Carry out a command; errors become one message on stderr and an exit code."""
    try:
        code = command()
    except RecipeError as error:
        _say(f"error: {error.message}")
        code = error.exit_code
    except EdgedistillError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:  # a name that is too long, a place that may not be looked at
        from edgedistill.disk import disk_error

        refused = disk_error(error, Path.cwd())
        _say(f"error: {refused}")
        code = refused.exit_code
    except KeyboardInterrupt:
        _say("interrupted; finished steps are kept, the same command goes on from there")
        code = ExitCode.INTERRUPTED
    raise typer.Exit(int(code))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
