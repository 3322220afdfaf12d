"""What verify, evaluate and bench find, as typed documents: the contents of report.json."""

from __future__ import annotations

from typing import Literal

from edgedistill.choice_results import ChoiceQuality, ClassChange, Reliability, Router
from edgedistill.document import Document as Document
from edgedistill.document import Estimate as Estimate
from edgedistill.document import Interval as Interval
from edgedistill.rung_results import RungReport
from edgedistill.traffic_results import TrafficFindings

Verdict = Literal["pass", "fail", "underpowered", "unjudged", "not measured"]


class TextDivergence(Document):
    """How far an artifact's next-token distributions lie from a float32 judge, on one text.

    KL is KL(judge || artifact) in nats per token; ``top1`` the share of positions at which the
    artifact's most probable token is the judge's, or within 0.01 nats of it (a tie).  Where the
    judge knows tokens that the artifact lacks, all is over those that both have, normalized, and
    ``removed_mass`` is the judge's mean probability of the others.
    """

    text: str
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    worst_position: int
    top1: float
    removed_mass: float | None = None


class Check(Document):
    """One line of a verification: what was measured, and the limit that it was held to."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""


class GoldenVector(Document):
    """What an artifact says after a prompt, greedily, for a device to repeat.

    Attributes:
        prompt: for people; ``ids`` are what the model reads.
        steps: the tokens that follow, one by one.
        leads: by how many logits each led the second best.
    """

    prompt: str
    ids: list[int]
    steps: list[int]
    leads: list[float]


class Verification(Document):
    """Is the artifact the model that we think it is?

    Attributes:
        against_weights: against ``transformers`` float32 on the same (dequantized) weights.
        against_reference: against ``transformers`` float32 on the reference.
        settings: of the runtime.
        golden: what the artifact says, for a device to repeat; none where nothing leads clearly.
    """

    checks: list[Check]
    against_weights: list[TextDivergence]
    against_reference: list[TextDivergence]
    settings: dict[str, str]
    limitation: str | None = None
    golden: list[GoldenVector] = []

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


class Flip(Document):
    """A case whose answer changed between reference and artifact."""

    id: str
    prompt: str
    expected: str
    reference_answer: str
    artifact_answer: str
    slices: list[str]
    kind: Literal["broken", "fixed"]


class SliceQuality(Document):
    """Quality on one slice (or on all cases, ``slice`` = "all"), weighted by the cases' weights.

    Attributes:
        score: share of right answers; ``retention`` is score / reference_score.
        log_score: mean cross-entropy in nats of the choices' probabilities against the soft labels
            (the answer, where a case has none): lower is better.
        log_score_loss: log_score minus the reference's.
        broken: share of the reference's right answers that the artifact gets wrong.
        fixed: number of the reference's wrong answers that the artifact gets right.
        text_cases: texts, which are in none of the figures above but in those below.
        bits_per_byte: of the texts, lower is better; None where there are none.
        bits_per_byte_loss: bits_per_byte minus the reference's.
        choice: more of its cases of the kind ``choice``; None where there are none.

    A figure that no case gives is NaN: the log-score and F1 without choices, all without answers.
    """

    slice: str
    cases: int
    score: float
    score_interval: Interval
    reference_score: float
    retention: float
    retention_interval: Interval
    log_score: float
    log_score_loss: float
    log_score_loss_interval: Interval
    macro_f1: float
    broken: float
    broken_cases: int
    fixed_cases: int
    text_cases: int = 0
    bits_per_byte: float | None = None
    reference_bits_per_byte: float | None = None
    bits_per_byte_loss: float | None = None
    bits_per_byte_loss_interval: Interval | None = None
    choice: ChoiceQuality | None = None


class FieldQuality(Document):
    """How well one field of the JSON answers is extracted, over all cases that grade by fields.

    Attributes:
        field: its name, dotted where it lies inside another.
        cases: in which it was expected or given.
        f1: of its items, weighted by the cases' weights; ``reference_f1`` is the reference's.
    """

    field: str
    cases: int
    f1: float
    reference_f1: float


class SliceAgainst(Document):
    """The artifact and another answerer on the same cases of one slice.

    Attributes:
        score: of the other; ``artifact_score`` on the same cases.
        gain: artifact_score minus score, with a paired interval.
        broken_cases: the other is right and the artifact wrong; ``fixed_cases`` the reverse.
        agreement: share of the traffic that both answer alike.
        divergence: mean KL(other || artifact) over the choices, in nats, on the cases where the
            other gave a distribution; None where it gave none.
    """

    slice: str
    cases: int
    score: float
    artifact_score: float
    gain: Estimate
    broken_cases: int
    fixed_cases: int
    agreement: float
    divergence: float | None


class Against(Document):
    """The artifact beside another answerer than the reference.

    Attributes:
        cases: that both answered; ``slices`` has all of them first, then each slice.
        flips: against the other, whose answer stands in ``reference_answer``.
    """

    name: str
    kind: Literal["teacher", "previous release"]
    cases: int
    slices: list[SliceAgainst]
    flips: list[Flip]


class FloorCheck(Document):
    """One clause of the floor, judged by its interval.

    Attributes:
        value: the measured figure; it and ``interval`` are None where no case of the slice was
            scored (verdict ``not measured``, possible in a sample only).
        cases_needed: how many more cases of the slice would decide, where the scored ones cannot.
        waived: whether it failed and somebody consented to that, so that it passes.
        note: who consented to a loss, until when and why, or why a waiver does not hold.
    """

    clause: str
    slice: str
    limit: float
    value: float | None
    interval: Interval | None
    verdict: Verdict
    cases_needed: int | None = None
    waived: bool = False
    note: str | None = None


class Evaluation(Document):
    """Does the artifact still do its job?

    Attributes:
        reliability, classes: over all cases of the kind ``choice``.
        router: where the recipe asks for one.
        against: a teacher and the previous release, where the recipe names them.
    """

    cases: int
    cases_in_suite: int
    runtime: str
    slices: list[SliceQuality]
    floor: list[FloorCheck]
    flips: list[Flip]
    verdict: Verdict
    seconds: float
    fields: list[FieldQuality] = []
    reliability: Reliability | None = None
    classes: list[ClassChange] = []
    router: Router | None = None
    against: list[Against] = []
    stopped_early: bool = False

    @property
    def overall(self) -> SliceQuality:
        """Quality over all cases."""
        return self.slices[0]


class LoweredClause(Document):
    """A clause that was held higher in an earlier release of the same recipe.

    Attributes:
        clause: of the floor; ``loss`` is how much of its score a slice may lose (0 when it is
            protected), ``undecided`` the share of undecided clauses that may ship.
        was, now: the limits; ``now`` is None where the clause is gone.
    """

    slice: str
    clause: str
    was: float
    now: float | None

    def __str__(self) -> str:
        """In one line, for people."""
        now = "not held" if self.now is None else f"{self.now:g}"
        return f"{self.clause} on {self.slice} was {self.was:g}, is {now}"


class Timing(Document):
    """Raw values of one kind (times in milliseconds, or rates a second), and their percentiles.

    p95 is the slow tail of both: 95% of the requests were at least that fast.
    """

    p50: float
    p95: float
    raw: list[float]


class Bench(Document):
    """Speed on one device, by the definitions of MLPerf Client (docs/benchmarks.md).

    Keys of the tables are prompt lengths in tokens.

    Attributes:
        ttft_user_ms: from text to visible text; empty when the model showed none.
        ttft_cold_ms: the same after the shortest prompt, with the load of the artifact.
        decode_roofline_share: p50 decode rate / (memory bandwidth / bytes read per token).
        cpu_share: CPU time / (wall time x threads) of the measured runs; low on a busy machine.
        accepted: False on a busy machine or with a spread that is too wide; ``reason`` says why.
    """

    device: str
    runtime: str
    threads: int
    ttft_model_ms: dict[int, Timing]
    ttft_user_ms: dict[int, Timing]
    ttft_cold_ms: Timing | None
    prefill_tok_per_s: dict[int, Timing]
    decode_tok_per_s: dict[int, Timing]
    memory_bandwidth_gb_per_s: float
    decode_roofline_share: float
    peak_rss_bytes: int
    cpu_share: float
    accepted: bool
    reason: str
    settings: dict[str, str]


class BudgetCheck(Document):
    """One clause of a target's budget."""

    clause: str
    limit: float
    value: float | None
    verdict: Verdict


