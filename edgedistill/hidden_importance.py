"""How much each hidden channel carries, by the activations on a text.

Mean |output| of all norms, summed over them (Minitron, arXiv 2407.14679, section 2.2).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.decoder_forward import HALVES, DecoderForward, rms_norm
from edgedistill.held_out import BATCH_TOKENS
from edgedistill.progress import track
from edgedistill.pruned_student import Places
from edgedistill.pruning_results import KeptImportance
from edgedistill.student import Student

Scores = npt.NDArray[np.float64]


@torch.inference_mode()
def hidden_importance(path: Path, ids: Tensor) -> Scores:
    """Score the channels of a student's stream in one streamed pass: float64 [hidden_size].

    Args:
        path: a student directory.
        ids: int64 [sequences, tokens].
    """
    student = Student(path)
    decoder, facts = DecoderForward(student), student.facts
    entries = {half.entry[0] for half in HALVES}
    hidden = torch.zeros(facts.hidden_size, dtype=torch.float64)

    def watch(short: str, x: Tensor) -> None:
        if short in entries:
            hidden.add_(_sum_abs(x))

    parts = list(torch.split(decoder.embed(ids), max(1, BATCH_TOKENS // ids.shape[1])))
    for layer in track(range(facts.layers), label="weighing channels"):
        parts = [decoder.block(layer, part, watch) for part in parts]
    weight = torch.from_numpy(student.read(facts.final_norm))
    for part in parts:
        hidden += _sum_abs(rms_norm(part, weight, facts))
    return (hidden / ids.numel()).numpy()


def largest(scores: Scores, count: int) -> Places:
    """Ascending places of the ``count`` largest; of equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_share(scores: Scores, kept: Places) -> KeptImportance:
    """The share of the scores that stays."""
    share = float(scores[kept].sum() / scores.sum())
    return KeptImportance(what="hidden channels", mean=share, least=share)


def _sum_abs(x: Tensor) -> Tensor:
    """[sequences, tokens, channels] -> float64 [channels]."""
    return x.abs().sum(dim=(0, 1), dtype=torch.float64)
