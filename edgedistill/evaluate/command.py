"""``edgedistill evaluate``: does a file, whoever made it, still do the reference's job?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgedistill.artifact_source import ArtifactSource, find_artifact, find_runtime
from edgedistill.beside import Beside
from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.chat import Chat
from edgedistill.content import ContentHashes
from edgedistill.errors import ExitCode, UsageError
from edgedistill.evaluate.criteria import Criteria, read_criteria
from edgedistill.evaluate.harness import HarnessTask, find_task
from edgedistill.evaluate.suite import load_suite
from edgedistill.evaluate.waivers import apply_waivers, read_waivers, utc_today
from edgedistill.evaluation_tasks import ScoreHarness, TakeArtifact
from edgedistill.intake import read_facts, resolve_student
from edgedistill.pipeline import Pipeline, Say, Step, say
from edgedistill.plan import REFERENCE_RUNTIME
from edgedistill.results import Evaluation, Verdict
from edgedistill.task import Task
from edgedistill.tasks import EVALUATION_FILE, Compare, Score, ScoreReference, TakeIn

# Of an artifact that claims none: as much as most prompts need, at most what the student holds.
CONTEXT_TOKENS = 2048
CODES: dict[Verdict, ExitCode] = {
    "pass": ExitCode.OK,
    "unjudged": ExitCode.OK,
    "fail": ExitCode.FLOOR_NOT_MET,
    "underpowered": ExitCode.UNDERPOWERED,
    "not measured": ExitCode.UNDERPOWERED,
}


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and on what.

    Attributes:
        artifact: a GGUF file, a directory with an ONNX graph, a Core ML package.
        suite: JSONL files, or one ``lm_eval:TASK``.
        reference: the student that it is compared with, as a recipe's ``student`` names it.
        floor: a recipe, or a floor as JSON; None judges nothing.
        sample: number of cases; None scores all.
        context_tokens: None takes the recipe's, else the manifest's, else 2,048.
        cache: of the steps' outputs, the one that builds use.
    """

    artifact: Path
    suite: tuple[Path, ...]
    reference: str
    cache: CachePlace
    floor: str | None = None
    sample: int | None = None
    context_tokens: int | None = None
    threads: int = 2


@dataclass(frozen=True)
class Outcome:
    """What was found; None where a step failed, which has been told."""

    evaluation: Evaluation | None
    code: ExitCode


def evaluate_artifact(request: Request, tell: Say = say) -> Outcome:
    """Score reference and artifact on the suite, unless the cache has it, and compare.

    Raises:
        UsageError: the request cannot be carried out; nothing has run.
        InputError: the suite, the artifact or the waivers beside the recipe are damaged.
        UnavailableError: the reference lies on a hub that cannot be reached.
    """
    criteria, artifact = read_criteria(request.floor), find_artifact(request.artifact)
    waivers = read_waivers(criteria.waivers)
    judged = _plan(request, criteria, artifact)
    pipeline = Pipeline(open_cache(request.cache), tell)
    pipeline.run([judged])
    error, output = pipeline.outcome(judged).error, pipeline.output(judged)
    if error is not None or output is None:
        return Outcome(None, error.exit_code if error else ExitCode.STAGE_FAILED)
    evaluation = Evaluation.model_validate_json((output / EVALUATION_FILE).read_bytes())
    name, rung = artifact.claims.recipe, artifact.claims.rung
    if name is not None and rung is not None:
        meant = [w for w in waivers if w.is_for(name, rung, artifact.format)]
        evaluation = apply_waivers(evaluation, meant, floor=criteria.floor, today=utc_today())
    return Outcome(evaluation, CODES[evaluation.verdict])


def _plan(request: Request, criteria: Criteria, artifact: ArtifactSource) -> Step:
    """The step that judges, which stands on all others."""
    if request.sample is not None and request.sample < 1:
        raise UsageError(f"--sample {request.sample}: at least one case is needed")
    task = find_task(request.suite)
    if task is None:
        load_suite(request.suite)
    source = resolve_student(request.reference, Path.cwd())
    claimed = request.context_tokens or criteria.context_tokens or artifact.claims.context_tokens
    plan = _Plan(
        request=request,
        suite=() if task else tuple(path.absolute() for path in request.suite),
        runtime=find_runtime(artifact),
        chat=criteria.chat if criteria.chat is not None else artifact.claims.chat,
        context_tokens=claimed or min(CONTEXT_TOKENS, read_facts(source).max_context_tokens),
        kv_cache_bits=artifact.claims.kv_cache_bits,
    )
    student = plan.step("take in the reference", TakeIn(source=source))
    taken = plan.step("take in the artifact", TakeArtifact(source=request.artifact.absolute()))
    scores = {
        "reference_scores": plan.score_reference(task, student=student),
        "artifact_scores": plan.score_artifact(task, artifact=taken, student=student),
    }
    router = criteria.router
    compare = Compare(
        runtime=plan.runtime,
        suite=plan.suite,
        floor=criteria.floor,
        slices=criteria.slices,
        beside=Beside(router_accuracy=router.target_accuracy if router else None),
    )
    return plan.step("judge", compare, **scores)


@dataclass(frozen=True)
class _Plan:
    """What the steps have in common."""

    request: Request
    suite: tuple[Path, ...]
    runtime: str
    chat: Chat
    context_tokens: int
    kv_cache_bits: int | None = None
    hashes: ContentHashes = field(default_factory=ContentHashes)

    def step(self, label: str, task: Task, **inputs: Step) -> Step:
        return Step(label, task, inputs, self.hashes)

    def score_reference(self, task: HarnessTask | None, **inputs: Step) -> Step:
        if task is not None:
            return self.step("reference: score", self._harness(task, REFERENCE_RUNTIME), **inputs)
        # As a build does it, so that its scores are found in the cache.
        whole = ScoreReference(
            suite=self.suite,
            chat=self.chat,
            context_tokens=self.context_tokens,
            threads=self.request.threads,
        )
        step = self.step("reference: score", whole, **inputs)
        cache = open_cache(self.request.cache)
        if self.request.sample is None or cache.look_up(step.key) is not None:
            return step
        sample = whole.model_copy(update={"sample": self.request.sample})
        return self.step("reference: score", sample, **inputs)

    def score_artifact(self, task: HarnessTask | None, **inputs: Step) -> Step:
        if task is not None:
            harness = self._harness(task, self.runtime)
            harness = harness.model_copy(update={"kv_cache_bits": self.kv_cache_bits})
            return self.step("artifact: score", harness, **inputs)
        score = Score(
            runtime=self.runtime,
            suite=self.suite,
            sample=self.request.sample,
            chat=self.chat,
            context_tokens=self.context_tokens,
            threads=self.request.threads,
            kv_cache_bits=self.kv_cache_bits,
        )
        return self.step("artifact: score", score, **inputs)

    def _harness(self, task: HarnessTask, runtime: str) -> ScoreHarness:
        return ScoreHarness(
            name=task.name,
            directory=task.directory,
            runtime=runtime,
            sample=self.request.sample,
            chat=self.chat,
            context_tokens=self.context_tokens,
            threads=self.request.threads,
        )
