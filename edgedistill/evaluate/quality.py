"""From what was measured to the figures of every slice, as documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgedistill.evaluate.capabilities import Measured, measure
from edgedistill.evaluate.statistics import Bools, Pairs, macro_f1
from edgedistill.evaluate.suite import ALL_CASES, Case, TextCase
from edgedistill.evaluate.text_statistics import TextPairs
from edgedistill.results import Interval, SliceQuality

_NAN = float("nan")
_UNKNOWN = Interval(low=_NAN, high=_NAN)


def measure_slices(cases: Sequence[Case], pairs: Pairs) -> dict[str, Measured]:
    """Slice -> what was measured of the cases that are answered; ``all`` first, then by name."""
    if not cases:
        return {}
    measured = {ALL_CASES: measure(pairs)}
    for name in _slice_names(cases):
        measured[name] = measure(pairs.select(_within(name, cases)))
    return measured


def select_texts(cases: Sequence[TextCase], pairs: TextPairs) -> dict[str, TextPairs]:
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


def slice_qualities(
    measured: Mapping[str, Measured], texts: Mapping[str, TextPairs]
) -> list[SliceQuality]:
    """``all`` first, then by name: what was answered, and what was read."""
    names = {ALL_CASES: None} | dict.fromkeys(sorted({*measured, *texts} - {ALL_CASES}))
    found = []
    for name in names:
        quality = _answered(name, measured[name]) if name in measured else _unanswered(name)
        found.append(_with_texts(quality, texts[name]) if name in texts else quality)
    return found


def _answered(name: str, measured: Measured) -> SliceQuality:
    pairs, found, intervals = measured.pairs, measured.values, measured.intervals
    choices = pairs.select(pairs.is_choice)
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
    return quality


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
