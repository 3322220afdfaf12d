"""GPTQ for the output matrix, which in small students is also the embedding and a fifth of all.

What the head reads is taken from the student as it was, so the matrix can be quantized first, and
the blocks be calibrated on what its rows have become.  A tied matrix is quantized for what the head
makes of it: as an embedding it loses no more than by rounding (docs/compression.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgedistill.decoder_forward import DecoderForward, rms_norm
from edgedistill.gptq import Gptq, GptqSettings, Inputs
from edgedistill.gptq_polish import FloatArray
from edgedistill.held_out import run_blocks
from edgedistill.progress import track
from edgedistill.quantized import Grid, QTensor
from edgedistill.student import Student

ROWS = 8192  # quantized at once: a vocabulary has many, and all errors of a row stay in it


def head_inputs(student: Student, ids: Tensor) -> Inputs:
    """The second moments of what the head reads.

    Args:
        student: a float student.
        ids: int64 [sequences, tokens].
    """
    forward, facts = DecoderForward(student), student.facts
    norm = torch.from_numpy(student.read(facts.final_norm))
    with torch.no_grad():
        layers = track(range(facts.layers), label="what the head reads")
        hidden = run_blocks(forward, layers, forward.embed(ids))
        x = rms_norm(hidden, norm, facts).flatten(0, 1)
        return Inputs((x.T @ x / len(x)).numpy())


def quantize_head(
    weights: FloatArray, grid: Grid, inputs: Inputs, settings: GptqSettings
) -> QTensor:
    """Quantize the output matrix [vocab, hidden], some rows at a time.

    Raises:
        StageError: the inputs are not finite.
    """
    gptq = Gptq(inputs, grid.group_size, settings)
    parts = [
        gptq.quantize(weights[start : start + ROWS], grid) for start in range(0, len(weights), ROWS)
    ]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QTensor(
        grid,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )
