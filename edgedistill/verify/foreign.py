"""Files that others made, held against a student: in their own runtime, on their own bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedistill.errors import InputError, StageError
from edgedistill.plugins import load_runtime
from edgedistill.progress import progress_bar
from edgedistill.results import Check, TextDivergence, Verification
from edgedistill.session import Runtime, Session
from edgedistill.student import Student
from edgedistill.verify.divergence import Divergence, kl_divergence, log_softmax
from edgedistill.verify.lint import lint_stated, read_stated
from edgedistill.verify.loss import Judges, check_loss, check_structure, check_weights, mean
from edgedistill.verify.stated import Stated
from edgedistill.verify.text import check_text

CACHE_TOKENS, CACHE_STEPS = 48, 24
# Token by token against all at once, in one runtime: kernels differ, weights do not.
CACHE_KL = 0.05
TOKENIZER_OPENS = "tokenizer: opens"


def verify_foreign(
    artifact: Path,
    format_name: str,
    runtime_name: str,
    judges: Judges,
    *,
    threads: int,
    kv_cache_bits: int | None = None,
) -> Verification:
    """Check a file that edgedistill did not make.

    Args:
        artifact: a directory with its files where runtimes look for them.
        format_name: ``gguf``, ``onnx`` or ``coreml``.
        runtime_name: of the plug-in that opens it.
        judges: the student, and the judge's log-probabilities.
        threads: for the runtime.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        InputError: the file is damaged beyond its header.
        UnavailableError: its runtime is not installed.
    """
    runtime = load_runtime(runtime_name, kv_cache_bits)
    stated = read_stated(artifact, format_name)
    if stated is None:
        raise InputError(f"no reader for the format {format_name}", where=str(artifact))
    file = _File(artifact, format_name, stated)
    longest = max(len(text.ids) for text in judges.reference)
    claimed = stated.context_tokens or 0
    context_tokens = min(claimed, longest) if claimed > 0 else longest
    try:
        session = runtime.open(artifact, context_tokens=context_tokens, threads=threads)
    except (InputError, StageError) as error:
        checks = _lint(file, judges, frozenset())
        detail = str(error)
        checks.append(Check(name="file: loads in its runtime", passed=False, detail=detail))
        return Verification(
            checks=checks, against_weights=[], against_reference=[], settings=runtime.settings()
        )
    with session:
        return _verify(session, file, judges, runtime)


@dataclass(frozen=True)
class _File:
    """The artifact's directory, its format, and what it says of itself."""

    artifact: Path
    format: str
    stated: Stated


def _verify(session: Session, file: _File, judges: Judges, runtime: Runtime) -> Verification:
    texts = _check_text(session, file, judges.student)
    checks = _lint(file, judges, _ends(session, file.artifact, texts))
    notes = [runtime.limitation] if runtime.limitation else []
    own: list[TextDivergence] = []
    reference: list[TextDivergence] = []
    rows = judges.reference[0].log_probs.shape[-1]
    if session.vocab_size == rows:
        own, reference = _read_texts(session, judges)
        checks += check_structure(own, judges, runtime)
        if judges.loss is not None:
            checks += check_weights(judges.loss, mean(reference, "kl_mean"))
        checks.append(check_loss(reference, judges, file.stated))
        checks.append(_check_cache(session, judges.reference[0].ids))
    else:
        detail = f"{session.vocab_size} logits, the reference has {rows}"
        checks.append(Check(name="logits: comparable", passed=False, detail=detail))
    checks += texts
    if not texts:
        notes.append("there is no tokenizer beside the weights: none was compared")
    if judges.own is None:
        notes.append("its weights were not read one by one: rounding is not told from structure")
    return Verification(
        checks=checks,
        against_weights=own,
        against_reference=reference,
        settings=runtime.settings(),
        limitation="; ".join(notes) or None,
    )


def _lint(file: _File, judges: Judges, also_ends: frozenset[int]) -> list[Check]:
    """As for our own artifacts, apart from what others may choose for themselves."""
    stated = file.stated
    checks = lint_stated(stated, judges.student, file.format, also_ends=also_ends)
    config = Student(judges.student).config
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
        # A tied matrix may be stored twice; a head of its own cannot be left out.
        tied = bool(config.get("tie_word_embeddings", False))
        words = {True: "tied", False: "a head of its own"}
        found, expected = words[stated.tied_embeddings], words[tied]
        checks.append(
            Check(
                name="lint: tied embeddings",
                passed=tied or not stated.tied_embeddings,
                detail=found if found == expected else f"{found}, the reference: {expected}",
            )
        )
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


def _check_text(session: Session, file: _File, student: Path) -> list[Check]:
    """What the file makes of text; nothing where it comes without a tokenizer."""
    if file.format != "gguf" and not (file.artifact / "tokenizer.json").is_file():
        return []
    try:
        return check_text(session, file.artifact, student)
    except InputError as error:
        return [Check(name=TOKENIZER_OPENS, passed=False, detail=str(error))]


def _ends(session: Session, artifact: Path, texts: list[Check]) -> frozenset[int]:
    """Where its program stops, which may know more ends than the file states."""
    if not texts or texts[0].name == TOKENIZER_OPENS:
        return frozenset()
    return session.text_program(artifact).ends()


def _check_cache(session: Session, ids: list[int]) -> Check:
    """Token by token through the cache against all at once: the file against itself."""
    ids = ids[: min(CACHE_TOKENS, session.context_tokens)]
    start = max(1, len(ids) - CACHE_STEPS)
    session.reset()
    whole = np.concatenate(list(session.stream_logits(ids)))
    session.rewind(min(start, len(ids)))
    steps = [session.step(token) for token in ids[start:]]
    kl = 0.0
    if steps:
        judge = log_softmax(whole[start:]).astype(np.float32)
        kl = float(kl_divergence(judge, log_softmax(np.stack(steps))).mean())
    return Check(
        name="cache: token by token",
        passed=kl <= CACHE_KL,
        value=kl,
        limit=CACHE_KL,
        detail=f"KL to itself all at once, tokens {start} to {len(ids) - 1}",
    )
