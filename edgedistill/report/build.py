"""Write a build's report in its three forms: JSON for programs, Markdown, and the page."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pydantic import ValidationError

from edgedistill.errors import StageError
from edgedistill.report.markdown import render_markdown
from edgedistill.report.page import render_page
from edgedistill.results import BuildReport

JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"
PAGE_FILE = "report.html"


def write_reports(report: BuildReport, dst: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a directory.

    All three are rendered, and the JSON is read back, before any file is touched; each is written
    aside and renamed, so that a reader sees the old report or the new one.

    Raises:
        StageError: the JSON does not read back as the same report.
        OSError: the directory cannot be written.
    """
    rendered = {
        JSON_FILE: render_json(report),
        MARKDOWN_FILE: render_markdown(report),
        PAGE_FILE: render_page(report),
    }
    dst.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.items():
        _replace(dst / name, text)


def render_json(report: BuildReport) -> str:
    """The typed report as JSON, proven to read back as what it was.

    Raises:
        StageError: it does not.
    """
    text = report.model_dump_json(indent=2)
    try:
        again = BuildReport.model_validate_json(text).model_dump_json(indent=2)
    except ValidationError as error:
        raise StageError(f"{JSON_FILE} would not be a report: {error}") from error
    if again != text:
        raise StageError(f"{JSON_FILE} does not read back as the report that was written")
    return text + "\n"


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Lone surrogates, which a damaged prompt can hold, have no UTF-8.
        aside.write_bytes(text.encode("utf-8", errors="replace"))
        aside.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
