"""Files that others made, held against a student: the same model, or only rounded, or something
else?

A file of another quantization is not the student's equal, so two questions are asked apart.
*Does it compute what its own weights say?*  That is structure: RoPE, norms, tokenizer, row order;
nothing there excuses a difference.  *How far are its weights from the reference's?*  That is
rounding, which is measured, and held to what rounding at its width is known to cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import InputError, StageError
from edgedistill.plugins import load_plugin
from edgedistill.progress import progress_bar
from edgedistill.results import Check, TextDivergence, Verification
from edgedistill.session import Agreement, Runtime, Session
from edgedistill.student import Student
from edgedistill.verify.divergence import Divergence, kl_divergence, log_softmax
from edgedistill.verify.judge import JudgedText, read_judge_logits
from edgedistill.verify.lint import lint_stated, read_stated
from edgedistill.verify.own_weights import FLOATS, LOSS_FILE, WeightLoss
from edgedistill.verify.stated import Stated
from edgedistill.verify.subject import Subject, as_artifact
from edgedistill.verify.tokenizer import check_tokenizer

# What rounding alone may cost: bits per weight -> mean KL to the reference, in nats a token.
# About twice what llama.cpp's own types cost SmolLM2-135M with weights that lie on no grid:
# Q8_0 .006, Q4_K_M .064 (6.3 bits on its shapes), Q4_0 .42.  Larger models lose less.
LOSS_LIMITS = ((15.0, 5e-3), (7.5, 0.03), (6.0, 0.15), (4.0, 1.0), (3.0, 3.0))
# A file whose logits are this near is the same function, however its weights are scaled.
SAME_FUNCTION = 0.02
FLOAT_KL, LEAST_TOP1 = 1e-3, 0.9
# Rounding to 2 bits leaves a correlation of .9; a permuted or swapped matrix has none.
LEAST_CORRELATION = 0.5
# Vectors are not quantized; bfloat16 moves them by 0.4 %.
LARGEST_VECTOR_ERROR = 0.01
CACHE_TOKENS, CACHE_STEPS = 48, 24
# Token by token against all at once, in one runtime: kernels differ, weights do not.
CACHE_KL = 0.05
MOST_CONTEXT = 2048


@dataclass(frozen=True)
class Judges:
    """What the file is held against.

    Attributes:
        student: the reference's directory.
        reference: ``transformers`` float32 on the reference.
        own: on the file's own weights under the reference's config; None where they cannot be read.
        loss: the file's weights against the reference's.
    """

    student: Path
    reference: list[JudgedText]
    own: list[JudgedText] | None = None
    loss: WeightLoss | None = None

    @classmethod
    def read(cls, student: Path, reference: Path, own: Path | None, weights: Path | None) -> Judges:
        """From the outputs of the steps that made them."""
        loss = None
        if weights is not None:
            loss = WeightLoss.model_validate_json((weights / LOSS_FILE).read_bytes())
        judged = read_judge_logits(own) if own is not None else None
        return cls(student, read_judge_logits(reference), judged, loss)


def verify_foreign(subject: Subject, judges: Judges, *, threads: int) -> Verification:
    """Check a file that edgedistill did not make.

    Args:
        subject: the file.
        judges: the student, and the judge's log-probabilities.
        threads: for the runtime.

    Raises:
        InputError: the file is damaged beyond its header.
        UnavailableError: its runtime is not installed.
    """
    name = load_plugin("exporters", subject.format).runtime
    runtime: Runtime = load_plugin("runtimes", name)()
    with as_artifact(subject) as artifact:
        stated = read_stated(artifact, subject.format)
        if stated is None:
            raise InputError(f"no reader for the format {subject.format}", where=str(artifact))
        longest = max(len(text.ids) for text in judges.reference)
        claimed = stated.context_tokens or 0
        context_tokens = min(claimed, longest) if claimed > 0 else longest
        try:
            session = _open(runtime, subject, artifact, context_tokens, threads)
        except (InputError, StageError) as error:
            return _unloadable(stated, subject, judges, str(error), runtime)
        with session:
            return _verify(session, artifact, stated, subject, judges, runtime)


def _open(
    runtime: Runtime, subject: Subject, artifact: Path, context_tokens: int, threads: int
) -> Session:
    """Our own convention where the file follows it; other ONNX graphs by their own inputs."""
    if subject.format == "onnx":
        from edgedistill.verify.onnx_foreign import ForeignOnnxSession, graph_file, is_ours

        if not is_ours(graph_file(artifact)):
            return ForeignOnnxSession(artifact, context_tokens=context_tokens, threads=threads)
    return runtime.open(artifact, context_tokens=context_tokens, threads=threads)


def _verify(
    session: Session,
    artifact: Path,
    stated: Stated,
    subject: Subject,
    judges: Judges,
    runtime: Runtime,
) -> Verification:
    ends = getattr(session, "eos_ids", frozenset())
    checks = [*lint_stated(stated, judges.student, subject.format, also_ends=ends)]
    checks += _claims(stated, judges.student)
    notes = [runtime.limitation] if runtime.limitation else []
    own: list[TextDivergence] = []
    reference: list[TextDivergence] = []
    if session.vocab_size != judges.reference[0].log_probs.shape[-1]:
        rows = judges.reference[0].log_probs.shape[-1]
        detail = f"{session.vocab_size} logits, the reference has {rows}"
        checks.append(Check(name="logits: as its weights", passed=False, detail=detail))
    else:
        own, reference = _read_texts(session, judges)
        checks += _logits(own, reference, judges, runtime)
        checks.append(_cache(session, judges.reference[0].ids))
    if subject.format != "coreml" or (artifact / "tokenizer.json").is_file():
        checks.append(check_tokenizer(session, artifact, judges.student))
    else:
        notes.append("there is no tokenizer beside the package: none was compared")
    if judges.own is None and subject.format == "gguf":
        notes.append("its weights could not be read one by one: they were not compared")
    return Verification(
        checks=checks,
        against_weights=own,
        against_reference=reference,
        settings=runtime.settings(),
        limitation="; ".join(notes) or None,
    )


def _unloadable(
    stated: Stated, subject: Subject, judges: Judges, error: str, runtime: Runtime
) -> Verification:
    checks = [*lint_stated(stated, judges.student, subject.format)]
    checks += _claims(stated, judges.student)
    checks.append(Check(name="file: loads in its runtime", passed=False, detail=error))
    return Verification(
        checks=checks, against_weights=[], against_reference=[], settings=runtime.settings()
    )


def _claims(stated: Stated, student: Path) -> list[Check]:
    """What others may choose for themselves, but not beyond what the model can do."""
    checks = []
    config = Student(student).config
    if stated.context_tokens is not None:
        longest = int(config["max_position_embeddings"])
        checks.append(
            Check(
                name="lint: context length",
                passed=0 < stated.context_tokens <= longest,
                value=float(stated.context_tokens),
                limit=float(longest),
                detail="tokens that it claims, and that the model was made for",
            )
        )
    if stated.tied_embeddings is not None:
        tied = bool(config.get("tie_word_embeddings", False))
        # A tied matrix may be stored twice; a head of its own cannot be left out.
        found = "tied" if stated.tied_embeddings else "a head of its own"
        expected = "tied" if tied else "a head of its own"
        passed = tied or not stated.tied_embeddings
        detail = found if found == expected else f"{found}, the reference: {expected}"
        checks.append(Check(name="lint: tied embeddings", passed=passed, detail=detail))
    return checks


def _read_texts(
    session: Session, judges: Judges
) -> tuple[list[TextDivergence], list[TextDivergence]]:
    """One pass over the texts: distances to the file's own weights, and to the reference."""
    to_own, to_reference = [], []
    total = sum(min(len(t.ids), session.context_tokens) for t in judges.reference)
    with progress_bar(total, "verifying logits") as bar:
        for number, judged in enumerate(judges.reference):
            pairs = [(judged, Divergence(judged.name))]
            if judges.own is not None:
                pairs.append((judges.own[number], Divergence(judged.name)))
            session.reset()
            start = 0
            for logits in session.stream_logits(judged.ids[: session.context_tokens]):
                log_probs = log_softmax(logits)
                for text, divergence in pairs:
                    divergence.add(text.log_probs[start : start + len(logits)], log_probs)
                start += len(logits)
                bar.advance(len(logits))
            to_reference.append(pairs[0][1].summary())
            to_own += [divergence.summary() for _, divergence in pairs[1:]]
    return to_own, to_reference


