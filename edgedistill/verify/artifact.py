"""Hold an artifact's own bytes, in its own runtime, against the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgedistill.errors import StageError
from edgedistill.plugins import load_plugin
from edgedistill.progress import progress_bar, track
from edgedistill.results import Check, TextDivergence, Verification
from edgedistill.session import Agreement, Runtime, Session
from edgedistill.student import Student
from edgedistill.verify.divergence import AdapterEffect, Divergence, kl_divergence, log_softmax
from edgedistill.verify.golden import make_golden
from edgedistill.verify.judge import JudgedText, read_judge_logits
from edgedistill.verify.lint import lint_artifact
from edgedistill.verify.tokenizer import check_tokenizer

PROMPT_LENGTHS = (1, 2, 63, 64, 65)
CACHED_STEPS = 32
# A handful of positions scatter more than the mean over a thousand.
FEW_POSITIONS_SLACK = 10.0
# 0 is an adapter that is not there, 2 one that was merged twice.  Coarse rounding pulls the share
# below 1 by itself: 0.67 at 4 bits on the demo student.
ADAPTER_EFFECT_RANGE = (0.5, 1.5)


def verify_artifact(
    artifact: Path,
    format_name: str,
    *,
    student: Path,
    weights_judge: Path,
    reference_judge: Path,
    base_judge: Path | None,
    context_tokens: int,
    threads: int,
) -> Verification:
    """Check that an artifact is the model that we think it is.

    Args:
        artifact: its directory.
        format_name: of the exporter that wrote it; names the runtime.
        student: the student it was exported from (weights, tokenizer, template).
        weights_judge: judge's log-probabilities on that student's weights, dequantized.
        reference_judge: on the reference.
        base_judge: on the student before adapters were merged; None when there are none.
        context_tokens: what the artifact claims.
        threads: for the runtime.
    """
    runtime: Runtime = load_plugin("runtimes", load_plugin("exporters", format_name).runtime)()
    quantized = Student(student).is_quantized
    agreement = runtime.quantized_agreement if quantized else runtime.float_agreement
    weights, reference = read_judge_logits(weights_judge), read_judge_logits(reference_judge)
    base = read_judge_logits(base_judge) if base_judge else None
    _check_same_ids(weights, reference, *([base] if base else []))
    with runtime.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        own, other, effect = _read_texts(session, weights, reference, base)
        checks = [*_check_logits(own, agreement), *_check_cache(session, weights[0], agreement)]
        checks.append(check_tokenizer(session, artifact, student))
        golden = make_golden(session, student)
    checks += lint_artifact(artifact, format_name, student, context_tokens=context_tokens)
    if effect is not None:
        checks.append(_check_adapter(effect))
    return Verification(
        checks=checks,
        against_weights=own,
        against_reference=other,
        settings=runtime.settings(),
        limitation=runtime.limitation,
        golden=golden,
    )


def _check_same_ids(*judges: list[JudgedText]) -> None:
    if any([text.ids for text in judge] != [text.ids for text in judges[0]] for judge in judges):
        raise StageError(
            "the judge's log-probabilities belong to different token ids",
            hint="a chat template that writes today's date does that: fix the date by "
            "chat.template_args, or clear the cache",
        )


def _read_texts(
    session: Session,
    weights: list[JudgedText],
    reference: list[JudgedText],
    base: list[JudgedText] | None,
) -> tuple[list[TextDivergence], list[TextDivergence], AdapterEffect | None]:
    """One pass of the artifact over the texts, measured against all judges at once."""
    effect = AdapterEffect() if base else None
    own, other = [], []
    total = sum(min(len(t.ids), session.context_tokens) for t in weights)
    with progress_bar(total, "verifying logits") as bar:
        for number, judged in enumerate(weights):
            to_weights, to_reference = Divergence(judged.name), Divergence(judged.name)
            session.reset()
            start = 0
            for logits in session.stream_logits(judged.ids[: session.context_tokens]):
                rows = slice(start, start + len(logits))
                log_probs = log_softmax(logits)
                to_weights.add(judged.log_probs[rows], log_probs)
                to_reference.add(reference[number].log_probs[rows], log_probs)
                if effect is not None and base is not None:
                    effect.add(
                        base[number].log_probs[rows], reference[number].log_probs[rows], log_probs
                    )
                start = rows.stop
                bar.advance(len(logits))
            own.append(to_weights.summary())
            other.append(to_reference.summary())
    return own, other, effect


def _check_logits(texts: list[TextDivergence], agreement: Agreement) -> list[Check]:
    tokens = sum(t.tokens for t in texts)
    mean = sum(t.kl_mean * t.tokens for t in texts) / tokens
    top1 = sum(t.top1 * t.tokens for t in texts) / tokens
    worst = max(texts, key=lambda t: t.kl_max)
    return [
        Check(
            name="logits: mean KL",
            passed=mean <= agreement.kl_mean,
            value=mean,
            limit=agreement.kl_mean,
            detail=f"{tokens} tokens; worst {worst.kl_max:.2g} in {worst.text!r} "
            f"at token {worst.worst_position}",
        ),
        Check(
            name="logits: top-1",
            passed=top1 >= agreement.top1,
            value=top1,
            limit=agreement.top1,
            detail=f"share of {tokens} positions with the judge's most probable token",
        ),
    ]


def _check_cache(session: Session, judged: JudgedText, agreement: Agreement) -> list[Check]:
    """Token by token through the cache, prompts of odd lengths, and a rewound cache."""
    ids = judged.ids[: session.context_tokens]
    limit = agreement.kl_mean * FEW_POSITIONS_SLACK

    def distance(position: int, logits: np.ndarray) -> float:
        return float(kl_divergence(judged.log_probs[position], log_softmax(logits)))

    lengths = [n for n in PROMPT_LENGTHS if n <= len(ids)]
    prompts = []
    for length in track(lengths, label="verifying the cache"):
        session.reset()
        prompts.append(distance(length - 1, session.prefill(ids[:length])))
    last = min(lengths[-1] + CACHED_STEPS, len(ids))
    steps = [distance(p, session.step(ids[p])) for p in range(lengths[-1], last)]
    session.rewind(last // 2)
    rewound = [distance(last - 1, session.prefill(ids[last // 2 : last]))]
    return [
        _few("cache: prompt lengths", prompts, limit, f"prompts of {lengths} tokens"),
        _few("cache: token by token", steps, limit, f"tokens {lengths[-1]} to {last - 1}"),
        _few("cache: rewind", rewound, limit, f"back to {last // 2}, then on to {last}"),
    ]


def _few(name: str, distances: list[float], limit: float, detail: str) -> Check:
    mean = float(np.mean(distances)) if distances else 0.0
    return Check(name=name, passed=mean <= limit, value=mean, limit=limit, detail=f"KL, {detail}")


def _check_adapter(effect: AdapterEffect) -> Check:
    low, high = ADAPTER_EFFECT_RANGE
    return Check(
        name="adapter: effect retained",
        passed=low <= effect.share <= high,
        value=effect.share,
        limit=low,
        detail=f"share of the logit shift, base to reference; between {low} and {high}",
    )
