"""An artifact's scores against the reference's: quality by slice, flips, the floor's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill.beside import Beside
from edgedistill.errors import InputError
from edgedistill.evaluate.describe import describe
from edgedistill.evaluate.fields import measure_fields
from edgedistill.evaluate.judge import Measured, judge
from edgedistill.evaluate.pairing import pair_scores, pair_texts
from edgedistill.evaluate.previous import CASES_FILE, write_cases
from edgedistill.evaluate.router import QUEUE_FILE, write_queue
from edgedistill.evaluate.score import (
    SCORES_FILE,
    Answer,
    Score,
    TextBits,
    log_probs_of,
    read_scores,
    read_seconds,
)
from edgedistill.evaluate.statistics import Bools, Pairs, macro_f1, share_intervals, shares
from edgedistill.evaluate.suite import ALL_CASES, Case, ChoiceCase, TextCase, load_suite
from edgedistill.evaluate.text_judge import judge_texts
from edgedistill.evaluate.text_statistics import TextPairs
from edgedistill.floor import Clauses, Floor, SliceSpec
from edgedistill.results import Evaluation, Flip, Interval, SliceQuality

SHOWN_FLIPS = 50
SHOWN_CHARACTERS = 1000  # of a flip's prompt, and of each answer
SCORE_AGAIN = "score this suite again: it is not the one that was scored"
LOG_SCORE = "max_log_score_loss"
_SCORE_OF_KIND = {"choice": np.ndarray, "generate": Answer, "text": TextBits}
_NAN = float("nan")
_UNKNOWN = Interval(low=_NAN, high=_NAN)


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
    scored = _match(cases, scores, artifact)
    reference_scores = read_scores(reference)
    _match_reference(scored, reference_scores, reference)
    _check_spec(cases, slices)
    asked = [case for case in scored if not isinstance(case, TextCase)]
    texts = [case for case in scored if isinstance(case, TextCase)]
    _check_clauses_fit(cases, floor, slices)
    pairs = pair_scores(asked, reference_scores, scores)
    measured = _measure_slices(asked, pairs)
    read = _select_texts(texts, pair_texts(texts, reference_scores, scores))
    checks, verdict = judge(measured, floor, slices, judge_texts(read, floor, slices))
    evaluation = Evaluation(
        cases=len(scored),
        cases_in_suite=len(cases),
        runtime=runtime,
        slices=_qualities(measured, read),
        floor=checks,
        flips=_flips(asked, pairs, reference_scores, scores),
        verdict=verdict,
        seconds=read_seconds(artifact),
        fields=measure_fields(scored, reference_scores, scores),
    )
    chosen = [case for case in scored if isinstance(case, ChoiceCase)]
    own, other = log_probs_of(reference_scores), log_probs_of(scores)
    evaluation = describe(evaluation, chosen, own, other, beside or Beside(), _choice_flips)
    write_cases(scored, out.parent / CASES_FILE)
    if evaluation.router is not None and evaluation.router.threshold is not None:
        write_queue(chosen, other, evaluation.router.threshold, out.parent / QUEUE_FILE)
    out.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _match(cases: Sequence[Case], scores: Mapping[str, Score], directory: Path) -> list[Case]:
    """The cases that were scored, in suite order."""
    where = str(directory / SCORES_FILE)
    unknown = sorted(set(scores) - {case.id for case in cases})
    if unknown or not scores:
        what = f"case {unknown[0]} is not in the suite" if unknown else "holds no case"
        raise InputError(what, where=where, hint=SCORE_AGAIN)
    scored = [case for case in cases if case.id in scores]
    _check_kinds(scored, scores, where)
    return scored


def _match_reference(cases: Sequence[Case], scores: Mapping[str, Score], directory: Path) -> None:
    where = str(directory / SCORES_FILE)
    missing = [case.id for case in cases if case.id not in scores]
    if missing:
        raise InputError(
            f"case {missing[0]} was not scored by the reference", where=where, hint=SCORE_AGAIN
        )
    _check_kinds(cases, scores, where)


def _check_kinds(cases: Sequence[Case], scores: Mapping[str, Score], where: str) -> None:
    """Every score is of its case's kind, and of as many choices."""
    for case in cases:
        score, problem = scores[case.id], None
        if not isinstance(score, _SCORE_OF_KIND[case.kind]):
            problem = f"was not scored as a case of the kind {case.kind!r}"
        elif isinstance(score, np.ndarray) and len(score) != _choices(case):
            problem = f"has {len(score)} scores for {_choices(case)} choices"
        if problem:
            raise InputError(f"case {case.id} {problem}", where=where, hint=SCORE_AGAIN)


def _choices(case: Case) -> int:
    return len(case.choices) if isinstance(case, ChoiceCase) else 0


