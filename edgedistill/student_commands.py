"""Commands that write a file from a student: its weights as float32, answers, text of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgedistill.cli_options import run_command
from edgedistill.errors import ExitCode


def dequantize(
    source: Annotated[Path, typer.Argument(help="A student directory.", metavar="SRC")],
    destination: Annotated[Path, typer.Argument(help="A new directory.", metavar="DST")],
) -> None:
    """Write a float32 copy of a quantized student, which opens in transformers."""

    def run() -> int:
        from edgedistill.intake import dequantize as dequantize_student

        dequantize_student(source, destination)
        return ExitCode.OK

    run_command(run)


def record(
    teacher: Annotated[Path, typer.Argument(help="A student directory.", metavar="TEACHER")],
    data: Annotated[Path, typer.Argument(help="Conversations, JSON lines.", metavar="DATA")],
    out: Annotated[Path, typer.Option("--out", help="A new file.", metavar="JSONL")],
    system: Annotated[str | None, typer.Option(help="As the recipe's chat.system.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens to record.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    lines: Annotated[int | None, typer.Option(min=1, help="Ask only the first.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256)] = 2,
) -> None:
    """Record a teacher's answers, for `heal` to learn from."""

    def run() -> int:
        from edgedistill.chat import Chat
        from edgedistill.record_answers import RecordSettings, record_answers

        settings = RecordSettings(Chat(system=system), top_k, max_tokens, lines, threads)
        count = record_answers(teacher, data, out, settings)
        typer.echo(f"{count} answers in {out}", err=True)
        return ExitCode.OK

    run_command(run)


def write_text(
    student: Annotated[Path, typer.Argument(help="A student directory.", metavar="STUDENT")],
    out: Annotated[Path, typer.Option("--out", help="A new file.", metavar="JSONL")],
    system: Annotated[str | None, typer.Option(help="As the recipe's chat.system.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How much, at least.")] = 32768,
    sequence_tokens: Annotated[int, typer.Option(min=16, help="Of one sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256)] = 2,
) -> None:
    """Let a student write text by itself, to calibrate it on (`own_text`)."""

    def run() -> int:
        from edgedistill.chat import Chat
        from edgedistill.write_text import WritingSettings, write_own_text

        settings = WritingSettings(Chat(system=system), tokens, sequence_tokens, seed, threads)
        count = write_own_text(student, out, settings)
        typer.echo(f"{count} sequences in {out}", err=True)
        return ExitCode.OK

    run_command(run)
