"""The decoder of :mod:`edgedistill.decoder_forward` with weights in memory, some to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder_forward import CPU, BlockWeights
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
        device: where they are.
    """

    def __init__(
        self,
        student: Student,
        trained: Trained,
        rank: int = 16,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(student, device)
        shapes = self.facts.tensor_shapes()
        self._weights = {name: super(TrainableDecoder, self)._tensor(name) for name in shapes}
        self._factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        if trained == "lora":
            generator = torch.Generator().manual_seed(seed)
            for layer in range(self.facts.layers):
                for short, name in self.facts.linears(layer).items():
                    a, b = _factors(shapes[name], rank, generator)
                    a, b = (factor.to(device).requires_grad_() for factor in (a, b))
                    self._factors[layer, short] = a, b
        else:
            for weight in self._weights.values():
                weight.requires_grad_(trained == "full" or weight.ndim == 1)

    def trained(self) -> list[Tensor]:
        """The leaves that gradients reach, always in the same order."""
        whole = [weight for weight in self._weights.values() if weight.requires_grad]
        return whole + [factor for pair in self._factors.values() for factor in pair]

    def merged(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Every tensor as it computes now, products added in."""
        places = {self.facts.linears(place[0])[place[1]]: place for place in self._factors}
        for name, weight in self._weights.items():
            values = weight.detach()
            if name in places:
                a, b = self._factors[places[name]]
                values = values + (b @ a).detach()
            yield name, values.cpu().numpy()

    def _linear(self, weights: BlockWeights, short: str, x: Tensor) -> Tensor:
        """Beside the matrix its product, one factor after the other.

        Added to the matrix first, it would take the gradient of the whole matrix to train it.
        """
        out = super()._linear(weights, short, x)
        if (weights.layer, short) not in self._factors:
            return out
        a, b = self._factors[weights.layer, short]
        return out + functional.linear(functional.linear(x, a), b)

    def _tensor(self, name: str) -> Tensor:
        return self._weights[name]


def _factors(
    shape: tuple[int, ...], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [rank, columns], as a linear layer is initialized, and B [rows, rank] of zeros."""
    rows, columns = shape
    a = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
    return a, torch.zeros(rows, rank)
