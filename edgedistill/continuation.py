"""Text that a student writes itself while it is trained, for its teacher to judge.

On given text a student never sees what its own mistakes lead to.  Generalized Knowledge
Distillation (Agarwal et al. 2024, arXiv 2306.13649; MiniLLM, Gu et al. 2024, arXiv 2306.08543)
therefore trains it on samples of its own, with the teacher's distribution at every place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgedistill.decoder_forward import Past
from edgedistill.learner import Learner
from edgedistill.on_policy import AT_ONCE, given_tokens
from edgedistill.training_text import TrainingText


@torch.no_grad()
def continued(
    student: Learner, text: TrainingText, rows: Sequence[int], numbers: Sequence[int], seed: int
) -> TrainingText:
    """Some sequences, of which the student writes the second half as it would now.

    Each is sampled at temperature 1 with random numbers of its own, so that a run which goes on
    from a checkpoint writes the same.  A token that ends a turn ends nothing: text is packed, and
    another turn follows.  Where answers are in the new half is not known; the places that predict
    it share alike the weight of those that they replace.

    Args:
        student: as it is at this moment.
        text: to begin from; it is left as it is.
        rows: which sequences of it.
        numbers: of each among all sequences that are read in the run, counted from 0.
        seed: of the run.

    Returns:
        The sequences in the order of ``rows``, with ``given`` stated.
    """
    ids, weights = text.ids[list(rows)], text.weights[list(rows)]
    given = given_tokens(ids.shape[1])
    room = ids.shape[1] - given
    draws = np.stack([np.random.default_rng((seed, number)).random(room) for number in numbers])
    parts = zip(
        torch.split(ids[:, :given], AT_ONCE),
        torch.split(torch.from_numpy(draws).to(ids.device), AT_ONCE),
        strict=True,
    )
    written = torch.cat([_write(student, *part) for part in parts])
    # The last place that is given predicts the first that is not.
    weights[:, given - 1 :] = weights[:, given - 1 :].mean(1, keepdim=True)
    return TrainingText(written, weights, given=given)


def _write(student: Learner, ids: Tensor, draws: Tensor) -> Tensor:
    """Write behind ids [sequences, given], a token for each of draws [sequences, places]."""
    total = ids.shape[1] + draws.shape[1]
    # Read once, not for every place.
    blocks = [
        (student.read_block(layer), Past(student.facts, len(ids), total, student.device))
        for layer in range(student.facts.layers)
    ]
    written = [ids]
    for draw in draws.unbind(1):
        hidden = student.embed(written[-1])
        for weights, past in blocks:
            hidden = student.through(weights, hidden, past=past)
        written.append(_sample(student.head(hidden[:, -1]), draw)[:, None])
    return torch.cat(written, 1)


def _sample(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens by their probabilities, through the inverse of what they sum up to.

    Args:
        logits: [sequences, vocab].
        draws: float64 [sequences], even in [0, 1).

    Returns:
        int64 [sequences].
    """
    reached = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
    return found[:, 0].clamp(max=logits.shape[-1] - 1)  # nothing is reached by what is no number
