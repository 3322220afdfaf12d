"""The recipe: one YAML, typed, frozen, the only configuration of a build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.errors import EdgedistillError
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plugins import load_plugin, plugin_module, plugin_names
from edgedistill.stage import Stage

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# Names become directories and files.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


def _known_format(name: str) -> str:
    try:
        plugin_module("exporters", name)
    except EdgedistillError as error:
        raise _as_pydantic(error) from error
    return name


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


def _as_pydantic(error: EdgedistillError) -> PydanticCustomError:
    # Curly braces would be taken for fields of a template.
    return PydanticCustomError("edgedistill", "{text}", {"text": error.message, "hint": error.hint})


FormatName = Annotated[str, AfterValidator(_known_format)]

# The formats whose runtimes run a whole suite in minutes, in the order in which they are asked.
JUDGING_FORMATS = ("gguf", "onnx")


class Part(BaseModel):
    """Base of the recipe's parts: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageStep(Part):
    """One entry of a list of stages: ``- quantize_rtn: {bits: 4}``.

    Attributes:
        name: of the stage, its file in ``stages/``.
        config: the stage itself; a stage is its configuration.
    """

    name: str
    config: SerializeAsAny[Stage]

    @model_validator(mode="wrap")
    @classmethod
    def _from_mapping(cls, value: Any, _: Any) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict) or len(value) != 1:
            raise PydanticCustomError(
                "edgedistill",
                "{text}",
                {
                    "text": "a stage is a mapping with one key, its name",
                    "hint": "write it as `- quantize_rtn: {bits: 4}`",
                },
            )
        ((name, fields),) = value.items()
        try:
            stage = load_plugin("stages", str(name))
        except EdgedistillError as error:
            raise _as_pydantic(error) from error
        config = stage.model_validate({} if fields is None else fields)
        return cls.model_construct(name=str(name), config=config)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """One property for each stage that exists, of which one is given."""
        stages = {name: load_plugin("stages", name) for name in plugin_names("stages")}
        known = {name: handler(s.__pydantic_core_schema__) for name, s in stages.items()}
        return {
            "type": "object",
            "properties": known,
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }


class Budget(Part):
    """What an artifact may cost on its target; a clause that is not given is not held.

    Attributes:
        file_mb: all files that ship, in 10^6 bytes.
        peak_ram_mb: peak resident memory while it runs, in 10^6 bytes.
        ttft_user_p95_ms: prompt tokens -> text in to first visible text.
        ttft_model_p95_ms: prompt tokens -> token ids in to first token.
        decode_p50_tok_per_s: least rate of generation after the shortest prompt.
    """

    file_mb: Positive | None = None
    peak_ram_mb: Positive | None = None
    ttft_user_p95_ms: dict[Annotated[int, Field(ge=1)], Positive] = {}
    ttft_model_p95_ms: dict[Annotated[int, Field(ge=1)], Positive] = {}
    decode_p50_tok_per_s: Positive | None = None


class Target(Part):
    """Where an artifact runs: a format, a device, a budget; ``rungs`` of None means all.

    Attributes:
        kv_cache_bits: in which its runtime caches keys and values; None leaves it its default.
    """

    format: FormatName
    device: Literal["local"] = "local"
    budget: Budget = Budget()
    rungs: tuple[str, ...] | None = None
    kv_cache_bits: Literal[4, 8, 16] | None = None


class Expected(Part):
    """What `plan` takes for granted of a rung until one was measured.

    Attributes:
        flips: share of cases whose answer changes between right and wrong, either way.
        log_score_sd: standard deviation of a case's rise of the log-score, in nats.
        reference_score: share of cases that the reference gets right.
    """

    flips: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.06
    log_score_sd: Positive = 0.25
    reference_score: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.7


