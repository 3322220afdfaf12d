"""The winning rung as a recipe: the user's own YAML, with the rung in place of its rungs.

What else stands in the file stays as it is, comments and all.  Edits are made in the text, at the
places that the YAML parser tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from edgedistill.disk import disk_error
from edgedistill.errors import StageError, UsageError
from edgedistill.recipe_yaml import compose
from edgedistill.search.ladder import StepData

HEADER_START = "# Found by `edgedistill search"
HEADER_LINE = "# "
# Words that mean the same with and without quotes.
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_NOT_WORDS = ("true", "false", "null")


class _Edit(NamedTuple):
    """Characters ``start`` to ``end`` of the text become ``text``."""

    start: int
    end: int
    text: str


def found_path(recipe: Path, out: Path | None, *, overwrite: bool) -> Path:
    """Where the found recipe goes, known to be free before any work.

    Raises:
        UsageError: the file exists and may not be replaced, or lies where the recipe's relative
            paths would mean other files.
    """
    path = out if out is not None else recipe.with_suffix(".found.yaml")
    if path.absolute().parent.resolve() != recipe.absolute().parent.resolve():
        raise UsageError(
            f"--out {path}: the paths in a recipe are relative to its directory",
            hint=f"write it beside the recipe, as {recipe.with_suffix('.found.yaml')}",
        )
    if path.exists() and not overwrite:
        raise UsageError(
            "exists already, and may hold somebody's work",
            where=str(path),
            hint="give --overwrite to replace it, or --out with another name",
        )
    return path


def with_rung(
    text: str, name: str, steps: Sequence[StepData], *, header: Sequence[str], waivers: str | None
) -> str:
    """The text of a recipe with this one rung.

    Args:
        text: of the recipe, which is in order.
        name: of the rung; ``steps`` as the YAML has them.
        header: lines of the comment that goes on top, in the place of an earlier search's.
        waivers: the value of a key that the recipe lacks; None adds none.
    """
    text = _without_header(text)
    root = compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise StageError("the recipe is no mapping")
    for edit in sorted(_edits(text, root, name, steps, waivers), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return "".join(f"{HEADER_LINE}{line}".rstrip() + "\n" for line in header) + "\n" + text


def write_found(path: Path, text: str, check: Callable[[Path], None]) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        text: its contents.
        check: is given a copy beside it, and raises where that will not do.

    Raises:
        StageError: the disk refuses.
        EdgedistillError: what ``check`` raises.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_text(text, encoding="utf-8")
        check(aside)
        aside.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def read_text(recipe: Path) -> str:
    """The text of a recipe that was read before.

    Raises:
        StageError: it cannot be read any more.
    """
    try:
        return recipe.read_text(encoding="utf-8")
    except OSError as error:
        raise disk_error(error, recipe) from error


def _edits(
    text: str, root: yaml.MappingNode, name: str, steps: Sequence[StepData], waivers: str | None
) -> Iterator[_Edit]:
    pairs = {key.value: (key, value) for key, value in root.value}
    rungs = _block(name, steps)
    if root.flow_style:
        rungs = f"rungs: {{{_scalar(name)}: {flow(list(steps))}}}"
    if waivers is not None:
        rungs = f"waivers: {flow(waivers)}" + (", " if root.flow_style else "\n") + rungs
    if "rungs" in pairs:
        key, value = pairs["rungs"]
        yield _Edit(key.start_mark.index, _end_of_line(text, root, _end(value)), rungs)
    elif root.flow_style:
        first = root.value[0][0].start_mark.index
        yield _Edit(first, first, f"{rungs}, ")
    else:
        # Before a key, not at the end, where a `...` may stand.
        key = next((pairs[k][0] for k in ("targets", "export") if k in pairs), root.value[0][0])
        yield _Edit(key.start_mark.index, key.start_mark.index, f"{rungs}\n\n")
    for _, target in pairs["targets"][1].value if "targets" in pairs else ():
        for key, value in target.value:
            if key.value == "rungs":
                yield _Edit(key.end_mark.index, _end(value), f": [{_scalar(name)}]")


def _block(name: str, steps: Sequence[StepData]) -> str:
    lines = ["rungs:", f"  {_scalar(name)}:" + ("" if steps else " []")]
    for step in steps:
        for stage, fields in step.items():
            lines.append(f"    - {stage}: {flow(fields)}")
    return "\n".join(lines)


def flow(value: Any) -> str:
    """Data on one line of YAML, as a recipe reads it back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _NOT_WORDS:
        return value
    text = json.dumps(value, ensure_ascii=False)
    # YAML wants these escaped, JSON does not.
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _end(node: yaml.Node) -> int:
    """Where a node's own characters end; the parser counts what follows a block to the block."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _end_of_line(text: str, root: yaml.MappingNode, end: int) -> int:
    """Behind a comment that stands beside what goes."""
    comment = None if root.flow_style else re.compile(r"[ \t]*(#[^\n]*)?(?=\n|\Z)").match(text, end)
    return comment.end() if comment else end


def _without_header(text: str) -> str:
    """The text without what an earlier search put on top."""
    if not text.startswith(HEADER_START):
        return text
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    blank = first < len(lines) and not lines[first].strip()
    return "".join(lines[first + blank :])
