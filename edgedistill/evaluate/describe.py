"""Everything that is said of the choices beside the floor's figures, added to an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgedistill.beside import Beside
from edgedistill.choice_results import ChoiceQuality, Reliability
from edgedistill.evaluate.against import ListFlips, compare_against
from edgedistill.evaluate.calibration import (
    calibration_figures,
    describe_calibration,
    reliability_curve,
)
from edgedistill.evaluate.chance import (
    chance_score,
    lead_figure,
    retention_above_chance,
    retention_figure,
)
from edgedistill.evaluate.choices import (
    Choices,
    describe_divergence,
    divergence_figure,
    weigh_choices,
)
from edgedistill.evaluate.classes import class_changes
from edgedistill.evaluate.previous import read_previous
from edgedistill.evaluate.resampled import estimate
from edgedistill.evaluate.router import fit_router
from edgedistill.evaluate.score import LogProbs
from edgedistill.evaluate.suite import ALL_CASES, ChoiceCase
from edgedistill.evaluate.teacher import read_teacher
from edgedistill.results import Against, Evaluation, SliceQuality


def describe(
    evaluation: Evaluation,
    cases: Sequence[ChoiceCase],
    reference: Mapping[str, LogProbs],
    artifact: Mapping[str, LogProbs],
    beside: Beside,
    list_flips: ListFlips,
) -> Evaluation:
    """The evaluation with calibration, classes, router, teacher and previous release.

    Args:
        evaluation: of the artifact on ``cases``.
        cases: that were scored, of the kind ``choice``; without any nothing is added.
        reference: case id -> float64 [choices], scores in nats; ``artifact`` likewise.
        beside: what is asked for.
        list_flips: which flips to show, and how.

    Raises:
        InputError: the teacher's file or the previous scores are missing, damaged or foreign.
    """
    if not cases:
        return evaluation
    choices = weigh_choices(cases, reference, artifact)
    members = [frozenset(case.slices) for case in cases]
    router = None
    if beside.router_accuracy is not None:
        router = fit_router(
            cases,
            choices.artifact_confidence,
            choices.artifact_right,
            target_accuracy=beside.router_accuracy,
            runtime=evaluation.runtime,
        )
    update = {
        "slices": [_with_choice(found, choices, members) for found in evaluation.slices],
        "reliability": _reliability(choices),
        "classes": class_changes(
            cases,
            np.array([int(reference[case.id].argmax()) for case in cases]),
            np.array([int(artifact[case.id].argmax()) for case in cases]),
        ),
        "router": router,
        "against": _against(cases, artifact, beside, list_flips),
    }
    return evaluation.model_copy(update=update)


def _with_choice(
    quality: SliceQuality, choices: Choices, members: Sequence[frozenset[str]]
) -> SliceQuality:
    inside = [quality.slice in (ALL_CASES, *member) for member in members]
    if not any(inside):
        return quality
    return quality.model_copy(update={"choice": describe_slice(choices.select(np.array(inside)))})


def describe_slice(choices: Choices) -> ChoiceQuality:
    """The choices of one slice; at least one case."""
    found = estimate(
        {
            "retention": retention_figure(choices),
            "lead": lead_figure(choices),
            "divergence": divergence_figure(choices),
            **calibration_figures(choices),
        }
    )
    return ChoiceQuality(
        cases=choices.count,
        chance=chance_score(choices),
        retention_above_chance=retention_above_chance(found["retention"], found["lead"]),
        calibration=describe_calibration(choices, found),
        divergence=describe_divergence(choices, found["divergence"]),
    )


def _reliability(choices: Choices) -> Reliability:
    weights = choices.weights
    return Reliability(
        reference=reliability_curve(choices.reference_confidence, choices.reference_right, weights),
        artifact=reliability_curve(choices.artifact_confidence, choices.artifact_right, weights),
    )


def _against(
    cases: Sequence[ChoiceCase],
    artifact: Mapping[str, LogProbs],
    beside: Beside,
    list_flips: ListFlips,
) -> list[Against]:
    found = []
    if beside.teacher is not None:
        answers = read_teacher(beside.teacher, cases)
        found.append(compare_against("teacher", "teacher", answers, cases, artifact, list_flips))
    if beside.previous is not None:
        answers = read_previous(beside.previous, cases)
        found.append(
            compare_against(
                beside.previous_name, "previous release", answers, cases, artifact, list_flips
            )
        )
    return found
