"""An artifact's scores against the reference's: quality by slice, flips, the floor's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgedistill.beside import Beside
from edgedistill.evaluate.describe import describe
from edgedistill.evaluate.fields import measure_fields
from edgedistill.evaluate.flips import list_choice_flips, list_flips
from edgedistill.evaluate.judge import judge
from edgedistill.evaluate.matching import (
    check_clauses_fit,
    check_slices,
    match_reference,
    match_scores,
)
from edgedistill.evaluate.pairing import pair_scores, pair_texts
from edgedistill.evaluate.previous import CASES_FILE, write_cases
from edgedistill.evaluate.quality import measure_slices, select_texts, slice_qualities
from edgedistill.evaluate.router import QUEUE_FILE, write_queue
from edgedistill.evaluate.score import log_probs_of, read_scores, read_seconds
from edgedistill.evaluate.stopping import Sampling, read_stopping
from edgedistill.evaluate.suite import ChoiceCase, TextCase, load_suite
from edgedistill.evaluate.text_judge import judge_texts
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import Evaluation


def compare(
    suite: Sequence[Path],
    reference: Path,
    artifact: Path,
    *,
    floor: Floor | None,
    slices: Mapping[str, SliceSpec],
    runtime: str,
    out: Path,
    beside: Beside | None = None,
) -> None:
    """Write the :class:`Evaluation` of an artifact as JSON.

    Beside it go ``cases.jsonl``, for the next release to compare with, and ``queue.jsonl``, the
    cases below the router's threshold, where there is one.

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
        beside: what else is asked for; None asks for nothing.

    Raises:
        InputError: the scores do not belong to the suite, or a slice of the spec is not in it.
    """
    cases = load_suite(suite)
    scores = read_scores(artifact)
    scored = match_scores(cases, scores, artifact)
    reference_scores = read_scores(reference)
    match_reference(scored, reference_scores, reference)
    check_slices(cases, slices)
    check_clauses_fit(cases, floor, slices)
    asked = [case for case in scored if not isinstance(case, TextCase)]
    texts = [case for case in scored if isinstance(case, TextCase)]
    pairs = pair_scores(asked, reference_scores, scores)
    stopping = read_stopping(artifact)
    if stopping is None:
        measured = measure_slices(asked, pairs)
    else:
        match_reference(cases, reference_scores, reference)
        sampling = Sampling.of(cases, reference_scores, floor, slices)
        measured = sampling.measure_stopped(pairs, [case.id for case in asked], stopping)
    read = select_texts(texts, pair_texts(texts, reference_scores, scores))
    checks, verdict = judge(measured, floor, slices, judge_texts(read, floor, slices))
    evaluation = Evaluation(
        cases=len(scored),
        cases_in_suite=len(cases),
        runtime=runtime,
        slices=slice_qualities(measured, read),
        floor=checks,
        flips=list_flips(asked, pairs, reference_scores, scores),
        verdict=verdict,
        seconds=read_seconds(artifact),
        stopped_early=stopping is not None and len(scored) < len(cases),
        fields=measure_fields(scored, reference_scores, scores),
    )
    # Cases that were scored for the sake of small slices would shift what is said of all.
    drawn = set(stopping.order) if stopping is not None else set(scores)
    chosen = [case for case in scored if isinstance(case, ChoiceCase) and case.id in drawn]
    own, other = log_probs_of(reference_scores), log_probs_of(scores)
    evaluation = describe(evaluation, chosen, own, other, beside or Beside(), list_choice_flips)
    write_cases(scored, out.parent / CASES_FILE)
    if evaluation.router is not None and evaluation.router.threshold is not None:
        write_queue(chosen, other, evaluation.router.threshold, out.parent / QUEUE_FILE)
    out.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
