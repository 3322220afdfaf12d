from __future__ import annotations

from typing import Any

import pytest

from edgedistill.errors import ExitCode, StageError, UnavailableError
from edgedistill.recipe import Budget, Recipe
from edgedistill.results import (
    ArtifactReport,
    Bench,
    Check,
    Evaluation,
    FloorCheck,
    Interval,
    SliceQuality,
    Timing,
    Verdict,
    Verification,
)
from edgedistill.verdict import (
    Ruling,
    check_budget,
    combine_quality,
    judge_targets,
    rule,
    worst,
)

ALL = Interval(low=0.9, high=1.1)
QUALITY = SliceQuality(
    slice="all",
    cases=100,
    score=0.8,
    score_interval=ALL,
    reference_score=0.8,
    retention=1.0,
    retention_interval=ALL,
    log_score=1.0,
    log_score_loss=0.0,
    log_score_loss_interval=ALL,
    macro_f1=0.8,
    broken=0.0,
    broken_cases=0,
    fixed_cases=0,
)


def evaluation(verdict: Verdict, needed: int | None = None) -> Evaluation:
    check = FloorCheck(
        clause="retention",
        slice="all",
        limit=0.98,
        value=0.9,
        interval=ALL,
        verdict=verdict,
        cases_needed=needed,
    )
    return Evaluation(
        cases=100,
        cases_in_suite=100,
        runtime="r",
        slices=[QUALITY],
        floor=[check],
        flips=[],
        verdict=verdict,
        seconds=1.0,
    )


def verification(passed: bool = True) -> Verification:
    checks = [Check(name="logits", passed=passed), Check(name="tokenizer", passed=True)]
    return Verification(checks=checks, against_weights=[], against_reference=[], settings={})


def bench(accepted: bool = True) -> Bench:
    time = Timing(p50=500.0, p95=650.0, raw=[500.0, 650.0])
    return Bench(
        device="d",
        runtime="r",
        threads=2,
        ttft_model_ms={64: time},
        ttft_user_ms={64: time},
        ttft_cold_ms=None,
        prefill_tok_per_s={},
        decode_tok_per_s={64: Timing(p50=20.0, p95=18.0, raw=[20.0]), 512: time},
        memory_bandwidth_gb_per_s=10.0,
        decode_roofline_share=0.5,
        peak_rss_bytes=300_000_000,
        cpu_share=1.0,
        accepted=accepted,
        reason="",
        settings={},
    )


def judged(
    verified: Verification | None = None,
    quality: Evaluation | None = None,
    **changes: Any,
) -> Ruling:
    arguments: dict[str, Any] = {"budget": [], "underpowered_passes": False, "errors": {}}
    return rule(verified or verification(), quality, **(arguments | changes))


def test_an_artifact_that_passes_every_gate_ships() -> None:
    assert judged(quality=evaluation("pass")) == Ruling(True, ExitCode.OK)


def test_gates_are_passed_in_order_and_the_first_failure_is_the_reason() -> None:
    bad = judged(verification(False), evaluation("fail"))
    assert (bad.ships, bad.code) == (False, ExitCode.VERIFICATION_FAILED)
    assert bad.why_not == "verification failed: logits"
    below = judged(quality=evaluation("fail"))
    assert below.code is ExitCode.FLOOR_NOT_MET
    assert "retention is 0.9 on all, the limit 0.98" in (below.why_not or "")


def test_a_suite_that_cannot_decide_fails_unless_the_floor_says_otherwise() -> None:
    unsure = evaluation("underpowered", needed=1200)
    ruling = judged(quality=unsure)
    assert (ruling.ships, ruling.code) == (False, ExitCode.UNDERPOWERED)
    assert "1,200 more cases" in (ruling.why_not or "")
    assert judged(quality=unsure, underpowered_passes=True).ships


@pytest.mark.parametrize("quality", [None, evaluation("unjudged")])
def test_what_nobody_judged_is_no_failure_and_does_not_ship(quality: Evaluation | None) -> None:
    ruling = judged(quality=quality)
    assert (ruling.ships, ruling.code) == (False, ExitCode.OK)
    assert "unjudged" in (ruling.why_not or "")


