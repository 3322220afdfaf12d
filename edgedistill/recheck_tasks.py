"""The steps of ``edgedistill verify``: what runs native code on somebody's file, each in a process.

Inputs by name: ``student`` a student directory, ``judge`` and ``own_judge`` outputs of
:class:`~edgedistill.tasks.JudgeLogits`, ``own_weights`` the output of :class:`OwnWeights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgedistill.plugins import Kind
from edgedistill.results import GoldenVector, Verification
from edgedistill.task import Task
from edgedistill.tasks import ARTIFACT, VERIFICATION_FILE


class ReplayGolden(Task):
    """Ask an artifact what its manifest says it would say."""

    artifact: Path
    runtime: str
    context_tokens: int
    golden: tuple[GoldenVector, ...]
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Writes ``verification.json``."""
        from edgedistill.plugins import load_runtime
        from edgedistill.verify.golden import replay_golden

        runtime = load_runtime(self.runtime, self.kv_cache_bits)
        with runtime.open(
            self.artifact, context_tokens=self.context_tokens, threads=self.threads
        ) as session:
            checks = replay_golden(session, self.golden)
        found = Verification(
            checks=checks,
            against_weights=[],
            against_reference=[],
            settings=runtime.settings(),
            limitation=runtime.limitation,
        )
        (dst / VERIFICATION_FILE).write_text(found.model_dump_json(indent=2), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]


class OwnWeights(Task):
    """A GGUF file's weights under the reference's config."""

    file: Path

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``student``, writes a student directory."""
        from edgedistill.verify.own_weights import write_own_weights

        write_own_weights(self.file, inputs["student"], dst)


class VerifyForeign(Task):
    """Hold a file that others made against a student."""

    format: str
    runtime: str
    kv_cache_bits: int | None = None

    def run(self, inputs: Mapping[str, Path], dst: Path) -> None:
        """Reads ``artifact``, ``student``, ``judge`` and, if given, those of its own weights."""
        from edgedistill.verify.foreign import verify_foreign
        from edgedistill.verify.loss import Judges

        judges = Judges.read(
            inputs["student"], inputs["judge"], inputs.get("own_judge"), inputs.get("own_weights")
        )
        artifact = inputs["artifact"] / ARTIFACT
        found = verify_foreign(
            artifact,
            self.format,
            self.runtime,
            judges,
            threads=self.threads,
            kv_cache_bits=self.kv_cache_bits,
        )
        (dst / VERIFICATION_FILE).write_text(found.model_dump_json(indent=2), encoding="utf-8")

    def plugins(self) -> list[tuple[Kind, str]]:
        """The runtime."""
        return [("runtimes", self.runtime)]
