"""The version of a piece of code: a hash of what it says and of all that it imports.

Only what a program does counts: comments, docstrings and layout are left out, so that a better
sentence never repeats an hour of work.  Nothing is imported; sources are parsed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgedistill.content import sha256_file, sha256_json

_ROOT = Path(__file__).parents[1]
_MODULE_NAME = re.compile(rf"{__package__}(\.[a-z0-9_]+)+")
_SOURCE_SUFFIXES = (".py", ".pyc", ".pyi")


@dataclass(frozen=True)
class CodeVersion:
    """What decides how a step computes.

    Attributes:
        sha256: of sources, data files and library versions together.
        libraries: distribution or module name -> version, of the third-party code that is imported.
    """

    sha256: str
    libraries: dict[str, str]


@cache
def code_version(modules: tuple[str, ...], body: tuple[str, str] | None = None) -> CodeVersion:
    """The version of some modules, and of all of the project's modules that they import.

    Args:
        modules: dotted names below the project's root.
        body: (module, class) of a class whose own code and imports count too, without the rest of
            its module.  Modules of its top-level package are the project's as well.
    """
    waiting = list(modules)
    own = {__package__}
    sources: dict[str, str] = {}
    libraries: set[str] = set()
    if body is not None:
        own.add(body[0].partition(".")[0])
        tree = _class_body(*body)
        sources["<body>"] = _dump(tree)
        waiting += _imports(tree, package="")
    while waiting:
        name = waiting.pop()
        path = _module_file(name) if name.partition(".")[0] in own else None
        if path is None:
            libraries.add(name.partition(".")[0])
        elif name not in sources:
            sources[name], imports = _module(path, name)
            sources |= _data_files(path.parent)
            waiting += [*imports, *_parents(name)]
    versions = {n: v for n in sorted(libraries) if (v := _library_version(n))}
    python = ".".join(map(str, sys.version_info[:2]))
    return CodeVersion(sha256_json([sources, versions, python]), versions)


def _class_body(module: str, name: str) -> ast.ClassDef:
    path = _module_file(module)
    nodes = ast.parse(path.read_text(encoding="utf-8")).body if path else []
    return next(n for n in nodes if isinstance(n, ast.ClassDef) and n.name == name)


@cache
def _module(path: Path, name: str) -> tuple[str, tuple[str, ...]]:
    """The hash of a module's own code, and what it imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return _dump(tree), tuple(_imports(tree, package))


def _dump(tree: ast.AST) -> str:
    """A hash of what the tree does: docstrings are dropped, positions are not in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = node.body[1:]
    return sha256_json(ast.dump(tree))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all modules that are imported anywhere in the tree, inside functions too.

    A string that is the name of a module counts: that is how ``importlib.resources`` finds data.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            yield module
            children = (f"{module}.{alias.name}" for alias in node.names)
            yield from (child for child in children if _module_file(child))
        elif isinstance(node, ast.Constant) and _MODULE_NAME.fullmatch(str(node.value)):
            yield from filter(_module_file, [str(node.value)])


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


@cache
def _module_file(name: str) -> Path | None:
    """The source of one of the project's modules; None for anybody else's."""
    base = _ROOT.joinpath(*name.split("."))
    if not name or not (_ROOT / name.partition(".")[0] / "__init__.py").is_file():
        return None
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def _data_files(directory: Path) -> dict[str, str]:
    """Name -> hash of the data that lies beside modules: templates, texts."""
    data = (p for p in directory.iterdir() if p.suffix not in _SOURCE_SUFFIXES and p.name[0] != ".")
    return {p.relative_to(_ROOT).as_posix(): sha256_file(p) for p in data if p.is_file()}


@cache
def _library_version(module: str) -> str | None:
    """The version of the distribution that provides a module; None for the standard library."""
    if module in sys.stdlib_module_names or module == "__future__":
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        names = _packages().get(module)
        return importlib.metadata.version(names[0]) if names else "not installed"


@cache
def _packages() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