def test_a_verification_that_could_not_run_gives_its_errors_code() -> None:
    errors = {"verification": UnavailableError("no runtime"), "evaluation": StageError("crash")}
    ruling = rule(None, None, [], underpowered_passes=False, errors=errors)
    assert (ruling.ships, ruling.code) == (False, ExitCode.UNAVAILABLE)
    assert ruling.why_not == "no verification: no runtime"
    crashed = judged(errors={"evaluation": StageError("crash")})
    assert crashed.code is ExitCode.STAGE_FAILED


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        (Budget(file_mb=100), "pass"),
        (Budget(file_mb=99), "fail"),
        (Budget(peak_ram_mb=300), "pass"),
        (Budget(peak_ram_mb=299), "fail"),
        (Budget(ttft_user_p95_ms={64: 650}), "pass"),
        (Budget(ttft_user_p95_ms={64: 649}), "fail"),
        (Budget(ttft_user_p95_ms={512: 649}), "not measured"),
        (Budget(ttft_model_p95_ms={64: 649}), "fail"),
        (Budget(decode_p50_tok_per_s=20), "pass"),
        (Budget(decode_p50_tok_per_s=21), "fail"),
    ],
)
def test_each_clause_of_a_budget_is_held(budget: Budget, verdict: Verdict) -> None:
    (check,) = check_budget("phone", budget, 100_000_000, bench())
    assert check.verdict == verdict
    assert check.clause.startswith("phone: ")


def test_times_of_a_busy_machine_are_not_measured_and_do_not_ship() -> None:
    budget = Budget(file_mb=100, decode_p50_tok_per_s=1, ttft_user_p95_ms={64: 9999})
    for measured in (bench(accepted=False), None):
        checks = check_budget("phone", budget, 1, measured)
        assert [c.verdict for c in checks] == ["pass", "not measured", "not measured"]
        ruling = judged(quality=evaluation("pass"), budget=checks)
        assert (ruling.ships, ruling.code) == (False, ExitCode.UNAVAILABLE)
    over = check_budget("phone", Budget(file_mb=1), 2_000_000, None)
    assert judged(quality=evaluation("pass"), budget=over).code is ExitCode.BUDGET_NOT_MET


@pytest.mark.parametrize(
    ("own", "judge", "combined"),
    [
        ("underpowered", "pass", "pass"),
        ("pass", "fail", "fail"),
        ("fail", "pass", "fail"),
        ("pass", "underpowered", "underpowered"),
    ],
)
def test_the_format_that_ran_the_suite_decides_and_a_sample_can_only_overrule_by_failing(
    own: Verdict, judge: Verdict, combined: Verdict
) -> None:
    found = combine_quality(evaluation(own), evaluation(judge))
    assert found is not None
    assert found.verdict == combined


def artifact(rung: str, size_bytes: int) -> ArtifactReport:
    return ArtifactReport(
        rung=rung,
        format="gguf",
        runtime="r",
        path="p",
        size_bytes=size_bytes,
        weight_bytes=1,
        parameters=1,
        bits_per_weight=8.0,
        verification=None,
        evaluation=None,
        bench=None,
        budget=[],
        shippable=False,
        why_not=None,
    )


RECIPE = Recipe.model_validate(
    {
        "name": "n",
        "student": "s",
        "context_tokens": 8,
        "rungs": {"big": [], "mid": [], "low": []},
        "targets": {"phone": {"format": "gguf"}, "desk": {"format": "gguf", "rungs": ["big"]}},
    }
)
ARTIFACTS = [artifact("big", 300), artifact("low", 100), artifact("mid", 200)]


def test_a_target_ships_its_smallest_passing_rung_whatever_the_others_failed_at() -> None:
    passes, fails = Ruling(True, ExitCode.OK), Ruling(False, ExitCode.FLOOR_NOT_MET, "too low")
    rulings = {
        ("phone", r, "gguf"): v for r, v in [("big", passes), ("mid", passes), ("low", fails)]
    }
    rulings["desk", "big", "gguf"] = passes
    judgements, codes = judge_targets(RECIPE, ARTIFACTS, rulings)
    assert [(j.target, j.rung) for j in judgements] == [("phone", "mid"), ("desk", "big")]
    assert codes == []


def test_a_target_without_a_rung_gives_every_reason_and_the_worst_code() -> None:
    low, unsure = ExitCode.FLOOR_NOT_MET, ExitCode.UNDERPOWERED
    rulings = {
        ("phone", "big", "gguf"): Ruling(False, unsure, "the suite cannot decide"),
        ("phone", "mid", "gguf"): Ruling(False, low, "too low"),
        ("phone", "low", "gguf"): Ruling(False, low, "too low"),
    }
    (judgement,), codes = judge_targets(RECIPE, ARTIFACTS, rulings)
    assert judgement.rung is None
    assert judgement.reason == "low, mid: too low; big: the suite cannot decide"
    assert codes == [ExitCode.FLOOR_NOT_MET]


def test_a_crash_outranks_every_verdict_and_unavailable_only_success() -> None:
    assert worst([]) is ExitCode.OK
    assert worst([ExitCode.FLOOR_NOT_MET, ExitCode.STAGE_FAILED]) is ExitCode.STAGE_FAILED
    assert worst([ExitCode.OK, ExitCode.UNAVAILABLE]) is ExitCode.UNAVAILABLE
    assert worst([ExitCode.UNAVAILABLE, ExitCode.UNDERPOWERED]) is ExitCode.UNDERPOWERED
