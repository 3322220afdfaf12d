"""From a recipe to the steps of its build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.beside import Beside
from edgedistill.content import ContentHashes
from edgedistill.errors import UsageError
from edgedistill.evaluate.waivers import in_force, read_waivers, utc_today
from edgedistill.evaluation_tasks import ReadTraffic, ScoreUntilDecided, Traffic
from edgedistill.kv_cache import kv_cache_bits_of
from edgedistill.pipeline import Step, unique
from edgedistill.plugins import did_you_mean, load_plugin
from edgedistill.recipe import Recipe, StageStep
from edgedistill.recipe_check import REFERENCE_STAGES
from edgedistill.release import find_released
from edgedistill.task import Task
from edgedistill.tasks import (
    BenchArtifact,
    Compare,
    Export,
    JudgeLogits,
    RunStage,
    Score,
    ScoreReference,
    TakeIn,
    Verify,
)

REFERENCE_RUNTIME = "torch_reference"


@dataclass(frozen=True)
class ArtifactSteps:
    """The steps around one rung in one format.

    Attributes:
        judges: whether it runs the whole suite; the rung's other formats run a sample.
        student: the step that makes the rung's weights.
        score, compare: None without a suite.
        bench: None where the runtime's speed says nothing about a device.
        traffic: None without a traffic file, and where another format of the rung judges.
        kv_cache_bits: in which it caches keys and values; None where its runtime has no choice.
    """

    rung: str
    format: str
    runtime: str
    judges: bool
    sample: int | None
    student: Step
    export: Step
    verify: Step
    score: Step | None
    compare: Step | None
    bench: Step | None
    traffic: Step | None = None
    kv_cache_bits: int | None = None


@dataclass(frozen=True)
class BuildSteps:
    """All steps of a build.

    Attributes:
        reference: makes the student that everything is compared with.
        reference_quality: compares the reference with itself, for its own figures.
    """

    reference: Step
    reference_quality: Step | None
    artifacts: tuple[ArtifactSteps, ...]

    def ordered(self) -> list[Step]:
        """What fails fast goes first; benchmarks run last, when nothing else does."""
        artifacts = self.artifacts
        steps = [self.reference, *(a.export for a in artifacts), *(a.verify for a in artifacts)]
        steps += [s for s in (self.reference_quality, *(a.compare for a in artifacts)) if s]
        steps += [a.traffic for a in artifacts if a.traffic]
        steps += [a.bench for a in artifacts if a.bench]
        return unique(s for step in steps for s in step.lineage())


def plan_build(
    recipe: Recipe, student: Path, only: Sequence[str] = (), *, machine: str, rebench: bool = False
) -> BuildSteps:
    """The steps that build a recipe; their keys say which of them the cache has.

    Args:
        recipe: checked, its paths absolute.
        student: the directory or GGUF file that it starts from.
        only: ``rung`` or ``rung/format``; empty for all.
        machine: its fingerprint, part of the benchmarks' keys.
        rebench: measure again what the cache has.

    Raises:
        UsageError: ``only`` names something that the recipe lacks.
    """
    return _Planner(recipe, student, _select(recipe, only), machine, rebench).plan()


def _select(recipe: Recipe, only: Sequence[str]) -> dict[str, list[str]]:
    """Rung -> formats, in the recipe's order."""
    everything = {rung: list(recipe.formats_of(rung)) for rung in recipe.rungs}
    names = [*everything, *(f"{r}/{f}" for r, formats in everything.items() for f in formats)]
    for wanted in only:
        if wanted not in names:
            hint = did_you_mean(wanted, names, "the recipe has")
            raise UsageError(f"--only {wanted}: the recipe does not build it", hint=hint)
    return {
        rung: [f for f in formats if not only or rung in only or f"{rung}/{f}" in only]
        for rung, formats in everything.items()
    }