def _logits(
    own: list[TextDivergence],
    reference: list[TextDivergence],
    judges: Judges,
    runtime: Runtime,
) -> list[Check]:
    """Structure first, then the loss; where own weights are unknown, the loss alone."""
    checks = []
    loss = judges.loss
    total = _mean(reference, "kl_mean")
    if own:
        quantized = loss is None or any(t.stored not in FLOATS for t in loss.tensors.values())
        agreement = runtime.quantized_agreement if quantized else Agreement(FLOAT_KL, LEAST_TOP1)
        worst = max(own, key=lambda t: t.kl_max)
        kl, top1 = _mean(own, "kl_mean"), _mean(own, "top1")
        where = f"worst {worst.kl_max:.2g} in {worst.text!r} at token {worst.worst_position}"
        checks += [
            Check(
                name="logits: as its weights",
                passed=kl <= agreement.kl_mean,
                value=kl,
                limit=agreement.kl_mean,
                detail=f"KL to its own weights under the reference's config; {where}",
            ),
            Check(
                name="logits: top-1 as its weights",
                passed=top1 >= LEAST_TOP1,
                value=top1,
                limit=LEAST_TOP1,
                detail="share of positions with the most probable token of its own weights",
            ),
        ]
    if loss is not None:
        checks += _weights(loss, total)
    checks.append(_loss(reference, judges, total))
    return checks


