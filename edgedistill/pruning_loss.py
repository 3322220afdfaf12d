"""What a pruning cost: the KL to the unpruned student on held-out text of one domain, or of two."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder_forward import DecoderForward
from edgedistill.held_out import Head, mean_kl, other_text, run_blocks
from edgedistill.pruning_results import DomainLoss
from edgedistill.student import Student


def measure_losses(
    before: Path,
    after: Path,
    ids: Tensor,
    *,
    second: Path | None,
    calibration: Calibration,
    chat: Chat,
) -> list[DomainLoss]:
    """KL on the calibration domain, and on the second one where there is a text of it.

    Args:
        before: directory of the student that arrived.
        after: directory of the pruned one.
        ids: int64 [sequences, tokens] of the calibration domain, which nothing was chosen on.
        second: text of another domain; as much of it is read as of the first.
        calibration: how a text is cut into sequences.
        chat: the fixed part of every conversation.

    Raises:
        InputError: the second text cannot be read, or is too short.
    """
    losses = [DomainLoss(domain="calibration", tokens=ids.numel(), kl=_kl(before, after, ids))]
    if second is not None:
        other = other_text(before, second, calibration, chat, tokens=ids.numel())
        kl = _kl(before, after, other)
        losses.append(DomainLoss(domain="second", tokens=other.numel(), kl=kl))
    return losses


def _kl(before: Path, after: Path, ids: Tensor) -> float:
    with torch.inference_mode():
        students = [Student(path) for path in (before, after)]
        heads = [Head(student) for student in students]
        hidden = [_last_hidden(DecoderForward(student), ids) for student in students]
        return mean_kl(heads[0].log_probs, hidden[0], heads[1].log_probs, hidden[1])


def _last_hidden(decoder: DecoderForward, ids: Tensor) -> Tensor:
    return run_blocks(decoder, range(decoder.facts.layers), decoder.embed(ids))
