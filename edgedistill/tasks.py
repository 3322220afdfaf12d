"""The steps of a build, as tasks: each calls one function of the module that knows how.

Inputs by name: ``student`` a student directory, ``artifact`` the output of :class:`Export`,
``weights_judge``, ``reference_judge`` and ``base_judge`` outputs of :class:`JudgeLogits`,
``reference_scores`` and ``artifact_scores`` outputs of a scoring task,
``reference_traffic`` the output of :class:`ReadTraffic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.beside import Beside
from edgedistill.chat import Chat
from edgedistill.content import ContentHashes, plain
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plugins import Kind
from edgedistill.results import Document
from edgedistill.stage import Stage
from edgedistill.task import WORK, Task

ARTIFACT = "artifact"
WEIGHTS_FILE = "weights.json"
VERIFICATION_FILE = "verification.json"
EVALUATION_FILE = "evaluation.json"
BENCH_FILE = "bench.json"


class Weights(Document):
    """What an artifact's weights take: bytes of weight data, and parameters of its rung."""

    weight_bytes: int
    parameters: int


class TakeIn(Task):
    """Bring the student into the Hugging Face layout."""

    source: Path

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Writes a student directory."""
        from edgedistill.intake import take_in

        take_in(self.source, dst)

    def fingerprint(self, hashes: ContentHashes) -> dict[str, Any]:
        """Only the files that make the student count, of all that may lie beside them."""
        from edgedistill.intake import student_files

        root = self.source if self.source.is_dir() else self.source.parent
        files = student_files(self.source)
        # The name of a single file says nothing of the student.
        content = hashes.of_files(root, files) if self.source.is_dir() else hashes.of(self.source)
        return {"source": {"sha256": content}, "threads": self.threads}


class RunStage(Task):
    """One compression step; ``fields`` are its configuration as JSON data."""

    stage: str
    fields: dict[str, Any]

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, and ``teacher`` where the stage wants one; writes the new student."""
        teacher, work = inputs.get("teacher"), inputs.get(WORK)
        self.stage_config().run_beside(inputs["student"], dst, teacher=teacher, work=work)

    def plugins(self) -> list[tuple[Kind, str]]:
        """The stage, and the formats whose layouts it goes by."""
        formats = self.stage_config().formats_read
        found: list[tuple[Kind, str]] = [("stages", self.stage)]
        return found + [("exporters", name) for name in formats]

    def fingerprint(self, hashes: ContentHashes) -> dict[str, Any]:
        """The stage's fields with its defaults, the files that it names as hashes."""
        fields = plain(self.stage_config(), hashes)
        return {"stage": self.stage, "fields": fields, "threads": self.threads}

    def keeps_work(self) -> bool:
        """As the stage does."""
        return self.stage_config().keeps_work

    def stage_config(self) -> Stage:
        """The stage, with its fields."""
        from edgedistill.plugins import load_plugin

        return load_plugin("stages", self.stage).model_validate(self.fields)


class Export(Task):
    """Write a student in one format."""

    format: str
    context_tokens: int

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, writes ``artifact/`` and ``weights.json`` beside it."""
        from edgedistill.plugins import load_plugin
        from edgedistill.student import Student

        exporter = load_plugin("exporters", self.format)()
        student = Student(inputs["student"])
        artifact = dst / ARTIFACT
        artifact.mkdir()
        exporter.export(student, artifact, context_tokens=self.context_tokens)
        weights = Weights(
            weight_bytes=exporter.weight_bytes(artifact), parameters=student.facts.parameters
        )
        (dst / WEIGHTS_FILE).write_text(weights.model_dump_json(), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The exporter."""
        return [("exporters", self.format)]


