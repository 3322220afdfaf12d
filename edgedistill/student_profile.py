"""What a model is, from its config, its headers and the files beside it: no tensor is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgedistill.decoder import DecoderFacts
from edgedistill.document import Document
from edgedistill.errors import InputError
from edgedistill.hub_config import HubConfig, fetch_hub_config, hub_name
from edgedistill.intake import read_facts, resolve_student
from edgedistill.student import GRIDS_FILE, Student, read_json

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
ADAPTER_FILE = "adapter_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"

Kind = Literal["directory", "gguf", "hub"]


class FoundAdapter(Document):
    """A peft adapter that lies in the student's directory or beside it.

    Attributes:
        path: of its directory.
        inside: whether that is in the student's own.
        problem: why it cannot be merged into this student; None where it can.
    """

    path: str
    inside: bool
    problem: str | None


class StudentProfile(Document):
    """What a model is.

    Attributes:
        source: as a recipe names it; of the hub with the commit that was looked at.
        name: that people call it.
        weights: the type of most of its weights, by bytes, as the file names it.
        quantized: whether that type is not a float.
        stored_bytes: of all its tensors as they come; None of the hub, where none were looked at.
        tokenizer: its class or kind; None where there is none.
        chat_template: whether it has one.
    """

    source: str
    kind: Kind
    name: str
    family: str
    parameters: int
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    max_context_tokens: int
    weights: str
    quantized: bool
    stored_bytes: int | None
    tokenizer: str | None
    chat_template: bool
    adapters: list[FoundAdapter]


@dataclass(frozen=True)
class SeenStudent:
    """A model that was looked at.

    Attributes:
        path: of its directory or file; None of the hub.
        facts: of its decoder.
        profile: for people.
        problem: why no recipe can start from it; None where one can.
        warnings: of what a build will stumble over, or what was lost before.
    """

    path: Path | None
    facts: DecoderFacts
    profile: StudentProfile
    problem: InputError | None = None
    warnings: tuple[str, ...] = field(default=())


def look_at_student(source: str, base: Path) -> SeenStudent:
    """Look at a model of any kind.

    Args:
        source: a directory, a .gguf file, ``pkg://package/file.gguf``, ``hf://org/name@REVISION``,
            or ``org/name`` where no such directory is.
        base: what a relative path is relative to.

    Raises:
        InputError: there is no such model, it is damaged, or of a family that is not known.
        UsageError: a source that is misspelt.
        UnavailableError: the hub cannot be reached.
    """
    name = hub_name(source, base)
    if name is not None:
        return _of_hub(fetch_hub_config(*name))
    path = resolve_student(source, base)
    seen = _of_directory(source, path) if path.is_dir() else _of_gguf(source, path)
    found = _adapters(path, seen.facts)
    profile = seen.profile.model_copy(update={"adapters": found})
    return SeenStudent(path, seen.facts, profile, seen.problem, seen.warnings)


def _of_directory(source: str, path: Path) -> SeenStudent:
    quantized = (path / GRIDS_FILE).is_file()
    facts = Student(path).facts if quantized else read_facts(path)
    student = Student(path)
    sizes: Counter[str] = Counter()
    for name in student.names():
        parts = [name]
        if name in student.grids:
            grid = student.grids[name]
            parts = [f"{name}.codes", f"{name}.scales"]
            parts += [f"{name}.zeros"] if grid.zero == "integer" else []
        kind = str(student.grids[name]) if name in student.grids else student.stored(name).dtype
        sizes[kind] += sum(student.stored(part).size_bytes for part in parts)
    tokenizer, template = _tokenizer(path)
    profile = _profile(
        facts,
        source=source,
        kind="directory",
        name=path.resolve().name,
        weights=_most(sizes),
        quantized=quantized,
        stored_bytes=sizes.total(),
        tokenizer=tokenizer,
        chat_template=template,
    )
    problem, warnings = None, []
    if quantized:
        problem = InputError(
            "the student is quantized already, and compressing starts from a float one",
            where=str(path),
            hint="start from what it was made of, or from a copy by `edgedistill dequantize`",
        )
    if tokenizer is None:
        warnings.append("there is no tokenizer.json: a build ends at it")
    return SeenStudent(path, facts, profile, problem, tuple(warnings))


def _of_gguf(source: str, path: Path) -> SeenStudent:
    from edgedistill.gguf_file import GgufFile

    facts, file = read_facts(path), GgufFile(path)
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[_type_name(tensor.type_id)] += tensor.size_bytes
    weights = _most(sizes)
    kinds = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    profile = _profile(
        facts,
        source=source,
        kind="gguf",
        name=path.stem,
        weights=weights,
        quantized=weights not in FLOAT_TYPES,
        stored_bytes=sizes.total(),
        tokenizer=" ".join(kind for kind in kinds if isinstance(kind, str)) or None,
        chat_template=isinstance(file.metadata.get("tokenizer.chat_template"), str),
    )
    warnings = []
    if profile.quantized:
        warnings.append(
            f"its weights are {weights}: what that lost is lost, and what is built from it is "
            "compared with it, not with the model that it was made of"
        )
    return SeenStudent(path, facts, profile, warnings=tuple(warnings))


def _of_hub(found: HubConfig) -> SeenStudent:
    facts = DecoderFacts.from_config(found.config, where=f"{found.source}: config.json")
    stated = found.config.get("dtype") or found.config.get("torch_dtype")
    profile = _profile(
        facts,
        source=found.source,
        kind="hub",
        name=found.name,
        weights=str(stated or "not stated"),
        quantized=False,  # one that is, from_config refuses
        stored_bytes=None,
        tokenizer=found.tokenizer,
        chat_template=found.chat_template,
    )
    warnings = (
        () if found.tokenizer else ("there is no tokenizer_config.json: is there a tokenizer?",)
    )
    return SeenStudent(None, facts, profile, warnings=warnings)


def _profile(facts: DecoderFacts, **stated: Any) -> StudentProfile:
    own = StudentProfile.model_fields.keys() - stated.keys() - {"adapters"}
    return StudentProfile(**{name: getattr(facts, name) for name in own}, **stated, adapters=[])


def _most(sizes: Counter[str]) -> str:
    return sizes.most_common(1)[0][0]


def _type_name(type_id: int) -> str:
    from edgedistill.gguf_blocks import Q2_0
    from edgedistill.gguf_file import gguf_package

    if type_id == Q2_0.type_id:
        return Q2_0.name
    return str(gguf_package().GGMLQuantizationType(type_id).name)


def _tokenizer(path: Path) -> tuple[str | None, bool]:
    """The tokenizer's class, and whether there is a chat template; its lists are not read."""
    config: dict[str, Any] = {}
    if (path / TOKENIZER_CONFIG).is_file():
        config = read_json(path / TOKENIZER_CONFIG)
    template = (path / TEMPLATE_FILE).is_file() or bool(config.get("chat_template"))
    if not (path / "tokenizer.json").is_file():
        return None, template
    return str(config.get("tokenizer_class") or "tokenizer.json"), template


def _adapters(path: Path, facts: DecoderFacts) -> list[FoundAdapter]:
    """Adapters in the student's directory and in those beside it, one level deep."""
    from edgedistill.stages.merge_lora import Adapter

    home = path if path.is_dir() else path.parent
    places = [home, *_directories(home)]
    if path.is_dir():
        places += [place for place in _directories(home.absolute().parent) if place != home]
    found = []
    for place in dict.fromkeys(places):
        if not (place / ADAPTER_FILE).is_file():
            continue
        problem = None
        try:
            Adapter(place).check(facts.tensor_shapes())
        except InputError as error:
            problem = error.message
        inside = path.is_dir() and place.absolute().is_relative_to(home.absolute())
        found.append(FoundAdapter(path=str(place), inside=inside, problem=problem))
    return found


def _directories(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:  # one that may not be listed has no adapters for us
        return []
