"""Can the model's confidence be believed: expected calibration error, reliability, bold mistakes.

The expected calibration error is the mean distance, over bins of confidence, between what the
model claims and how often it is right (Guo et al. 2017, arXiv 1706.04599).  Bins of equal mass
have less bias than bins of equal width (Roelofs et al. 2022, arXiv 2012.08668); both are given.
All of it is estimated from few cases, so it is never 0: ``ece_by_chance`` says how much of it a
perfectly calibrated model would show.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgedistill.choice_results import Calibration, CalibrationChange, ReliabilityPoint
from edgedistill.document import Estimate, Interval
from edgedistill.evaluate.choices import Choices
from edgedistill.evaluate.resampled import (
    Figure,
    effective_cases,
    effective_weight,
    shares_of,
)
from edgedistill.evaluate.statistics import Z_CONFIDENCE, Bools, Floats

BINS = 15
CASES_A_BIN = 20  # of equal mass: small slices have fewer bins, down to one
CONFIDENT = 0.9

Bins = npt.NDArray[np.intp]


def equal_mass_bins(confidence: Floats, weights: Floats) -> Bins:
    """The bin of each case, [n], from 0: about as much weight in each; equals stay together."""
    count = _bin_count(len(confidence))
    order = np.argsort(confidence, kind="stable")
    sorted_weights = weights[order]
    middle = (np.cumsum(sorted_weights) - sorted_weights / 2.0) / sorted_weights.sum()
    bins = np.empty(len(confidence), dtype=np.intp)
    bins[order] = np.minimum((middle * count).astype(np.intp), count - 1)
    values, value_of = np.unique(confidence, return_inverse=True)
    lowest = np.full(len(values), count, dtype=np.intp)
    np.minimum.at(lowest, value_of, bins)
    found: Bins = lowest[value_of]
    return found


def equal_width_bins(confidence: Floats) -> Bins:
    """The bin of each case, [n]: ``BINS`` bins of equal width between 0 and 1."""
    found: Bins = np.minimum((confidence * BINS).astype(np.intp), BINS - 1)
    return found


def calibration_figures(choices: Choices) -> dict[str, Figure]:
    """How much worse the artifact is calibrated than the reference, as paired figures."""
    weights = choices.weights
    own, other = choices.reference_confidence, choices.artifact_confidence
    return {
        "ece_rise": _rise(choices, equal_mass_bins(own, weights), equal_mass_bins(other, weights)),
        "ece_equal_width_rise": _rise(choices, equal_width_bins(own), equal_width_bins(other)),
        "confident_wrong_rise": _confident_wrong_rise(choices),
    }


def describe_calibration(choices: Choices, rises: dict[str, Estimate]) -> CalibrationChange:
    """The document, given the estimates of :func:`calibration_figures`."""
    weights = choices.weights
    return CalibrationChange(
        bins=_bin_count(choices.count),
        confident_from=CONFIDENT,
        reference=_calibration(choices.reference_confidence, choices.reference_right, weights),
        artifact=_calibration(choices.artifact_confidence, choices.artifact_right, weights),
        ece_rise=rises["ece_rise"],
        ece_equal_width_rise=rises["ece_equal_width_rise"],
        confident_wrong_rise=rises["confident_wrong_rise"],
    )


def reliability_curve(confidence: Floats, right: Bools, weights: Floats) -> list[ReliabilityPoint]:
    """A point for each bin of equal mass that holds a case, by rising confidence.

    Args:
        confidence: float64 [n], of one model.
        right: bool [n].
        weights: float64 [n].
    """
    bins = equal_mass_bins(confidence, weights)
    points = []
    for number in np.unique(bins):
        inside = bins == number
        mass = weights[inside]
        accuracy = float(np.average(right[inside], weights=mass))
        points.append(
            ReliabilityPoint(
                cases=int(inside.sum()),
                share=float(mass.sum() / weights.sum()),
                confidence=float(np.average(confidence[inside], weights=mass)),
                accuracy=Estimate(value=accuracy, interval=wilson(accuracy, effective_cases(mass))),
            )
        )
    return points


def wilson(share: float, cases: float) -> Interval:
    """The 95% score interval of a share that was seen on so many cases (Wilson 1927)."""
    z2 = Z_CONFIDENCE**2
    middle = (share + z2 / (2.0 * cases)) / (1.0 + z2 / cases)
    spread = share * (1.0 - share) / cases + z2 / (4.0 * cases**2)
    half_width = Z_CONFIDENCE / (1.0 + z2 / cases) * math.sqrt(max(0.0, spread))
    return Interval(
        low=max(0.0, min(share, middle - half_width)),
        high=min(1.0, max(share, middle + half_width)),
    )


def _bin_count(cases: int) -> int:
    return max(1, min(BINS, cases // CASES_A_BIN))


def _calibration(confidence: Floats, right: Bools, weights: Floats) -> Calibration:
    total = weights.sum()
    bins = equal_mass_bins(confidence, weights)
    # The gap of a bin is a sum of independent errors: about normal, whose mean distance from 0 is
    # its standard deviation times sqrt(2 / pi).
    variances = np.bincount(bins, weights=weights**2 * confidence * (1.0 - confidence))
    by_chance = math.sqrt(2.0 / math.pi) * np.sqrt(variances).sum() / total
    bold = (confidence >= CONFIDENT) & ~right
    return Calibration(
        confidence=float(np.average(confidence, weights=weights)),
        ece=_ece(confidence, right, weights, bins),
        ece_equal_width=_ece(confidence, right, weights, equal_width_bins(confidence)),
        ece_by_chance=float(by_chance),
        confident_wrong=float(weights[bold].sum() / total),
    )


def _ece(confidence: Floats, right: Bools, weights: Floats, bins: Bins) -> float:
    gaps = np.bincount(bins, weights=weights * (confidence - right))
    return float(np.abs(gaps).sum() / weights.sum())


def _rise(choices: Choices, own_bins: Bins, other_bins: Bins) -> Figure:
    """ECE of the artifact minus the reference's; bins stay as they are on all cases."""
    weights = choices.weights
    own = _gaps(choices.reference_confidence - choices.reference_right, weights, own_bins)
    other = _gaps(choices.artifact_confidence - choices.artifact_right, weights, other_bins)
    columns = np.concatenate([weights[:, None], own, other], axis=1)
    split = 1 + own.shape[1]

    def rise(sums: Floats) -> Floats:
        before = np.abs(sums[..., 1:split]).sum(axis=-1)
        after = np.abs(sums[..., split:]).sum(axis=-1)
        return shares_of(after - before, sums[..., 0], 0.0)

    return Figure(columns, rise, centred=True)


def _gaps(errors: Floats, weights: Floats, bins: Bins) -> Floats:
    """float64 [n, bins]: each case's weighted error in the column of its bin."""
    columns = np.zeros((len(errors), int(bins.max()) + 1))
    columns[np.arange(len(errors)), bins] = weights * errors
    return columns


def _confident_wrong_rise(choices: Choices) -> Figure:
    weights = choices.weights
    own = (choices.reference_confidence >= CONFIDENT) & ~choices.reference_right
    other = (choices.artifact_confidence >= CONFIDENT) & ~choices.artifact_right
    columns = np.stack([weights, weights * own, weights * other], axis=1)
    weight = effective_weight(weights)
    unseen = weight * np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    return Figure(
        columns, lambda sums: shares_of(sums[..., 2] - sums[..., 1], sums[..., 0], 0.0), unseen
    )
