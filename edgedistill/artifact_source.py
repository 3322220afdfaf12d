"""An artifact by its path: its format, its files, and what its manifest says if it is ours."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedistill.chat import Chat
from edgedistill.content import files_below
from edgedistill.errors import InputError
from edgedistill.onnx_package import follows_our_convention, graph_file
from edgedistill.plugins import load_plugin

MANIFEST_FILE = "manifest.json"
# What describes an artifact of ours is no part of what runs.
DESCRIPTIONS = (MANIFEST_FILE, "README.md")
# What a Core ML package needs beside it for text to become tokens.
BESIDE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
GGUF_FILE, ONNX_FILE, PACKAGE = "model.gguf", "model.onnx", "model.mlpackage"


class Claims(BaseModel):
    """What a manifest of ours says that an evaluation has to know.

    Attributes:
        chat: the fixed part of every conversation with the model.
        context_tokens: for which it was made.
        kv_cache_bits: in which it was measured to cache keys and values.
        recipe: that it was made by; ``rung`` the name of its rung there.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    chat: Chat = Chat()
    context_tokens: int | None = Field(default=None, ge=1)
    kv_cache_bits: int | None = None
    recipe: str | None = None
    rung: str | None = None


@dataclass(frozen=True)
class ArtifactSource:
    """An artifact that lies somewhere.

    Attributes:
        path: that somebody named.
        format: ``gguf``, ``onnx`` or ``coreml``.
        files: its place in an artifact's directory, as runtimes expect it -> the file.
        claims: of its manifest, if it has one.
    """

    path: Path
    format: str
    files: dict[str, Path]
    claims: Claims

    def link(self, dst: Path) -> None:
        """Link the files into the directory ``dst``; nobody may write to them there."""
        for name, file in self.files.items():
            link = dst / name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), link)
            except OSError:  # another file system, or one without hard links
                link.symlink_to(file.resolve())


def find_artifact(path: Path) -> ArtifactSource:
    """Tell an artifact's format by what lies at its path.

    Args:
        path: a GGUF file, an .mlpackage, or a directory that holds one of them or an ONNX graph.

    Raises:
        InputError: there is nothing, nothing that is known, or more than one.
    """
    if not path.exists():
        raise InputError("there is no such file or directory", where=str(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return ArtifactSource(path, "gguf", {GGUF_FILE: path}, Claims())
        if path.suffix != ".onnx":
            raise _unknown(path)
        path = path.parent
    if path.suffix == ".mlpackage":
        files = {f"{PACKAGE}/{f.relative_to(path).as_posix()}": f for f in files_below(path)}
        files |= {n: path.parent / n for n in BESIDE if (path.parent / n).is_file()}
        return ArtifactSource(path, "coreml", files, _read_claims(path.parent))
    return _in_directory(path)


def find_runtime(artifact: ArtifactSource) -> str:
    """The name of the runtime that opens an artifact: its format's, or that of others' graphs.

    Raises:
        InputError: the graph cannot be read.
        UnavailableError: the library that reads it is not installed.
    """
    if artifact.format == "onnx":
        directory = artifact.path if artifact.path.is_dir() else artifact.path.parent
        if not follows_our_convention(graph_file(directory)):
            return "other_onnx"
    return load_plugin("exporters", artifact.format).runtime


def _in_directory(path: Path) -> ArtifactSource:
    weights = sorted(path.glob("*.gguf"))
    packages = sorted(path.glob("*.mlpackage"))
    graphs = sorted(path.glob("*.onnx"))
    kinds = [name for name, found in _named(weights, graphs, packages) if found]
    if len(kinds) != 1 or len(weights) > 1 or len(packages) > 1:
        raise _unknown(path)
    claims = _read_claims(path)
    if weights:
        return ArtifactSource(path, "gguf", {GGUF_FILE: weights[0]}, claims)
    files = {f.relative_to(path).as_posix(): f for f in files_below(path)}
    files = {name: f for name, f in files.items() if name not in DESCRIPTIONS}
    if packages and packages[0].name != PACKAGE:
        old = f"{packages[0].name}/"
        files = {
            f"{PACKAGE}/{n.removeprefix(old)}" if n.startswith(old) else n: f
            for n, f in files.items()
        }
    return ArtifactSource(path, kinds[0], files, claims)


def _named(
    weights: list[Path], graphs: list[Path], packages: list[Path]
) -> tuple[tuple[str, list[Path]], ...]:
    return ("gguf", weights), ("onnx", graphs), ("coreml", packages)


def _unknown(path: Path) -> InputError:
    return InputError(
        "is not one artifact of a format that is known here",
        where=str(path),
        hint="name a .gguf file, an .mlpackage, or the directory of one or of an ONNX graph",
    )


def _read_claims(directory: Path) -> Claims:
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return Claims()
    try:
        return Claims.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            f"is not a manifest of an artifact ({type(error).__name__})",
            where=str(path),
            hint="without this file the artifact is evaluated as one that others made",
        ) from error
