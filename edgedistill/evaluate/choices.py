"""What two models think of the choices of the same cases: distributions, confidence, KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgedistill.choice_results import ChoiceDivergence
from edgedistill.document import Estimate
from edgedistill.evaluate.resampled import Figure, shares_of
from edgedistill.evaluate.score import LogProbs
from edgedistill.evaluate.statistics import Bools, Floats
from edgedistill.evaluate.suite import ChoiceCase

RARE = 0.01  # of the traffic lies beyond the 99th percentile


@dataclass(frozen=True)
class Choices:
    """n cases of the kind ``choice`` as two models see them; all arrays are [n].

    Attributes:
        ids: of the cases.
        weights: positive.
        chance: the chance of guessing right, 1 / number of choices.
        reference_right: whether the reference's answer is right; ``artifact_right`` likewise.
        reference_confidence: its largest probability; ``artifact_confidence`` likewise.
        divergence: KL(reference || artifact) over the choices, in nats.
    """

    ids: npt.NDArray[np.str_]
    weights: Floats
    chance: Floats
    reference_right: Bools
    artifact_right: Bools
    reference_confidence: Floats
    artifact_confidence: Floats
    divergence: Floats

    @property
    def count(self) -> int:
        """The number of cases."""
        return len(self.weights)

    def select(self, chosen: Bools) -> Choices:
        """Some of the cases."""
        return replace(self, **{name: values[chosen] for name, values in vars(self).items()})


def weigh_choices(
    cases: Sequence[ChoiceCase], reference: Mapping[str, LogProbs], artifact: Mapping[str, LogProbs]
) -> Choices:
    """Both models on the same cases.

    Args:
        cases: of the kind ``choice``, at least one.
        reference: case id -> float64 [choices], scores in nats; ``artifact`` likewise.
    """
    own = [choice_log_probs(reference[case.id]) for case in cases]
    other = [choice_log_probs(artifact[case.id]) for case in cases]
    answers = np.array([case.answer for case in cases])
    return Choices(
        ids=np.array([case.id for case in cases]),
        weights=np.array([case.importance for case in cases]),
        chance=np.array([1.0 / len(case.choices) for case in cases]),
        reference_right=np.array([row.argmax() for row in own]) == answers,
        artifact_right=np.array([row.argmax() for row in other]) == answers,
        reference_confidence=np.array([np.exp(row.max()) for row in own]),
        artifact_confidence=np.array([np.exp(row.max()) for row in other]),
        divergence=np.array([choice_divergence(p, q) for p, q in zip(own, other, strict=True)]),
    )


def choice_log_probs(scores: LogProbs) -> LogProbs:
    """float64 [choices]: log-probabilities of the softmax over the choices' scores."""
    shifted = scores - scores.max()
    normalized: LogProbs = shifted - np.log(np.exp(shifted).sum())
    return normalized


def choice_divergence(own: LogProbs, other: LogProbs) -> float:
    """KL(own || other) in nats, of two rows of log-probabilities; rounding does not make it < 0."""
    return max(0.0, float((np.exp(own) * (own - other)).sum()))


def divergence_figure(choices: Choices) -> Figure:
    """The weighted mean KL."""
    weights = choices.weights
    columns = np.stack([weights * choices.divergence, weights], axis=1)
    return Figure(columns, lambda sums: shares_of(sums[..., 0], sums[..., 1], 0.0))


def describe_divergence(choices: Choices, mean: Estimate) -> ChoiceDivergence:
    """The document, given the estimate of the mean."""
    order = np.argsort(choices.divergence, kind="stable")
    beyond = choices.weights.sum() - np.cumsum(choices.weights[order])
    p99 = int(np.argmax(beyond <= RARE * choices.weights.sum()))
    worst = int(choices.divergence.argmax())
    return ChoiceDivergence(
        mean=mean,
        p99=float(choices.divergence[order[p99]]),
        max=float(choices.divergence[worst]),
        worst_case=str(choices.ids[worst]),
    )
