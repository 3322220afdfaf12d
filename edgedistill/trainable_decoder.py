"""The decoder of :mod:`edgedistill.decoder_forward` with weights in memory, some to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.learner import Learner
from edgedistill.student import Student

Trained = Literal["full", "lora", "norms"]


class TrainableDecoder(Learner):
    """Holds all weights in float32; gradients reach those that are trained.

    Args:
        student: a float student.
        trained: ``full`` (every tensor), ``norms`` (norms and biases), or ``lora`` (a product B A
            beside each matrix of the blocks, Hu et al., arXiv 2106.09685, with alpha = rank).
        rank: of the products.
        seed: of the factors A; the factors B start at zero.
    """

    def __init__(self, student: Student, trained: Trained, rank: int = 16, seed: int = 0) -> None:
        super().__init__(student)
        shapes = self.facts.tensor_shapes()
        self._weights = {name: torch.from_numpy(student.read(name)) for name in shapes}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if trained == "lora":
            generator = torch.Generator().manual_seed(seed)
            for layer in range(self.facts.layers):
                for name in self.facts.linears(layer).values():
                    self._factors[name] = _factors(shapes[name], rank, generator)
        else:
            for weight in self._weights.values():
                weight.requires_grad_(trained == "full" or weight.ndim == 1)

    def trained(self) -> list[Tensor]:
        """The leaves that gradients reach, always in the same order."""
        whole = [weight for weight in self._weights.values() if weight.requires_grad]
        return whole + [factor for pair in self._factors.values() for factor in pair]

    def merged(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Every tensor as it computes now, products added in."""
        for name in self._weights:
            yield name, self._tensor(name).detach().numpy()

    def _tensor(self, name: str) -> Tensor:
        weight = self._weights[name]
        if name in self._factors:
            a, b = self._factors[name]
            weight = weight + b @ a
        return weight


def _factors(
    shape: tuple[int, ...], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [rank, columns], as a linear layer is initialized, and B [rows, rank] of zeros."""
    rows, columns = shape
    a = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
    return a.requires_grad_(), torch.zeros(rows, rank).requires_grad_()
