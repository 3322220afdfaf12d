"""One page: check x artifact, green or red, with the number and the offending example."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

import edgedistill
from edgedistill.disk import disk_error
from edgedistill.report import words
from edgedistill.results import Check, Verification

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Column:
    """One artifact of the matrix.

    Attributes:
        name: such as ``int4/gguf`` or a file's name.
        about: what it was held against.
        note: what could not be checked.
    """

    name: str
    about: str
    verification: Verification
    note: str | None = None

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.verification.checks if not check.passed]

    def find(self, name: str) -> Check | None:
        """The check of that name."""
        return next((c for c in self.verification.checks if c.name == name), None)


def render_matrix(columns: Sequence[Column], title: str) -> str:
    """A self-contained HTML document; every text is escaped, control characters are shown."""
    return _template().render(
        title=title,
        columns=columns,
        groups=_groups(columns),
        version=edgedistill.__version__,
        passed=sum(not column.failed for column in columns),
    )


def write_matrix(columns: Sequence[Column], title: str, path: Path) -> None:
    """Write the page aside and rename it into place.

    Raises:
        StageError: the disk is full or not writable.
    """
    # Lone surrogates, which a damaged file can hold, have no UTF-8.
    data = render_matrix(columns, title).encode("utf-8", errors="replace")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def _groups(columns: Sequence[Column]) -> dict[str, list[str]]:
    """Group -> names of its checks, in the order of their appearance; failures do not move."""
    found: dict[str, dict[str, None]] = {}
    for column in columns:
        for check in column.verification.checks:
            found.setdefault(check.name.partition(":")[0], {})[check.name] = None
    return {group: list(names) for group, names in found.items()}


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["number"] = words.number
    environment.filters["check_limit"] = words.check_limit
    source = resources.files("edgedistill.verify").joinpath("matrix.html").read_text("utf-8")
    return environment.from_string(source)


def _finalize(value: Any) -> Any:
    """What every expression of the template passes through."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return words.visible(value)
    return value
