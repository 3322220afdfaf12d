"""What evaluate finds on cases of the kind ``choice`` beyond right and wrong, as documents.

Every share is weighted by the cases' weights.  A model's confidence in a case is the largest
probability of the softmax over the scores of the case's choices.
"""

from __future__ import annotations

from edgedistill.document import Document, Estimate


class Calibration(Document):
    """How far one model's confidence can be believed.

    Attributes:
        confidence: mean confidence.
        ece: expected calibration error over bins of equal mass: the mean distance between a bin's
            confidence and its share of right answers.
        ece_equal_width: the same over 15 bins of equal width in confidence.
        ece_by_chance: what ``ece`` a perfectly calibrated model with these confidences would show
            on so few cases.
        confident_wrong: share of *all* cases that are answered wrong with a confidence of at least
            ``CalibrationChange.confident_from``.
    """

    confidence: float
    ece: float
    ece_equal_width: float
    ece_by_chance: float
    confident_wrong: float


class CalibrationChange(Document):
    """Calibration of reference and artifact on the same cases.

    Attributes:
        bins: of equal mass; fewer on small slices.
        ece_rise: the artifact's ``ece`` minus the reference's, with a paired interval; the other
            rises likewise.
    """

    bins: int
    confident_from: float
    reference: Calibration
    artifact: Calibration
    ece_rise: Estimate
    ece_equal_width_rise: Estimate
    confident_wrong_rise: Estimate


class ChoiceDivergence(Document):
    """KL(reference || artifact) of the distributions over the choices, in nats a case.

    Attributes:
        mean: weighted.
        p99: the least value that 99% of the traffic does not exceed.
        worst_case: id of the case with the largest KL.
    """

    mean: Estimate
    p99: float
    max: float
    worst_case: str


class ChoiceQuality(Document):
    """The choices of one slice.

    Attributes:
        cases: of the kind ``choice`` in the slice.
        chance: the score of one who picks at random.
        retention_above_chance: (score - chance) / (reference score - chance); None where the
            reference is not significantly better than chance, so that there is nothing to retain.
    """

    cases: int
    chance: float
    retention_above_chance: Estimate | None
    calibration: CalibrationChange
    divergence: ChoiceDivergence


class ReliabilityPoint(Document):
    """One bin of a reliability curve.

    Attributes:
        share: of the weight of all cases.
        confidence: mean of the bin; ``accuracy`` its share of right answers, with Wilson's
            interval on Kish's effective number of cases.
    """

    cases: int
    share: float
    confidence: float
    accuracy: Estimate


class Reliability(Document):
    """The reliability curves of both models over all cases, bins of equal mass, by confidence."""

    reference: list[ReliabilityPoint]
    artifact: list[ReliabilityPoint]


class ClassFigures(Document):
    """One model on one answer.

    Attributes:
        precision: of those that it answers so, the share that is right; None if it never does.
        recall: of the cases where this is right, the share that it finds; None if there are none.
        f1: 2 TP / (2 TP + FP + FN).
    """

    precision: float | None
    recall: float | None
    f1: float


class ClassChange(Document):
    """What became of one answer: ``cases`` have it as their right one."""

    answer: str
    cases: int
    reference: ClassFigures
    artifact: ClassFigures
    f1_change: Estimate


class RouterPoint(Document):
    """What one threshold keeps on the device, on the cases that it was not fitted on."""

    threshold: float
    kept: float
    accuracy: float


class Router(Document):
    """When the app may trust the artifact: answer at or above ``threshold``, else ask elsewhere.

    Attributes:
        confidence: how the app computes what it holds against the threshold.
        runtime: that scored the artifact; other runtimes with the same weights come close.
        threshold: None where no threshold reaches the target on the fitted half.
        kept: share of the traffic that stays on the device, on the other half.
        accuracy: of the artifact on what stays, on the other half.
        accuracy_elsewhere: of the artifact on what does not stay; None where everything stays.
        curve: accuracy against share kept, on the other half.
    """

    target_accuracy: float
    confidence: str
    runtime: str
    threshold: float | None
    cases_fitted: int
    cases_reported: int
    kept: Estimate | None
    accuracy: Estimate | None
    accuracy_elsewhere: float | None
    curve: list[RouterPoint]

    @property
    def refuted(self) -> bool:
        """Whether the other half says that the threshold misses its target."""
        return self.accuracy is not None and self.accuracy.interval.high < self.target_accuracy


class BaselineDivergence(Document):
    """An artifact against a stored baseline, without the reference.

    KL is KL(reference || artifact) in nats, exact on the reference's most probable tokens and with
    one bucket for all others: at most the true KL, which it reaches as ``tail_mean`` goes to 0.

    Attributes:
        baseline: sha256 of the baseline's file.
        worst_case: id of the case with the largest KL.
        tail_mean: the reference's mean probability outside its stored tokens.
        top1: share of positions where both have the same most probable token.
    """

    baseline: str
    cases: int
    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    worst_case: str
    tail_mean: float
    top1: float
