"""From measurements to a verdict: what ships, for which target, and the build's exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgedistill.errors import EdgedistillError, ExitCode
from edgedistill.recipe import Budget, Recipe, Target
from edgedistill.results import (
    ArtifactReport,
    Bench,
    BudgetCheck,
    Evaluation,
    Judgement,
    Verdict,
    Verification,
)

# The worst first.  A crash says less about the artifact than a verdict, so nothing hides it.
SEVERITY = (
    ExitCode.STAGE_FAILED,
    ExitCode.USAGE,
    ExitCode.VERIFICATION_FAILED,
    ExitCode.FLOOR_NOT_MET,
    ExitCode.BUDGET_NOT_MET,
    ExitCode.UNDERPOWERED,
    ExitCode.UNAVAILABLE,
    ExitCode.OK,
)


@dataclass(frozen=True)
class Ruling:
    """Whether an artifact may ship, and if not, why: ``code`` is OK where nothing failed."""

    ships: bool
    code: ExitCode
    why_not: str | None = None


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """The most severe of several codes; OK of none."""
    return min(codes, key=SEVERITY.index, default=ExitCode.OK)


def combine_quality(own: Evaluation | None, judge: Evaluation | None) -> Evaluation | None:
    """An evaluation with the verdict that counts.

    Args:
        own: on the artifact's own runs; a sample, unless it is the judge itself.
        judge: of the artifact with the same weights that ran the whole suite; None when ``own``
            is it, or when there is none.

    The judge decides; a sample can only overrule it by failing.  The router is the judge's too: it
    was fitted on the whole suite.
    """
    if own is None or judge is None or own.verdict == "fail":
        return own
    return own.model_copy(update={"verdict": judge.verdict, "router": judge.router})


def check_budget(
    target: str, budget: Budget, size_bytes: int, bench: Bench | None
) -> list[BudgetCheck]:
    """Every clause of a target's budget; a clause without a trusted figure is not measured."""
    trusted = bench if bench is not None and bench.accepted else None
    checks = []

    def check(clause: str, limit: float, value: float | None, *, at_least: bool = False) -> None:
        verdict: Verdict = "not measured"
        if value is not None:
            verdict = "pass" if (value >= limit if at_least else value <= limit) else "fail"
        checks.append(
            BudgetCheck(clause=f"{target}: {clause}", limit=limit, value=value, verdict=verdict)
        )

    if budget.file_mb is not None:
        check("file_mb", budget.file_mb, size_bytes / 1e6)
    if budget.peak_ram_mb is not None:
        # Memory does not depend on how busy the machine is.
        check("peak_ram_mb", budget.peak_ram_mb, bench.peak_rss_bytes / 1e6 if bench else None)
    for tokens, limit in budget.ttft_user_p95_ms.items():
        timing = trusted.ttft_user_ms.get(tokens) if trusted else None
        check(f"ttft_user_p95_ms[{tokens}]", limit, timing.p95 if timing else None)
    for tokens, limit in budget.ttft_model_p95_ms.items():
        timing = trusted.ttft_model_ms.get(tokens) if trusted else None
        check(f"ttft_model_p95_ms[{tokens}]", limit, timing.p95 if timing else None)
    if budget.decode_p50_tok_per_s is not None:
        table = trusted.decode_tok_per_s if trusted else {}
        rate = table[min(table)].p50 if table else None
        check("decode_p50_tok_per_s", budget.decode_p50_tok_per_s, rate, at_least=True)
    return checks