class JudgeLogits(Task):
    """What ``transformers`` in float32 says on the texts, with a student's weights.

    Where there is a student ``vocabulary``, which kept a part of its tokens, it says it in those.

    Attributes:
        context_tokens: the length of one long prompt that it reads too; None leaves it out.
    """

    texts: dict[str, Path]
    chat: Chat
    context_tokens: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, and ``vocabulary`` if given."""
        from edgedistill.verify.judge import write_judge_logits
        from edgedistill.verify.kept_logits import write_kept_logits
        from edgedistill.verify.texts import load_texts

        texts, vocabulary = load_texts(self.texts), inputs.get("vocabulary")
        if vocabulary is not None:
            write_kept_logits(
                inputs["student"], vocabulary, texts, dst, chat=self.chat, threads=self.threads
            )
            return
        write_judge_logits(
            inputs["student"],
            texts,
            dst,
            chat=self.chat,
            threads=self.threads,
            context_tokens=self.context_tokens,
        )


class Verify(Task):
    """Is the artifact the model that we think it is?

    Attributes:
        pruned: the rung's stages took parts out of the student.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.
    """

    format: str
    runtime: str
    context_tokens: int
    pruned: bool = False
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact``, ``student``, the judges; writes ``verification.json``."""
        from edgedistill.verify.artifact import verify_artifact

        found = verify_artifact(
            inputs["artifact"] / ARTIFACT,
            self.format,
            student=inputs["student"],
            weights_judge=inputs["weights_judge"],
            reference_judge=inputs["reference_judge"],
            base_judge=inputs.get("base_judge"),
            context_tokens=self.context_tokens,
            threads=self.threads,
            pruned=self.pruned,
            kv_cache_bits=self.kv_cache_bits,
        )
        (dst / VERIFICATION_FILE).write_text(found.model_dump_json(indent=2), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The exporter, which names the runtime, and the runtime."""
        return [("exporters", self.format), ("runtimes", self.runtime)]


class ScoreReference(Task):
    """Score the suite, or a sample of it, with the reference, in ``transformers`` float32."""

    suite: tuple[Path, ...]
    chat: Chat
    context_tokens: int
    sample: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, writes ``scores.jsonl``."""
        from edgedistill.evaluate.reference import score_reference

        score_reference(
            inputs["student"],
            self.suite,
            dst,
            sample=self.sample,
            chat=self.chat,
            threads=self.threads,
            context_tokens=self.context_tokens,
        )


class Score(Task):
    """Score the suite, or a paired sample of it, with an artifact in its runtime."""

    runtime: str
    suite: tuple[Path, ...]
    sample: int | None
    chat: Chat
    context_tokens: int
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact`` and ``student``, writes ``scores.jsonl``."""
        from edgedistill.evaluate.score import score_artifact

        score_artifact(
            inputs["artifact"] / ARTIFACT,
            self.runtime,
            inputs["student"],
            self.suite,
            dst,
            sample=self.sample,
            chat=self.chat,
            threads=self.threads,
            context_tokens=self.context_tokens,
            kv_cache_bits=self.kv_cache_bits,
        )

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]


class Compare(Task):
    """Judge an artifact's scores against the reference's.

    Attributes:
        suite: the files that were scored; none where scoring the reference wrote ``suite.jsonl``.
    """

    runtime: str
    suite: tuple[Path, ...]
    floor: Floor | None
    slices: dict[str, SliceSpec]
    beside: Beside = Beside()

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``reference_scores`` and ``artifact_scores``, writes ``evaluation.json``.

        For the exports there are ``cases.jsonl`` and, with a router, ``queue.jsonl``.
        """
        from edgedistill.evaluate.compare import compare
        from edgedistill.evaluate.suite import SUITE_FILE

        compare(
            self.suite or (inputs["reference_scores"] / SUITE_FILE,),
            inputs["reference_scores"],
            inputs["artifact_scores"],
            floor=self.floor,
            slices=self.slices,
            runtime=self.runtime,
            out=dst / EVALUATION_FILE,
            beside=self.beside,
        )


class BenchArtifact(Task):
    """Measure speed and memory on this machine, whose fingerprint is part of the key."""

    runtime: str
    context_tokens: int
    machine: str
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact`` and ``student``, writes ``bench.json``."""
        from edgedistill.bench.protocol import bench_artifact

        weights = (inputs["artifact"] / WEIGHTS_FILE).read_bytes()
        found = bench_artifact(
            inputs["artifact"] / ARTIFACT,
            self.runtime,
            student=inputs["student"],
            threads=self.threads,
            context_tokens=self.context_tokens,
            weight_bytes=Weights.model_validate_json(weights).weight_bytes,
            kv_cache_bits=self.kv_cache_bits,
        )
        (dst / BENCH_FILE).write_text(found.model_dump_json(indent=2), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]
