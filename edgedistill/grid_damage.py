"""What each grid would cost each matrix: the predicted rise of the KL, in nats a token.

A matrix of a block is quantized on every candidate as it would be (GPTQ on the inputs of the
student as it is, without the compensation that depends on what came before), and the error of its
outputs on text that GPTQ did not see is weighed by how much the logits mind it
(:mod:`edgedistill.output_sensitivity`).  Embedding and head are measured instead: their KL, with
all else as it is.  Memory is one block and the hidden states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder_forward import HALVES, BlockWeights, DecoderForward, Half
from edgedistill.document import Document
from edgedistill.gptq import ROUNDED_FROM_BITS, Gptq, GptqSettings, Inputs
from edgedistill.gptq_head import head_inputs, quantize_head
from edgedistill.gptq_polish import FloatArray
from edgedistill.gptq_student import read_finite, token_batches
from edgedistill.held_out import Head, mean_kl
from edgedistill.output_sensitivity import OutputWeight, output_weights
from edgedistill.progress import progress_bar
from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import round_to_grid
from edgedistill.student import Student

# As the matrices are quantized in the end, but for what would have to be known of the others.
SETTINGS = GptqSettings(compensation=0.0, polish=0)

DAMAGE_FILE = "damage.json"

Watch = Callable[[str, QTensor], None]
Damage = dict[str, dict[Grid, float]]


@dataclass(frozen=True)
class SensitivityText:
    """What is run through the student: text that GPTQ is fitted to, and text to measure on.

    Attributes:
        fitted: int64 [sequences, tokens].
        measured: int64 [sequences, tokens].
    """

    fitted: Tensor
    measured: Tensor


def measure_damage(
    student: Student,
    candidates: Mapping[str, Sequence[Grid]],
    text: SensitivityText,
    scratch: Path,
    seed: int = 0,
    watch: Watch | None = None,
) -> Damage:
    """Matrix -> grid -> predicted mean KL in nats, were it alone quantized.

    Args:
        student: a float student.
        candidates: the grids of every matrix, by the name of its tensor.
        text: calibration text in two parts.
        scratch: a directory for what memory should not hold.
        seed: of the tokens that are drawn.
        watch: shown every matrix as it was quantized.

    Raises:
        InputError: a weight is not finite, or too large for its grid.
        StageError: the hidden states are not finite.
    """
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=scratch) as folder,
        progress_bar(1 + student.facts.layers, "sensitivity of every matrix") as bar,
    ):
        with torch.enable_grad():
            weights = output_weights(student, text.measured, Path(folder), seed)
        bar.advance()
        walk = _Walk(student, candidates, text, weights, watch)
        damage: Damage = {}
        for layer in range(student.facts.layers):
            damage |= walk.block(layer)
            bar.advance()
        return damage | walk.outer()


class _Measured(Document):
    """One matrix on one grid."""

    tensor: str
    grid: Grid
    loss: float


class _AllMeasured(Document):
    measured: list[_Measured]


def write_damage(damage: Damage, work: Path | None) -> None:
    """Keep what was measured, aside and renamed, where a run keeps work."""
    if work is None:
        return
    rows = [
        _Measured(tensor=name, grid=grid, loss=loss)
        for name, grids in damage.items()
        for grid, loss in grids.items()
    ]
    aside = work / f"{DAMAGE_FILE}.new"
    aside.write_text(_AllMeasured(measured=rows).model_dump_json(), encoding="utf-8")
    aside.rename(work / DAMAGE_FILE)


def read_damage(work: Path | None) -> Damage | None:
    """What :func:`write_damage` kept, in its order and to the last bit; None: it did not."""
    if work is None:
        return None
    try:
        kept = _AllMeasured.model_validate_json((work / DAMAGE_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):  # what a power cut left of it is measured anew
        return None
    damage: Damage = {}
    for row in kept.measured:
        damage.setdefault(row.tensor, {})[row.grid] = row.loss
    return damage


class _Walk:
    """The streams of both texts, and one more for each grid of the embedding."""

    def __init__(
        self,
        student: Student,
        candidates: Mapping[str, Sequence[Grid]],
        text: SensitivityText,
        weights: Mapping[str, OutputWeight],
        watch: Watch | None,
    ) -> None:
        self._watch = watch
        self._student, self._facts = student, student.facts
        self._forward = DecoderForward(student)
        self._candidates, self._weights = candidates, weights
        whole = read_finite(student, self._facts.embedding)
        self._fitted = self._embed(whole, text.fitted)
        self._measured = self._embed(whole, text.measured)
        self._embeddings: dict[Grid, QTensor] = {}
        self._embedded: dict[Grid, Tensor] = {}
        self._head_inputs = head_inputs(student, text.fitted)
        for grid in candidates[self._facts.embedding]:
            tied = self._facts.tied_embeddings
            quantized = self._of_head(whole, grid) if tied else round_to_grid(whole, grid)
            self._show(self._facts.embedding, quantized)
            self._embedded[grid] = self._embed(quantized.dequantize(), text.measured)
            if tied:
                self._embeddings[grid] = quantized

    def _embed(self, matrix: FloatArray, ids: Tensor) -> Tensor:
        """What the first block reads: [sequences, tokens, hidden]."""
        return self._forward.scale_embedded(torch.from_numpy(matrix[ids.numpy()]))

    def block(self, layer: int) -> Damage:
        """What the grids would cost the matrices of a block; all streams leave it."""
        names = self._facts.linears(layer)
        damage: Damage = {}
        weights = self._forward.read_block(layer)
        for half in HALVES:
            hessians = [_moments(x) for x in _read(self._forward, half, weights, self._fitted)]
            inputs = _read(self._forward, half, weights, self._measured)
            parts = (half.entry, (half.exit,))
            for shorts, hessian, x in zip(parts, hessians, inputs, strict=True):
                for short in shorts:
                    read_finite(self._student, names[short])
                matrices = {names[s]: weights.linears[s].numpy() for s in shorts}
                damage |= self._of_matrices(matrices, hessian, x)
            self._leave(half, weights)
        return damage

    def _of_matrices(
        self, matrices: Mapping[str, FloatArray], hessian: FloatArray, x: Tensor
    ) -> Damage:
        """What the grids would cost the matrices that read ``x``."""
        factors: dict[int, Gptq] = {}
        damage: Damage = {}
        for name, values in matrices.items():
            damage[name] = {}
            for grid in self._candidates[name]:
                size = grid.group_size
                if grid.bits >= ROUNDED_FROM_BITS:
                    quantized = round_to_grid(values, grid)
                else:
                    if size not in factors:
                        factors[size] = Gptq(Inputs(hessian), size, SETTINGS)
                    quantized = factors[size].quantize(values, grid)
                self._show(name, quantized)
                off = torch.from_numpy(values - quantized.dequantize())
                error = functional.linear(x, off)
                damage[name][grid] = self._weights[name].loss(error)
        return damage

    def _leave(self, half: Half, weights: BlockWeights) -> None:
        for stream in (self._fitted, self._measured, *self._embedded.values()):
            for batch in token_batches(*stream.shape[:2]):
                part = stream[batch]
                x = self._forward.enter(half, weights, part)
                inner = self._forward.inner(half, weights, x)
                part += self._forward.leave(half, weights, inner)

    def outer(self) -> Damage:
        """The measured KL of embedding and head on each of their grids, once all blocks are run."""
        facts, student = self._facts, self._student
        head = Head(student)
        if facts.tied_embeddings:
            tied = {}
            for grid, quantized in self._embeddings.items():
                other = Head(student, quantized.dequantize())
                tied[grid] = self._kl(head, self._embedded[grid], other)
            return {facts.embedding: tied}
        embedding = {g: self._kl(head, hidden, head) for g, hidden in self._embedded.items()}
        whole = read_finite(student, facts.head)
        of_head = {}
        for grid in self._candidates[facts.head]:
            quantized = self._of_head(whole, grid)
            self._show(facts.head, quantized)
            other = Head(student, quantized.dequantize())
            of_head[grid] = self._kl(head, self._measured, other)
        return {facts.embedding: embedding, facts.head: of_head}

    def _show(self, name: str, quantized: QTensor) -> None:
        if self._watch:
            self._watch(name, quantized)

    def _of_head(self, weights: FloatArray, grid: Grid) -> QTensor:
        if grid.bits >= ROUNDED_FROM_BITS:
            return round_to_grid(weights, grid)
        return quantize_head(weights, grid, self._head_inputs, SETTINGS)

    def _kl(self, head: Head, hidden: Tensor, other: Head) -> float:
        return mean_kl(head.log_probs, self._measured, other.log_probs, hidden)


def _read(
    forward: DecoderForward, half: Half, weights: BlockWeights, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """What the half's first matrices read, and what its last one does: [sequences, tokens, n]."""
    entries, inners = [], []
    for batch in token_batches(*hidden.shape[:2]):
        entries.append(forward.enter(half, weights, hidden[batch]))
        inners.append(forward.inner(half, weights, entries[-1]))
    return torch.cat(entries), torch.cat(inners)


def _moments(x: Tensor) -> FloatArray:
    """The mean of ``x x^T``: float32 [columns, columns]."""
    flat = x.flatten(0, -2)
    mean: FloatArray = (flat.T @ flat / len(flat)).numpy()
    return mean