def _weights(loss: WeightLoss, total: float) -> list[Check]:
    """Matrices are like the reference's, vectors are the reference's."""
    same = total <= SAME_FUNCTION
    quantized = {n: t for n, t in loss.tensors.items() if t.stored not in FLOATS}
    matrices = quantized or loss.tensors
    vectors = {n: t for n, t in loss.tensors.items() if "norm" in n or n.endswith(".bias")}
    name, least = min(matrices.items(), key=lambda item: item[1].correlation)
    checks = [
        Check(
            name="weights: like the reference's",
            passed=bool(least.correlation >= LEAST_CORRELATION or same),
            value=least.correlation,
            limit=LEAST_CORRELATION,
            detail=f"least correlation of a matrix, {name} ({least.stored})",
        )
    ]
    if vectors:
        name, most = max(vectors.items(), key=lambda item: item[1].relative_error)
        checks.append(
            Check(
                name="weights: norms and biases",
                passed=bool(most.relative_error <= LARGEST_VECTOR_ERROR or same),
                value=most.relative_error,
                limit=LARGEST_VECTOR_ERROR,
                detail=f"largest relative error of a vector, {name} ({most.stored})",
            )
        )
    return checks


def _loss(reference: list[TextDivergence], judges: Judges, total: float) -> Check:
    """How far the file is from the reference, and how much of that is rounding."""
    worst = max(reference, key=lambda t: t.kl_max)
    top1 = _mean(reference, "top1")
    detail = f"KL, top-1 {top1:.1%}; worst {worst.kl_max:.2g} in {worst.text!r} at token "
    detail += str(worst.worst_position)
    bits = judges.loss.bits_per_weight if judges.loss else None
    if bits is not None:
        detail = f"{bits:.2f} bits per weight; {detail}"
    if judges.own is not None:
        detail += f"; rounding the weights alone costs {rounding_loss(judges):.2g}"
    limit = next((kl for width, kl in LOSS_LIMITS if bits is not None and bits >= width), None)
    if bits is None:
        limit = LOSS_LIMITS[-2][1]
    return Check(
        name="loss: KL to the reference",
        passed=bool(np.isfinite(total) and (limit is None or total <= limit)),
        value=total,
        limit=limit,
        detail=detail,
    )


def rounding_loss(judges: Judges) -> float:
    """Mean KL(reference || own weights), both in ``transformers`` float32: rounding, no runtime."""
    if judges.own is None:
        raise ValueError("the file's own weights were not judged")
    rows: list[Any] = []
    for mine, theirs in zip(judges.own, judges.reference, strict=True):
        for start in range(0, len(mine.ids), 64):
            part = slice(start, start + 64)
            rows.append(kl_divergence(theirs.log_probs[part], mine.log_probs[part].astype(float)))
    return float(np.concatenate(rows).mean())


def _cache(session: Session, ids: list[int]) -> Check:
    """Token by token through the cache against all at once: the file against itself."""
    ids = ids[: min(CACHE_TOKENS, session.context_tokens)]
    start = max(1, len(ids) - CACHE_STEPS)
    session.reset()
    whole = np.concatenate([chunk for chunk in session.stream_logits(ids)])
    session.rewind(start)
    steps = np.stack([session.step(token) for token in ids[start:]])
    judge = log_softmax(whole[start:]).astype(np.float32)
    kl = float(kl_divergence(judge, log_softmax(steps)).mean()) if len(steps) else 0.0
    return Check(
        name="cache: token by token",
        passed=kl <= CACHE_KL,
        value=kl,
        limit=CACHE_KL,
        detail=f"KL to itself all at once, tokens {start} to {len(ids) - 1}",
    )


def _mean(texts: list[TextDivergence], figure: str) -> float:
    tokens = sum(t.tokens for t in texts)
    return sum(float(getattr(t, figure)) * t.tokens for t in texts) / tokens
