"""An artifact's scores against the reference's: quality by slice, flips, the floor's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill.errors import InputError
from edgedistill.evaluate.capabilities import Measured, measure
from edgedistill.evaluate.judge import judge
from edgedistill.evaluate.score import SCORES_FILE, LogProbs, read_scores, read_seconds
from edgedistill.evaluate.statistics import Pairs, cross_entropy, macro_f1
from edgedistill.evaluate.stopping import Sampling, read_stopping
from edgedistill.evaluate.suite import ALL_CASES, Case, load_suite
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import Evaluation, Flip, SliceQuality

SHOWN_FLIPS = 50
SHOWN_CHARACTERS = 1000  # of a flip's prompt
SCORE_AGAIN = "score this suite again: it is not the one that was scored"


def compare(
    suite: Sequence[Path],
    reference: Path,
    artifact: Path,
    *,
    floor: Floor | None,
    slices: Mapping[str, SliceSpec],
    runtime: str,
    out: Path,
) -> None:
    """Write the :class:`Evaluation` of an artifact as JSON.

    Where the artifact was scored on a sample, everything is on the sampled cases, the reference's
    figures included.

    Args:
        suite: JSONL files, the ones that were scored.
        reference: directory with the reference's ``scores.jsonl``; all cases of the artifact.
        artifact: directory with the artifact's.
        floor: on all cases; without it and ``slices`` the verdict is ``unjudged``.
        slices: the capability spec.
        runtime: that scored the artifact.
        out: the file to write.

    Raises:
        InputError: the scores do not belong to the suite, or a slice of the spec is not in it.
    """
    cases = load_suite(suite)
    scores = read_scores(artifact)
    scored = _match(cases, scores, artifact)
    reference_scores = read_scores(reference)
    match_reference(scored, reference_scores, reference)
    _check_spec(cases, slices)
    pairs = pair_scores(scored, reference_scores, scores)
    stopping = read_stopping(artifact)
    if stopping is None:
        measured = _measure_slices(scored, pairs)
    else:
        match_reference(cases, reference_scores, reference)
        whole = pair_scores(cases, reference_scores, reference_scores)
        sampling = Sampling(cases, whole, floor, slices)
        measured = sampling.measure_stopped(pairs, [case.id for case in scored], stopping)
    checks, verdict = judge(measured, floor, slices)
    evaluation = Evaluation(
        cases=len(scored),
        cases_in_suite=len(cases),
        runtime=runtime,
        slices=[_measure(name, found) for name, found in measured.items()],
        floor=checks,
        flips=_flips(scored, pairs),
        verdict=verdict,
        seconds=read_seconds(artifact),
        stopped_early=stopping is not None and len(scored) < len(cases),
    )
    out.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")


def pair_scores(
    cases: Sequence[Case], reference: Mapping[str, LogProbs], artifact: Mapping[str, LogProbs]
) -> Pairs:
    """What both models answer, and their cross-entropy, on the same cases.

    The answer is the choice with the largest score, the first of equals.
    """
    labels = [_label(case) for case in cases]
    return Pairs(
        weights=np.array([case.weight for case in cases]),
        answers=np.array([case.answer for case in cases]),
        reference=np.array([int(reference[case.id].argmax()) for case in cases]),
        artifact=np.array([int(artifact[case.id].argmax()) for case in cases]),
        reference_loss=_losses(cases, reference, labels),
        artifact_loss=_losses(cases, artifact, labels),
    )


def _label(case: Case) -> LogProbs:
    if case.soft_label is not None:
        return np.array(case.soft_label)
    certain = np.zeros(len(case.choices))
    certain[case.answer] = 1.0
    return certain


def _losses(
    cases: Sequence[Case], scores: Mapping[str, LogProbs], labels: Sequence[LogProbs]
) -> LogProbs:
    return np.array(
        [cross_entropy(scores[c.id], label) for c, label in zip(cases, labels, strict=True)]
    )


def _match(cases: Sequence[Case], scores: Mapping[str, LogProbs], directory: Path) -> list[Case]:
    """The cases that were scored, in suite order."""
    where = str(directory / SCORES_FILE)
    unknown = sorted(set(scores) - {case.id for case in cases})
    if unknown or not scores:
        what = f"case {unknown[0]} is not in the suite" if unknown else "holds no case"
        raise InputError(what, where=where, hint=SCORE_AGAIN)
    scored = [case for case in cases if case.id in scores]
    _check_choices(scored, scores, where)
    return scored


def match_reference(cases: Sequence[Case], scores: Mapping[str, LogProbs], directory: Path) -> None:
    """Make sure that the reference scored these cases.

    Raises:
        InputError: one of them is missing, or has other choices.
    """
    where = str(directory / SCORES_FILE)
    missing = [case.id for case in cases if case.id not in scores]
    if missing:
        raise InputError(
            f"case {missing[0]} was not scored by the reference", where=where, hint=SCORE_AGAIN
        )
    _check_choices(cases, scores, where)


def _check_choices(cases: Sequence[Case], scores: Mapping[str, LogProbs], where: str) -> None:
    for case in cases:
        if len(scores[case.id]) != len(case.choices):
            raise InputError(
                f"case {case.id} has {len(scores[case.id])} scores for {len(case.choices)} choices",
                where=where,
                hint=SCORE_AGAIN,
            )


def _check_spec(cases: Sequence[Case], slices: Mapping[str, SliceSpec]) -> None:
    known = {name for case in cases for name in case.slices}
    missing = sorted(set(slices) - known)
    if missing:
        raise InputError(
            f"no case of the suite is in the slice {missing[0]!r}",
            hint=f"the suite has {', '.join(sorted(known)) or 'no slices'}",
        )


def _measure_slices(cases: Sequence[Case], pairs: Pairs) -> dict[str, Measured]:
    """Slice -> what was measured; ``all`` first, then by name."""
    members = [frozenset(case.slices) for case in cases]
    measured = {ALL_CASES: measure(pairs)}
    for name in sorted(frozenset[str]().union(*members)):
        measured[name] = measure(pairs.select(np.array([name in m for m in members])))
    return measured


def _measure(name: str, measured: Measured) -> SliceQuality:
    pairs, found, intervals = measured.pairs, measured.values, measured.intervals
    return SliceQuality(
        slice=name,
        cases=pairs.count,
        score=float(found.score),
        score_interval=intervals["score"],
        reference_score=float(found.reference_score),
        retention=float(found.retention),
        retention_interval=intervals["retention"],
        log_score=float(np.average(pairs.artifact_loss, weights=pairs.weights)),
        log_score_loss=float(found.log_score_loss),
        log_score_loss_interval=intervals["log_score_loss"],
        macro_f1=macro_f1(pairs.answers, pairs.artifact, pairs.weights),
        broken=float(found.broken),
        broken_cases=int(pairs.broken.sum()),
        fixed_cases=int(pairs.fixed.sum()),
    )


def _flips(cases: Sequence[Case], pairs: Pairs) -> list[Flip]:
    """Up to ``SHOWN_FLIPS``: broken before fixed, the heaviest first."""
    flipped = np.flatnonzero(pairs.broken | pairs.fixed).tolist()
    order = sorted(flipped, key=lambda i: (not pairs.broken[i], -pairs.weights[i], cases[i].id))
    return [
        Flip(
            id=cases[i].id,
            prompt=_question(cases[i]),
            expected=cases[i].choices[cases[i].answer],
            reference_answer=cases[i].choices[pairs.reference[i]],
            artifact_answer=cases[i].choices[pairs.artifact[i]],
            slices=list(cases[i].slices),
            kind="broken" if pairs.broken[i] else "fixed",
        )
        for i in order[:SHOWN_FLIPS]
    ]


def _question(case: Case) -> str:
    """The last message, cut where it is long."""
    text = case.messages[-1].content
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