def _check_clauses_fit(
    suite: Sequence[Case], floor: Floor | None, slices: Mapping[str, SliceSpec]
) -> None:
    """A clause on a figure that no case can give is a mistake, not a pass."""
    rows: dict[str, Clauses] = {**({ALL_CASES: floor} if floor else {}), **slices}
    for name, row in rows.items():
        kinds = {type(case) for case in suite if name in (ALL_CASES, *case.slices)}
        answered = kinds - {TextCase}
        chosen = ChoiceCase in kinds
        unfit = [c for c in row.limits() if not answered or (c == LOG_SCORE and not chosen)]
        if unfit:
            raise InputError(
                f"{unfit[0]} is held on {name!r}, where no case gives it",
                hint="choices give a log-score, choices and answers a score, texts bits per byte",
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
    """Slice -> what was measured of the cases that are answered; ``all`` first, then by name."""
    if not cases:
        return {}
    measured = {ALL_CASES: _measure(ALL_CASES, pairs)}
    for name in _slice_names(cases):
        measured[name] = _measure(name, pairs.select(_within(name, cases)))
    return measured


def _select_texts(cases: Sequence[TextCase], pairs: TextPairs) -> dict[str, TextPairs]:
    """Slice -> its texts; ``all`` first, then by name."""
    if not cases:
        return {}
    return {ALL_CASES: pairs} | {
        name: pairs.select(_within(name, cases)) for name in _slice_names(cases)
    }


def _slice_names(cases: Sequence[Case]) -> list[str]:
    return sorted({name for case in cases for name in case.slices})


def _within(name: str, cases: Sequence[Case]) -> Bools:
    return np.array([name in case.slices for case in cases], dtype=np.bool_)


def _measure(name: str, pairs: Pairs) -> Measured:
    found, intervals = shares(pairs), share_intervals(pairs)
    choices = pairs.select(pairs.is_choice)
    if not choices.count:
        del intervals["log_score_loss"]
    quality = SliceQuality(
        slice=name,
        cases=pairs.count,
        score=float(found.score),
        score_interval=intervals["score"],
        reference_score=float(found.reference_score),
        retention=float(found.retention),
        retention_interval=intervals["retention"],
        log_score=_NAN,
        log_score_loss=_NAN,
        log_score_loss_interval=_UNKNOWN,
        macro_f1=_NAN,
        broken=float(found.broken),
        broken_cases=int(pairs.broken.sum()),
        fixed_cases=int(pairs.fixed.sum()),
    )
    if choices.count:
        chosen = {
            "log_score": float(np.average(choices.artifact_loss, weights=choices.weights)),
            "log_score_loss": float(found.log_score_loss),
            "log_score_loss_interval": intervals["log_score_loss"],
            "macro_f1": macro_f1(choices.answers, choices.artifact, choices.weights),
        }
        quality = quality.model_copy(update=chosen)
    return Measured(pairs, quality, intervals)


def _qualities(
    measured: Mapping[str, Measured], texts: Mapping[str, TextPairs]
) -> list[SliceQuality]:
    """``all`` first, then by name: what was answered, and what was read."""
    names = {ALL_CASES: None} | dict.fromkeys(sorted({*measured, *texts} - {ALL_CASES}))
    found = []
    for name in names:
        quality = measured[name].quality if name in measured else _unanswered(name)
        found.append(_with_texts(quality, texts[name]) if name in texts else quality)
    return found


def _with_texts(quality: SliceQuality, texts: TextPairs) -> SliceQuality:
    reference, artifact = texts.bits_per_byte()
    update = {
        "text_cases": texts.count,
        "bits_per_byte": artifact,
        "reference_bits_per_byte": reference,
        "bits_per_byte_loss": texts.loss(),
        "bits_per_byte_loss_interval": texts.loss_interval(),
    }
    return quality.model_copy(update=update)


def _unanswered(name: str) -> SliceQuality:
    """Of a slice that holds texts alone."""
    return SliceQuality(
        slice=name,
        cases=0,
        score=_NAN,
        score_interval=_UNKNOWN,
        reference_score=_NAN,
        retention=_NAN,
        retention_interval=_UNKNOWN,
        log_score=_NAN,
        log_score_loss=_NAN,
        log_score_loss_interval=_UNKNOWN,
        macro_f1=_NAN,
        broken=_NAN,
        broken_cases=0,
        fixed_cases=0,
    )


def _flips(
    cases: Sequence[Case],
    pairs: Pairs,
    reference: Mapping[str, Score],
    artifact: Mapping[str, Score],
) -> list[Flip]:
    """Up to ``SHOWN_FLIPS``: broken before fixed, the heaviest first."""
    flipped = np.flatnonzero(pairs.broken | pairs.fixed).tolist()
    order = sorted(flipped, key=lambda i: (not pairs.broken[i], -pairs.weights[i], cases[i].id))
    return [
        Flip(
            id=cases[i].id,
            prompt=_cut(cases[i].question),
            expected=_cut(cases[i].expected),
            reference_answer=_cut(_given(cases[i], pairs.reference[i], reference)),
            artifact_answer=_cut(_given(cases[i], pairs.artifact[i], artifact)),
            slices=list(cases[i].slices),
            kind="broken" if pairs.broken[i] else "fixed",
        )
        for i in order[:SHOWN_FLIPS]
    ]


def _choice_flips(cases: Sequence[ChoiceCase], pairs: Pairs) -> list[Flip]:
    """What was chosen stands in the pairs."""
    return _flips(cases, pairs, {}, {})


def _given(case: Case, chosen: int, scores: Mapping[str, Score]) -> str:
    if isinstance(case, ChoiceCase):
        return case.choices[chosen]
    score = scores[case.id]
    return score.text if isinstance(score, Answer) else ""


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
