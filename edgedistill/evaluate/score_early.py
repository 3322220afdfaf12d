"""Score cases with an artifact until the verdict is decided.

The reference's scores are there already, so the judge can look while the artifact is still at
work: a bad rung is stopped after some hundred cases, a good one when its floor is certain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgedistill.chat import Chat
from edgedistill.evaluate.matching import check_clauses_fit, match_reference
from edgedistill.evaluate.pairing import pair_scores
from edgedistill.evaluate.prompts import render_prompts
from edgedistill.evaluate.score import (
    Score,
    read_scores,
    refuse_other_tokens,
    score_cases,
    write_scores,
)
from edgedistill.evaluate.stopping import STOPPING_FILE, Sampling, Stopping, look_sizes
from edgedistill.evaluate.suite import Case, load_suite
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plugins import load_runtime

Scores = dict[str, Score]


def score_until_decided(
    artifact: Path,
    runtime: str,
    student: Path,
    suite: Sequence[Path],
    reference: Path,
    dst: Path,
    *,
    floor: Floor | None,
    slices: Mapping[str, SliceSpec],
    chat: Chat,
    threads: int,
    context_tokens: int,
    kv_cache_bits: int | None = None,
) -> None:
    """Score as many cases as the verdict takes.

    Writes what :func:`score_artifact` writes, and ``dst/stopping.json``, by which the comparison
    knows how often it was looked at.

    Args:
        artifact: a directory that the runtime opens.
        runtime: file name of the runtime, without ``.py``.
        student: its tokenizer and chat template make the prompts.
        suite: JSONL files.
        reference: directory with the reference's scores of the whole suite.
        dst: an empty directory.
        floor: on all cases.
        slices: the capability spec.
        chat: the fixed part of the conversation.
        threads: of the runtime.
        context_tokens: what the artifact claims.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        InputError: a damaged suite, artifact or student; the reference's scores are of another
            suite; a case that does not fit the context.
        UsageError: there is no such runtime.
        UnavailableError: it is not installed.
        StageError: the artifact's logits are not finite.
    """
    cases = load_suite(suite)
    reference_scores = read_scores(reference)
    match_reference(cases, reference_scores, reference)
    check_clauses_fit(cases, floor, slices)
    prompts = {p.id: p for p in render_prompts(student, cases, chat, context_tokens=context_tokens)}
    program = load_runtime(runtime, kv_cache_bits)
    started = time.monotonic()
    with program.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        refuse_other_tokens(session, student)

        def score(batch: Sequence[Case]) -> Scores:
            asked = [prompts[case.id] for case in batch]
            return score_cases(session, batch, asked, student, chat)

        scores, stopping = sample(cases, reference_scores, score, floor=floor, slices=slices)
    scored = [case for case in cases if case.id in scores]
    write_scores(dst, scored, scores, seconds=time.monotonic() - started)
    (dst / STOPPING_FILE).write_text(stopping.model_dump_json() + "\n", encoding="utf-8")


def sample(
    cases: Sequence[Case],
    reference: Mapping[str, Score],
    score: Callable[[Sequence[Case]], Mapping[str, Score]],
    *,
    floor: Floor | None,
    slices: Mapping[str, SliceSpec],
) -> tuple[Scores, Stopping]:
    """Ask ``score`` for the scores of some cases at a time, until the verdict is decided.

    A failure ends it at once.  A pass is completed by the slices that are scored in full.
    """
    sampling = Sampling.of(cases, reference, floor, slices)
    scores: Scores = {}
    looks: list[int] = []
    for size in look_sizes(len(cases)):
        scores |= score([cases[i] for i in sampling.order[len(scores) : size]])
        looks.append(size)
        scored = sampling.order[:size]
        pairs = pair_scores([cases[i] for i in scored], reference, scores)
        verdict = sampling.verdict(pairs, scored, looks)
        if verdict is not None:
            break
    if verdict == "pass":
        scores |= score([cases[i] for i in sampling.rest(looks[-1])])
    order = [cases[i].id for i in sampling.order[: looks[-1]]]
    return scores, Stopping(order=order, looks=looks)
