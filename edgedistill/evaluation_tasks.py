"""The steps of an evaluation beside a build's own, as tasks; inputs are named as in tasks.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.chat import Chat
from edgedistill.content import ContentHashes
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plugins import Kind
from edgedistill.task import Task
from edgedistill.tasks import ARTIFACT

TRAFFIC_FILE = "traffic.json"


class TakeArtifact(Task):
    """Link an artifact that lies somewhere, as :class:`Export` would have left it."""

    source: Path

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Writes ``artifact/``."""
        from edgedistill.artifact_source import find_artifact

        (dst / ARTIFACT).mkdir()
        find_artifact(self.source).link(dst / ARTIFACT)

    def fingerprint(self, hashes: ContentHashes) -> dict[str, Any]:
        """What the files hold, wherever they lie."""
        from edgedistill.artifact_source import find_artifact

        files = find_artifact(self.source).files
        return {
            "files": {name: hashes.of(file) for name, file in sorted(files.items())},
            "threads": self.threads,
        }


class ScoreHarness(Task):
    """Run a task of lm-evaluation-harness on an artifact, or on the reference itself."""

    name: str
    directory: Path | None
    runtime: str
    sample: int | None
    chat: Chat
    context_tokens: int
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student`` and ``artifact``, if given; writes ``suite.jsonl`` and scores."""
        from edgedistill.evaluate.harness import HarnessTask, score_task

        artifact = inputs["artifact"] / ARTIFACT if "artifact" in inputs else inputs["student"]
        score_task(
            artifact,
            self.runtime,
            inputs["student"],
            HarnessTask(name=self.name, directory=self.directory),
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


class ScoreUntilDecided(Task):
    """Score as many cases of the suite as the verdict takes, with an artifact in its runtime."""

    runtime: str
    suite: tuple[Path, ...]
    chat: Chat
    context_tokens: int
    floor: Floor | None
    slices: dict[str, SliceSpec]
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact``, ``student`` and ``reference_scores``, writes ``scores.jsonl``."""
        from edgedistill.evaluate.score_early import score_until_decided

        score_until_decided(
            inputs["artifact"] / ARTIFACT,
            self.runtime,
            inputs["student"],
            self.suite,
            inputs["reference_scores"],
            dst,
            floor=self.floor,
            slices=self.slices,
            chat=self.chat,
            threads=self.threads,
            context_tokens=self.context_tokens,
            kv_cache_bits=self.kv_cache_bits,
        )

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]


class ReadTraffic(Task):
    """Let the reference answer a sample of the unlabelled traffic."""

    traffic: Path
    sample: int
    chat: Chat
    context_tokens: int

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, writes prompts and answers."""
        from edgedistill.evaluate.traffic import read_reference

        read_reference(
            inputs["student"],
            self.traffic,
            dst,
            sample=self.sample,
            chat=self.chat,
            threads=self.threads,
            context_tokens=self.context_tokens,
        )

    def plugins(self) -> list[tuple[Kind, str]]:
        """The reference's runtime."""
        return [("runtimes", "torch_reference")]


class Traffic(Task):
    """Find where an artifact leaves the reference on the traffic, and no case measures it."""

    runtime: str
    suite: tuple[Path, ...]
    context_tokens: int
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact``, ``student`` and ``reference_traffic``, writes ``traffic.json``.

        The artifact has the tokens of ``vocabulary`` where that is given, else the student's.
        """
        from edgedistill.evaluate.traffic import find_disagreements

        found = find_disagreements(
            inputs["artifact"] / ARTIFACT,
            self.runtime,
            inputs["student"],
            inputs["reference_traffic"],
            self.suite,
            vocabulary=inputs.get("vocabulary"),
            threads=self.threads,
            context_tokens=self.context_tokens,
            kv_cache_bits=self.kv_cache_bits,
        )
        (dst / TRAFFIC_FILE).write_text(found.model_dump_json(indent=2), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]
