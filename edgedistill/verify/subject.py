"""What a path is that somebody wants verified: which format, and where its files are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import InputError
from edgedistill.onnx_package import CONFIG_FILE

PACKAGE = "model.mlpackage"


@dataclass(frozen=True)
class Subject:
    """A file or directory to be verified.

    Attributes:
        path: a .gguf file, a directory, or an .mlpackage.
        format: ``gguf``, ``onnx`` or ``coreml``.
    """

    path: Path
    format: str


def find_subject(path: Path) -> Subject:
    """Tell the format of a path by what lies there.

    Raises:
        InputError: there is nothing, or nothing that is known.
    """
    if not path.exists():
        raise InputError("there is no such file or directory", where=str(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return Subject(path, "gguf")
        if path.suffix == ".onnx":
            return Subject(path.parent, "onnx")
    elif path.suffix == ".mlpackage":
        # A package of ours has its tokenizer beside it.
        return Subject(path.parent if path.name == PACKAGE else path, "coreml")
    elif (path / PACKAGE).is_dir():
        return Subject(path, "coreml")
    elif (path / CONFIG_FILE).is_file() or any(path.glob("*.onnx")):
        return Subject(path, "onnx")
    elif any(path.glob("*.gguf")):
        return Subject(path, "gguf")
    raise InputError(
        "is of no format that is known here",
        where=str(path),
        hint="a .gguf file, a directory with an ONNX graph, or an .mlpackage",
    )


@contextmanager
def as_artifact(subject: Subject) -> Iterator[Path]:
    """The subject as runtimes want it: a package of another name gets a directory around it."""
    if subject.format != "coreml" or subject.path.suffix != ".mlpackage":
        yield subject.path
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / PACKAGE).symlink_to(subject.path.resolve())
        yield Path(scratch)
