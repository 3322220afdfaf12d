"""Plug-ins by file name: ``stages/<name>.py`` holds the stage that a recipe calls ``<name>``.

The folder is the registry.  Names are read from the sources, so that listing them imports nothing.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from edgedistill.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from edgedistill.exporter import Exporter
    from edgedistill.session import Runtime
    from edgedistill.stage import Stage

Kind = Literal["stages", "exporters", "runtimes"]

# What a kind is called in a message, and the class that its plug-ins derive from.
_SINGULAR: dict[Kind, str] = {"stages": "stage", "exporters": "format", "runtimes": "runtime"}
_BASES: dict[Kind, str] = {"stages": "Stage", "exporters": "Exporter", "runtimes": "Runtime"}
_PACKAGE = Path(__file__).parent


@cache
def plugin_names(kind: Kind) -> tuple[str, ...]:
    """The names of all plug-ins of a kind, sorted; a module without such a class is not one."""
    modules = sorted(p for p in (_PACKAGE / kind).glob("*.py") if not p.name.startswith("_"))
    return tuple(path.stem for path in modules if _defines(path, _BASES[kind]))


def plugin_module(kind: Kind, name: str) -> str:
    """The dotted module of a plug-in.

    Raises:
        UsageError: there is none of that name.
    """
    names = plugin_names(kind)
    if name not in names:
        raise UsageError(
            f"there is no {_SINGULAR[kind]} {name!r}", hint=did_you_mean(name, names, "known")
        )
    return f"edgedistill.{kind}.{name}"


@overload
def load_plugin(kind: Literal["stages"], name: str) -> type[Stage]: ...
@overload
def load_plugin(kind: Literal["exporters"], name: str) -> type[Exporter]: ...
@overload
def load_plugin(kind: Literal["runtimes"], name: str) -> type[Runtime]: ...
def load_plugin(kind: Kind, name: str) -> type[Any]:
    """The one class of ``edgedistill/<kind>/<name>.py``.

    Raises:
        UsageError: there is no such plug-in; the hint names near ones.
        UnavailableError: a library that it needs is not installed.
    """
    module_name = plugin_module(kind, name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the {_SINGULAR[kind]} {name} needs the library {error.name}, which is not installed",
            hint=f"pip install 'edgedistill[{name}]' or 'edgedistill[all]'",
        ) from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module_name
        and not inspect.isabstract(value)
        and _BASES[kind] in (base.__name__ for base in value.__mro__[1:])
    ]
    if len(found) != 1:
        raise UsageError(
            f"{module_name} holds {len(found)} {_SINGULAR[kind]}s; a plug-in's file holds one"
        )
    return found[0]


def load_runtime(name: str, kv_cache_bits: int | None = None) -> Runtime:
    """A runtime as an artifact ships: every session on one is opened through this.

    Args:
        name: its file name in ``runtimes/``.
        kv_cache_bits: in which it caches keys and values; None leaves it its own default.

    Raises:
        UsageError: there is no such runtime, or it has no such cache.
        UnavailableError: a library that it needs is not installed.
    """
    runtime = load_plugin("runtimes", name)()
    return runtime if kv_cache_bits is None else runtime.with_kv_cache_bits(kv_cache_bits)


def did_you_mean(name: str, known: Sequence[str], otherwise: str) -> str:
    """A hint: the nearest known name, or all of them after the word ``otherwise``."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(known)}"


def _defines(path: Path, base: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return any(isinstance(b, ast.Name) and b.id == base for c in classes for b in c.bases)