class ArtifactReport(Document):
    """One rung in one format.

    Attributes:
        path: the artifact's directory, relative to the exports root.
        size_bytes: of the files that ship; ``bits_per_weight`` of weight data / parameters.
        shippable: verified, floor met, budget met.
        why_not: one sentence when not shippable.
        lineage: labels of the steps that made it, from the student to the export.
        traffic: of the format that runs the whole suite, where the recipe names a traffic file.
        kv_cache_bits: in which keys and values are cached; None where the runtime has no choice.
    """

    rung: str
    format: str
    runtime: str
    path: str
    size_bytes: int
    weight_bytes: int
    parameters: int
    bits_per_weight: float
    verification: Verification | None
    evaluation: Evaluation | None
    bench: Bench | None
    budget: list[BudgetCheck]
    shippable: bool
    why_not: str | None
    lineage: list[str] = []
    traffic: TrafficFindings | None = None
    kv_cache_bits: int | None = None


class StepReport(Document):
    """One step of the build: how long it took and how much memory it held when it ran.

    Attributes:
        peak_rss_bytes: of its process, with pages of mapped files.
        peak_own_bytes: without, of the process and those that it started: what a recipe limits.
    """

    label: str
    key: str
    cached: bool
    seconds: float
    peak_rss_bytes: int
    peak_own_bytes: int
    error: str | None = None


class Judgement(Document):
    """The rung to ship for one target, or why there is none."""

    target: str
    format: str
    rung: str | None
    reason: str


class BuildReport(Document):
    """A whole build: the contents of ``exports/<recipe>/report.json``.

    Attributes:
        peak_ram_limit_bytes: what the recipe allows any step to hold; None when it says nothing.
        rungs: how each was made smaller, where a stage wrote something down.
        floor_lowered: clauses that earlier releases among the exports were held to.
    """

    schema_version: Literal[1] = 1
    recipe: str
    edgedistill: str
    started: str
    seconds: float
    license: str | None
    student: str
    context_tokens: int
    parameters: int
    reference: SliceQuality | None
    artifacts: list[ArtifactReport]
    judgements: list[Judgement]
    steps: list[StepReport]
    machine: dict[str, str]
    exit_code: int
    peak_ram_limit_bytes: int | None = None
    floor_lowered: list[LoweredClause] = []
    rungs: list[RungReport] = []

    @property
    def peak_own_bytes(self) -> int:
        """The largest peak of any step."""
        return max((step.peak_own_bytes for step in self.steps), default=0)
