"""YAML as a recipe needs it: safe, every value with its line, duplicate keys refused.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), so
``no``, ``on`` and ``12:30`` are strings.  Anchors, aliases and tags are refused: a recipe says
each thing where it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgedistill.errors import UsageError

Key = str | int
Place = tuple[Key, ...]

# Longer ones count as floating-point numbers.
LONGEST_INTEGER = 40
MOST_LEVELS = 64

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Finding:
    """A mistake: its place in the YAML, what is wrong, how to mend it."""

    place: Place
    message: str
    hint: str | None = None


@dataclass
class YamlDocument:
    """The contents of a file.

    Attributes:
        path: of the file.
        data: plain dicts, lists, strings, numbers.
        lines: place -> line number, counted from 1; a key's own line for a value in a mapping.
        problems: everything that was wrong with the YAML itself.
    """

    path: Path
    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[UsageError] = field(default_factory=list)

    def where(self, place: Place) -> str:
        """``file:line`` of a place, or of the nearest place around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


def read_yaml(path: Path) -> YamlDocument:
    """Read a file; what is wrong with it is found in ``problems``."""
    document = YamlDocument(path)
    try:
        root = compose(path.read_text(encoding="utf-8"))
    except OSError as error:
        document.problems.append(UsageError(f"cannot be read: {error.strerror}", where=str(path)))
    except UnicodeDecodeError:
        document.problems.append(UsageError("is not UTF-8 text", where=str(path)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        document.problems.append(UsageError(f"is not YAML: {error.problem}", where=where))
    except yaml.YAMLError as error:
        document.problems.append(UsageError(f"is not YAML: {error}", where=str(path)))
    else:
        _Reader(document).read(root)
    return document


def compose(text: str) -> yaml.Node | None:
    """The nodes of a text, which know where they stand in it.

    Raises:
        yaml.YAMLError: it is not YAML, or has what a recipe has not.
    """
    return yaml.compose(text, Loader=_Loader)


def dotted(place: Place) -> str:
    """A place as people write it: ``rungs.int4[0].quantize_rtn.bits``."""
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) and text else f".{key}" if text else str(key)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; an alias, a tag or a bottomless nesting is refused where it stands."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for part, example in (("anchor", "&name, *name"), ("tag", "!name")):
            if getattr(event, part, None) is not None:
                raise yaml.MarkedYAMLError(
                    problem=f"a recipe has no {part}s ({example})", problem_mark=event.start_mark
                )
        if self._level == MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_LEVELS} levels inside each other",
                problem_mark=event.start_mark,
            )
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Reader:
    def __init__(self, document: YamlDocument) -> None:
        self._document = document

    def read(self, root: yaml.Node | None) -> None:
        self._document.data = None if root is None else self._value(root, ())

    def _value(self, node: yaml.Node, place: Place) -> Any:
        self._document.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, i)) for i, item in enumerate(node.value)]
        return self._mapping(node, place)

    def _mapping(self, node: yaml.Node, place: Place) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "a key is a list or a mapping, not a word")
                continue
            key = self._scalar(key_node, place)
            inner = (*place, key)
            if key in result:
                first = self._document.lines[inner]
                self._problem(
                    key_node,
                    f"{dotted(inner)}: the key is given twice, first in line {first}",
                    hint="remove one of them",
                )
                continue
            self._document.lines[inner] = key_node.start_mark.line + 1
            result[key] = self._value(value_node, inner)
        return result

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text: str = node.value
        if node.style is not None:
            return text
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text) and len(text) <= LONGEST_INTEGER:
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _problem(self, node: yaml.Node, message: str, hint: str | None = None) -> None:
        where = f"{self._document.path}:{node.start_mark.line + 1}"
        self._document.problems.append(UsageError(message, where=where, hint=hint))