def rule(
    verification: Verification | None,
    evaluation: Evaluation | None,
    budget: Iterable[BudgetCheck],
    *,
    underpowered_passes: bool,
    errors: Mapping[str, EdgedistillError],
) -> Ruling:
    """Pass the gates in their order: verify, evaluate, budget.

    Args:
        verification: None when it could not be run.
        evaluation: with the verdict that counts; None without a suite or when it failed.
        budget: clauses of one target.
        underpowered_passes: what the recipe's floor says of a suite that cannot decide.
        errors: name of a step -> why there is no result of it.
    """
    if verification is None or "evaluation" in errors:
        name = "verification" if verification is None else "evaluation"
        error = errors[name]
        return Ruling(False, error.exit_code, f"no {name}: {error.message.splitlines()[0]}")
    if not verification.passed:
        failed = "; ".join(c.name for c in verification.checks if not c.passed)
        return Ruling(False, ExitCode.VERIFICATION_FAILED, f"verification failed: {failed}")
    if evaluation is not None and evaluation.verdict == "fail":
        return Ruling(
            False, ExitCode.FLOOR_NOT_MET, f"floor not met: {_failed_clauses(evaluation)}"
        )
    if evaluation is not None and evaluation.verdict == "underpowered" and not underpowered_passes:
        return Ruling(False, ExitCode.UNDERPOWERED, _undecided(evaluation))
    return _rule_budget(evaluation, list(budget))


def _rule_budget(evaluation: Evaluation | None, budget: list[BudgetCheck]) -> Ruling:
    over = [c for c in budget if c.verdict == "fail"]
    if over:
        words = "; ".join(f"{c.clause} is {c.value:.4g}, the limit {c.limit:g}" for c in over)
        return Ruling(False, ExitCode.BUDGET_NOT_MET, f"over budget: {words}")
    unknown = [c.clause for c in budget if c.verdict == "not measured"]
    if unknown:
        return Ruling(False, ExitCode.UNAVAILABLE, f"budget not measured: {', '.join(unknown)}")
    if evaluation is None:
        return Ruling(False, ExitCode.OK, "unjudged: the recipe has no suite")
    if evaluation.verdict == "unjudged":
        return Ruling(False, ExitCode.OK, "unjudged: the recipe has no floor")
    return Ruling(True, ExitCode.OK)


def _failed_clauses(evaluation: Evaluation) -> str:
    failed = [
        f"{c.clause} is {c.value:.4g} on {c.slice}, the limit {c.limit:.4g}"
        for c in evaluation.floor
        if c.verdict == "fail"
    ]
    return "; ".join(failed) or "the judging format of this rung fails it"


def _undecided(evaluation: Evaluation) -> str:
    needed = [c.cases_needed for c in evaluation.floor if c.cases_needed is not None]
    more = f": {max(needed):,} more cases" if needed else ""
    return f"the suite cannot decide{more}"


def judge_targets(
    recipe: Recipe,
    artifacts: Iterable[ArtifactReport],
    rulings: Mapping[tuple[str, str, str], Ruling],
) -> tuple[list[Judgement], list[ExitCode]]:
    """The smallest shippable rung of each target, and a code for each target without one.

    Args:
        recipe: whose targets are judged; those of which nothing was built are left out.
        artifacts: that were built.
        rulings: (target, rung, format) -> ruling.
    """
    judgements, codes = [], []
    ordered = sorted(artifacts, key=lambda a: a.size_bytes)
    for name, target in recipe.all_targets().items():
        ruled = [(a, r) for a in ordered if (r := rulings.get((name, a.rung, a.format)))]
        if not ruled:
            continue
        judgements.append(_judgement(name, target, ruled))
        if judgements[-1].rung is None:
            codes.append(worst(r.code for _, r in ruled))
    return judgements, codes


def _judgement(name: str, target: Target, ruled: list[tuple[ArtifactReport, Ruling]]) -> Judgement:
    shipping = [artifact for artifact, ruling in ruled if ruling.ships]
    if shipping:
        reason = f"the smallest of {len(shipping)} that pass, of {len(ruled)}"
        return Judgement(target=name, format=target.format, rung=shipping[0].rung, reason=reason)
    reasons: dict[str, list[str]] = {}
    for artifact, ruling in ruled:
        reasons.setdefault(ruling.why_not or "", []).append(artifact.rung)
    reason = "; ".join(f"{', '.join(rungs)}: {why}" for why, rungs in reasons.items())
    return Judgement(target=name, format=target.format, rung=None, reason=reason)
