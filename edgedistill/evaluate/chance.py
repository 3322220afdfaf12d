"""How much of what the reference knows beyond guessing an artifact has kept.

Plain retention flatters: with five choices an artifact that knows nothing still "retains" a third
of a reference that is right in 60%.  Taking the guesses off both sides, as Cohen's kappa does for
one rater (Cohen 1960), gives

    (score - chance) / (reference score - chance)

where chance is the score of picking one of a case's choices at random, 1 / (number of choices).
"""

from __future__ import annotations

import numpy as np

from edgedistill.document import Estimate
from edgedistill.evaluate.choices import Choices
from edgedistill.evaluate.resampled import Figure, effective_weight, shares_of
from edgedistill.evaluate.statistics import Floats


def chance_score(choices: Choices) -> float:
    """The weighted score of one who picks at random."""
    return float(np.average(choices.chance, weights=choices.weights))


def retention_figure(choices: Choices) -> Figure:
    """Retention above chance, with one unseen broken and one unseen fixed case."""
    weights, chance = choices.weights, choices.chance
    columns = np.stack(
        [weights * (choices.artifact_right - chance), weights * (choices.reference_right - chance)],
        axis=1,
    )
    guessed, weight = chance_score(choices), effective_weight(weights)
    missed, found = -guessed * weight, (1.0 - guessed) * weight
    unseen = np.array([[missed, found], [found, missed]])
    return Figure(columns, _retention, unseen)


def _retention(sums: Floats) -> Floats:
    return shares_of(sums[..., 0], sums[..., 1], 1.0)


def lead_figure(choices: Choices) -> Figure:
    """The reference's score minus chance: what there is to retain."""
    weights = choices.weights
    lead = weights * (choices.reference_right - choices.chance)
    columns = np.stack([lead, weights], axis=1)
    return Figure(columns, lambda sums: shares_of(sums[..., 0], sums[..., 1], 0.0))


def retention_above_chance(retention: Estimate, lead: Estimate) -> Estimate | None:
    """The estimate; None unless the whole interval of the reference's lead is above 0.

    A quotient by something that may be 0 has no interval worth the name.
    """
    return retention if lead.interval.low > 0.0 else None
