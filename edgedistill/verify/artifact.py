"""Hold an artifact's own bytes, in its own runtime, against the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgedistill.errors import StageError
from edgedistill.plugins import load_plugin, load_runtime
from edgedistill.progress import progress_bar
from edgedistill.results import Check, TextDivergence, Verification
from edgedistill.session import Agreement, Session
from edgedistill.student import Student
from edgedistill.verify.cache import check_cache
from edgedistill.verify.divergence import AdapterEffect, Divergence, log_softmax
from edgedistill.verify.golden import make_golden
from edgedistill.verify.judge import (
    LONG,
    TWO_TURNS,
    JudgedStretches,
    JudgedText,
    read_judge_logits,
    read_judge_stretches,
)
from edgedistill.verify.lint import lint_artifact
from edgedistill.verify.long_positions import check_positions
from edgedistill.verify.rounding import fit_agreement
from edgedistill.verify.text import check_text

# Nearest to 1, where 0 is an adapter that is not there and 2 one that was merged twice.  What
# rounding itself takes from the effect is reported, and judged on the suite: 0.71 at 4 bits (demo).
ADAPTER_EFFECT_RANGE = (0.5, 1.5)
CHUNK_TOKENS = 64


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
    pruned: bool = False,
    kv_cache_bits: int | None = None,
) -> Verification:
    """Check that an artifact is the model that we think it is.

    Args:
        artifact: its directory.
        format_name: of the exporter that wrote it; names the runtime.
        student: the student it was exported from (weights, tokenizer, template).
        weights_judge: judge's log-probabilities on that student's weights, dequantized.
        reference_judge: on the reference, in the tokens of that student; so is ``base_judge``.
        base_judge: on the student before adapters were merged; None when there are none.
        context_tokens: what the artifact claims.
        threads: for the runtime.
        pruned: parts were taken out of the student, and some of the adapter's effect with them; so
            the artifact has to show what the student's own weights still show of it in float32.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.
    """
    runtime = load_runtime(load_plugin("exporters", format_name).runtime, kv_cache_bits)
    of_runtime = runtime.agreement(Student(student).is_quantized)
    agreement = fit_agreement(of_runtime, weights_judge)
    weights, reference = read_judge_logits(weights_judge), read_judge_logits(reference_judge)
    base = read_judge_logits(base_judge) if base_judge else None
    long = _read_long(weights_judge, context_tokens)
    _check_same_ids(weights, reference, *([base] if base else []))
    with runtime.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        own, other, effect = _read_texts(session, weights, reference, base)
        turns = read_judge_stretches(weights_judge, TWO_TURNS)
        checks = _check_logits(own, agreement, of_runtime)
        checks += check_cache(session, weights[0], turns, agreement)
        if long is not None:
            checks.append(check_positions(session, long, agreement))
        checks += check_text(session, artifact, student)
        golden = make_golden(session, student)
    checks += lint_artifact(artifact, format_name, student, context_tokens=context_tokens)
    if effect is not None and base is not None:
        left = _adapter_left(weights, reference, base) if pruned else 1.0
        checks.append(_check_adapter(effect, left))
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
            told = {"removed_mass": reference[number].removed_mass}
            other.append(to_reference.summary().model_copy(update=told))
    return own, other, effect


def _check_logits(
    texts: list[TextDivergence], agreement: Agreement, standard: Agreement
) -> list[Check]:
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
            f"at token {worst.worst_position}{_told(agreement, standard)}",
        ),
        Check(
            name="logits: top-1",
            passed=top1 >= agreement.top1,
            value=top1,
            limit=agreement.top1,
            detail=f"share of {tokens} positions with the judge's most probable token",
        ),
    ]


def _told(agreement: Agreement, standard: Agreement) -> str:
    """Why the limit is wider than the runtime's own."""
    if agreement.kl_mean <= standard.kl_mean:
        return ""
    cost = agreement.kl_mean / agreement.times
    return (
        f"; the limit is wider than {standard.kl_mean:g} because {agreement.rounding} activations "
        f"alone move this model by {cost:.2g} or more"
    )


def _read_long(judge: Path, context_tokens: int) -> JudgedStretches | None:
    long = read_judge_stretches(judge, LONG)
    if long is not None and len(long.ids) > context_tokens:
        raise StageError(
            f"the judge read a prompt of {len(long.ids)} tokens, the artifact claims a context of "
            f"{context_tokens}",
            where=str(judge),
        )
    return long


def _adapter_left(
    weights: list[JudgedText], reference: list[JudgedText], base: list[JudgedText]
) -> float:
    """The share of the adapter's effect that the rung's own weights show in float32."""
    effect = AdapterEffect()
    for own, other, before in zip(weights, reference, base, strict=True):
        for start in range(0, len(own.ids), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_probs = own.log_probs[rows].astype(np.float64)
            effect.add(before.log_probs[rows], other.log_probs[rows], log_probs)
    return effect.share


def _check_adapter(effect: AdapterEffect, left: float) -> Check:
    low, high = sorted(limit * left for limit in ADAPTER_EFFECT_RANGE)
    pruning = "" if left == 1.0 else f"; pruning left {left:.2f} of it"
    return Check(
        name="adapter: effect retained",
        passed=low <= effect.share <= high,
        value=effect.share,
        limit=low,
        detail=f"share of the logit shift, base to reference; between {low:.3g} and {high:.3g}"
        f"{pruning}",
    )