class _Planner:
    def __init__(
        self,
        recipe: Recipe,
        student: Path,
        selected: dict[str, list[str]],
        machine: str,
        rebench: bool,
    ) -> None:
        self._recipe = recipe
        self._selected = selected
        self._machine = machine
        self._rebench = rebench
        self._hashes = ContentHashes()
        self._threads = recipe.build.threads
        self._waived = in_force(read_waivers(recipe.waivers), recipe.name, utc_today())
        self._taken_in = self._step("take in the student", TakeIn(source=student))
        first = next(
            (i for i, s in enumerate(recipe.stages) if s.name not in REFERENCE_STAGES),
            len(recipe.stages),
        )
        self._reference = self._stages("", recipe.stages[:first], self._taken_in)
        self._shared = self._stages("", recipe.stages[first:], self._reference)
        self._reference_scores = self._score_reference() if recipe.suite else None
        self._reference_traffic = self._read_traffic(recipe.traffic) if recipe.traffic else None

    def plan(self) -> BuildSteps:
        artifacts = [
            steps for rung, formats in self._selected.items() for steps in self._rung(rung, formats)
        ]
        quality = None
        if self._reference_scores:
            scores = self._reference_scores
            quality = self._compare("reference", REFERENCE_RUNTIME, scores, scores, judged=False)
        return BuildSteps(self._reference, quality, tuple(artifacts))

    def _rung(self, rung: str, formats: list[str]) -> list[ArtifactSteps]:
        if not formats:
            return []
        student = self._stages(f"{rung}: ", self._recipe.rungs[rung], self._shared)
        judge = self._recipe.evaluate.judging(formats)
        return [self._artifact(rung, name, student, judges=name == judge) for name in formats]

    def _artifact(self, rung: str, name: str, student: Step, *, judges: bool) -> ArtifactSteps:
        recipe, label = self._recipe, f"{rung}/{name}"
        runtime = load_plugin("exporters", name).runtime
        limited = load_plugin("runtimes", runtime).limitation is not None
        sample = None if judges else recipe.evaluate.sample_of(name)
        context = recipe.context_tokens
        export = self._step(
            f"{label}: export", Export(format=name, context_tokens=context), student=student
        )
        score = compare = None
        if self._reference_scores:
            scores = self._reference_scores
            score = self._score(label, runtime, sample, student, export, scores)
            compare = self._compare(
                label, runtime, scores, score, judged=True, beside=self._beside(rung, name)
            )
        return ArtifactSteps(
            rung=rung,
            format=name,
            runtime=runtime,
            judges=judges,
            sample=sample,
            student=student,
            export=export,
            verify=self._verify(label, name, runtime, student, export),
            score=score,
            compare=compare,
            bench=None if limited else self._bench(label, runtime, student, export),
            traffic=self._traffic(label, runtime, student, export) if judges else None,
            kv_cache_bits=self._kv_cache_bits(label),
        )

    def _kv_cache_bits(self, label: str) -> int | None:
        rung, _, format_name = label.partition("/")
        return kv_cache_bits_of(self._recipe, rung, format_name)

    def _verify(self, label: str, name: str, runtime: str, student: Step, export: Step) -> Step:
        rung, vocabulary = label.partition("/")[0], _vocabulary_of(student)
        inputs = {
            "artifact": export,
            "student": student,
            "reference_judge": self._judge("reference", self._reference, vocabulary=vocabulary),
            "weights_judge": self._judge(rung, student),
        }
        if self._reference is not self._taken_in:
            inputs["base_judge"] = self._judge(
                "student before adapters", self._taken_in, long=False, vocabulary=vocabulary
            )
        task = Verify(
            format=name,
            runtime=runtime,
            context_tokens=self._recipe.context_tokens,
            threads=self._threads,
            pruned=self._is_pruned(label.partition("/")[0]),
            kv_cache_bits=self._kv_cache_bits(label),
        )
        return self._step(f"{label}: verify", task, **inputs)

    def _is_pruned(self, rung: str) -> bool:
        stages = [*self._recipe.stages, *self._recipe.rungs[rung]]
        return any(stage.config.prunes for stage in stages)

    def _judge(
        self, label: str, student: Step, *, long: bool = True, vocabulary: Step | None = None
    ) -> Step:
        """What a student says on the texts, in its own tokens or in those of another one."""
        recipe = self._recipe
        long = long and vocabulary is None
        task = JudgeLogits(
            texts=recipe.texts,
            chat=recipe.chat,
            threads=self._threads,
            context_tokens=recipe.context_tokens if long else None,
        )
        inputs = {"student": student}
        if vocabulary is not None:
            label = f"{label}, in the tokens of {vocabulary.label.partition(':')[0]}"
            inputs["vocabulary"] = vocabulary
        return self._step(f"{label}: float32 logits", task, **inputs)

    def _score_reference(self) -> Step:
        task = ScoreReference(
            suite=self._recipe.suite,
            chat=self._recipe.chat,
            context_tokens=self._recipe.context_tokens,
            threads=self._threads,
        )
        return self._step("reference: score", task, student=self._reference)

    def _beside(self, rung: str, format_name: str) -> Beside:
        recipe = self._recipe
        beside: dict[str, Any] = {"teacher": recipe.teacher}
        if recipe.router is not None:
            beside["router_accuracy"] = recipe.router.target_accuracy
        released = find_released(recipe.previous, rung, format_name) if recipe.previous else None
        if released is not None:
            beside |= {"previous": released.scores, "previous_name": released.name}
        return Beside(**beside)

    def _score(
        self,
        label: str,
        runtime: str,
        sample: int | None,
        student: Step,
        export: Step,
        reference: Step,
    ) -> Step:
        recipe = self._recipe
        common: dict[str, Any] = {
            "runtime": runtime,
            "suite": recipe.suite,
            "chat": recipe.chat,
            "context_tokens": recipe.context_tokens,
            "threads": self._threads,
            "kv_cache_bits": self._kv_cache_bits(label),
        }
        # The reference's tokenizer and template ask every rung the same questions; a rung with
        # tokens of its own is asked the same strings.
        asks = self._reference if _vocabulary_of(student) is None else student
        inputs = {"artifact": export, "student": asks}
        if sample is None and self._stops_early(label):
            inputs["reference_scores"] = reference
            early = ScoreUntilDecided(**common, floor=recipe.floor, slices=recipe.slices)
            return self._step(f"{label}: score", early, **inputs)
        return self._step(f"{label}: score", Score(**common, sample=sample), **inputs)

    def _stops_early(self, label: str) -> bool:
        """Whether a verdict can end the sampling; where a failure is waived all cases count."""
        recipe = self._recipe
        if not recipe.evaluate.stop_early or not (recipe.floor or recipe.slices):
            return False
        rung, _, format_name = label.partition("/")
        return (rung, format_name) not in self._waived

    def _compare(
        self,
        label: str,
        runtime: str,
        reference: Step,
        scores: Step,
        *,
        judged: bool,
        beside: Beside | None = None,
    ) -> Step:
        recipe = self._recipe
        task = Compare(
            runtime=runtime,
            suite=recipe.suite,
            floor=recipe.floor if judged else None,
            slices=recipe.slices if judged else {},
            beside=beside or Beside(),
        )
        inputs = {"reference_scores": reference, "artifact_scores": scores}
        return self._step(f"{label}: judge", task, **inputs)

    def _read_traffic(self, traffic: Path) -> Step:
        task = ReadTraffic(
            traffic=traffic,
            sample=self._recipe.evaluate.traffic_sample,
            chat=self._recipe.chat,
            context_tokens=self._recipe.context_tokens,
            threads=self._threads,
        )
        return self._step("reference: traffic", task, student=self._reference)

    def _traffic(self, label: str, runtime: str, student: Step, export: Step) -> Step | None:
        if self._reference_traffic is None:
            return None
        task = Traffic(
            runtime=runtime,
            suite=self._recipe.suite,
            context_tokens=self._recipe.context_tokens,
            threads=self._threads,
            kv_cache_bits=self._kv_cache_bits(label),
        )
        inputs = {"student": self._reference, "reference_traffic": self._reference_traffic}
        vocabulary = _vocabulary_of(student)
        if vocabulary is not None:
            inputs["vocabulary"] = vocabulary
        return self._step(f"{label}: traffic", task, artifact=export, **inputs)

    def _bench(self, label: str, runtime: str, student: Step, export: Step) -> Step:
        task = BenchArtifact(
            runtime=runtime,
            context_tokens=self._recipe.context_tokens,
            machine=self._machine,
            threads=self._threads,
            kv_cache_bits=self._kv_cache_bits(label),
        )
        inputs = {"artifact": export, "student": student}
        return Step(f"{label}: bench", task, inputs, self._hashes, self._rebench, alone=True)

    def _stages(self, label: str, stages: Sequence[StageStep], student: Step) -> Step:
        for stage in stages:
            # Only what the recipe says: a stage's defaults belong to its own code.
            fields = stage.config.model_dump(mode="json", exclude_unset=True)
            task = RunStage(stage=stage.name, fields=fields, threads=self._threads)
            inputs = {"student": student}
            if stage.config.wants_teacher:
                inputs["teacher"] = self._reference
            student = self._step(f"{label}{stage.name}", task, **inputs)
        return student

    def _step(self, label: str, task: Task, **inputs: Step) -> Step:
        return Step(label, task, inputs, self._hashes)


def _vocabulary_of(student: Step) -> Step | None:
    """The step that gave a student tokens of its own; None where it has the reference's."""
    step: Step | None = student
    while step is not None:
        task = step.task
        if isinstance(task, RunStage) and task.stage_config().changes_vocabulary:
            return step
        step = step.inputs.get("student")
    return None