class EvaluateSettings(Part):
    """How the suite is run.

    Attributes:
        judge: the format that runs the whole suite, of rungs that are exported to it; GGUF unless
            said, else ONNX.
        sample: format -> cases of its paired sample, where another format of the rung judges.
        stop_early: score cases in a random order, and stop when the verdict is decided.
        expect: by which `plan` says what the suite can decide.
        traffic_sample: distinct prompts of the traffic that reference and artifact are run on.
    """

    judge: FormatName | None = None
    sample: dict[FormatName, Annotated[int, Field(ge=1)]] = {}
    stop_early: bool = False
    expect: Expected = Expected()
    traffic_sample: Annotated[int, Field(ge=1)] = 300

    def judging(self, formats: Sequence[str]) -> str | None:
        """Which of a rung's formats runs the whole suite; None where none is asked to."""
        asked = (self.judge, *JUDGING_FORMATS)
        return next((f for f in asked if f in formats), None)

    def sample_of(self, format_name: str) -> int:
        """Cases of the paired sample; Core ML is interpreted here, so its default is small."""
        return self.sample.get(format_name, 60 if format_name == "coreml" else 500)


class RouterSettings(Part):
    """When the app may trust the artifact: the share of right answers that those it keeps reach."""

    target_accuracy: Annotated[float, Field(gt=0.0, lt=1.0)]


class BuildSettings(Part):
    """What a build may take of this machine; threads decide sums, so they are part of the keys.

    Attributes:
        peak_ram_gb: in 10^9 bytes, that any step may hold beside mapped files; one that holds more
            is stopped.
    """

    threads: Annotated[int, Field(ge=1, le=256)] = 2
    peak_ram_gb: Positive | None = None

    @property
    def peak_ram_bytes(self) -> int | None:
        """``peak_ram_gb`` in bytes."""
        return None if self.peak_ram_gb is None else int(self.peak_ram_gb * 1e9)


class Recipe(Part):
    """A whole recipe; see ``recipes/`` for examples.

    Attributes:
        name: of the exports' directory.
        student: a directory, a .gguf file, ``pkg://package/file.gguf``, ``hf://org/name@REVISION``.
        context_tokens: what the artifacts claim.
        calibration: text for the stages that look at what the student computes with; a stage may
            state its own, and its own `chat`.
        stages: compression steps that all rungs share; adapters are merged here.
        rungs: name -> its own steps; an empty list is an unquantized rung.
        export: formats without a budget; or else ``targets``.
        suite: evaluation cases, JSON lines; without one nothing is judged.
        router: fits the confidence below which the app should ask elsewhere.
        teacher: recorded answers to the suite, JSON lines, shown beside the reference.
        previous: kept exports of the last release, whose answers are compared with.
        waivers: losses that somebody consented to; by default ``NAME.waivers.yaml`` beside the
            recipe's NAME.yaml.  The file need not exist.
        traffic: a log of unlabelled requests, searched for what no case measures.
        texts: name -> text file to verify on, beside the built-in texts.
    """

    name: Name
    license: str | None = None
    student: Annotated[str, Field(min_length=1)]
    context_tokens: Annotated[int, Field(ge=8)]
    chat: Chat = Chat()
    calibration: Calibration = Calibration()
    stages: tuple[StageStep, ...] = ()
    rungs: Annotated[dict[Name, tuple[StageStep, ...]], Field(min_length=1)]
    export: Annotated[tuple[FormatName, ...], Field(min_length=1)] | None = None
    targets: dict[Name, Target] = {}
    suite: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = ()
    traffic: Path | None = None
    floor: Floor | None = None
    slices: dict[str, SliceSpec] = {}
    router: RouterSettings | None = None
    teacher: Path | None = None
    previous: Path | None = None
    waivers: Path | None = None
    texts: dict[Name, Path] = {}
    evaluate: EvaluateSettings = EvaluateSettings()
    build: BuildSettings = BuildSettings()

    @model_validator(mode="after")
    def _one_kind_of_target(self) -> Self:
        if bool(self.targets) == bool(self.export):
            raise PydanticCustomError(
                "edgedistill",
                "{text}",
                {
                    "text": "give either `export` or `targets`",
                    "hint": "`export: [gguf, onnx]` names formats, `targets` adds budgets",
                },
            )
        return self

    def all_targets(self) -> dict[str, Target]:
        """Name -> target; with ``export`` each format is a target without a budget."""
        return dict(self.targets) or {f: Target(format=f) for f in self.export or ()}

    def formats_of(self, rung: str) -> tuple[str, ...]:
        """The formats that a rung is exported to, in the order of the targets."""
        chosen = (t for t in self.all_targets().values() if t.rungs is None or rung in t.rungs)
        return tuple(dict.fromkeys(t.format for t in chosen))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "edgedistill recipe",
        "oneOf": [{"required": ["export"]}, {"required": ["targets"]}],
    }
