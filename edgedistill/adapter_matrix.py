"""A recovery adapter that is folded in: what few bits lost, learned where there are many.

A low-rank product (Hu et al. 2021, arXiv 2106.09685) is trained beside a matrix on 8 bits and added
to it, on its own grid: no format has to run an adapter, and none stores a byte more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgedistill.decoder_forward import CPU
from edgedistill.quantized import QTensor

# How far from its code towards the edges of what rounds to it a number may start.
DITHER = 0.45


class AdapterMatrix:
    """One matrix with a product ``B A`` added to it, and the weights that are stored of that.

    A change of less than half a step would be lost if every number started on its code.  So each
    starts somewhere in what rounds to its code, drawn evenly: nothing changes at the start, and of
    a small change as many codes move as it takes for their mean to follow.

    Attributes:
        weight: float32 [rows, columns], a leaf of the graph: what is stored.

    Args:
        quantized: where to start; its scales and zero points stay.
        rank: of the product.
        generator: of the start: A as a linear layer is initialized, B at zero.
        device: where all of it is.
    """

    def __init__(
        self,
        quantized: QTensor,
        rank: int,
        generator: torch.Generator,
        device: torch.device = CPU,
    ) -> None:
        self._start = quantized
        rows, columns = quantized.shape
        size = quantized.grid.group_size
        self._groups = (rows, columns // size, size)
        scale, zero = (
            torch.from_numpy(values.astype(np.float32))[..., None].to(device)
            for values in (quantized.scales, quantized.zero_points())
        )
        self._scale, self._zero = scale, zero
        self._first = torch.from_numpy(quantized.codes).to(device)
        a = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
        dither = (torch.rand(rows, columns, generator=generator) * 2 - 1) * DITHER
        self._a = a.to(device).requires_grad_()
        self._b = torch.zeros(rows, rank, device=device, requires_grad=True)
        self._dither = dither.to(device)
        self.weight = torch.empty(rows, columns, device=device, requires_grad=True)
        self.settle()

    def trained(self) -> list[Tensor]:
        """A [rank, columns] and B [rows, rank]."""
        return [self._a, self._b]

    def collect(self) -> None:
        """From the gradient of ``weight``, which is taken away, those of both factors.

        It passes straight through the rounding (Bengio et al. 2013, arXiv 1308.3432).
        """
        gradient = self.weight.grad
        assert gradient is not None  # every matrix takes part in every logit
        with torch.no_grad():
            self._a.grad, self._b.grad = self._b.T @ gradient, gradient @ self._a.T
        self.weight.grad = None

    def settle(self) -> None:
        """Make ``weight`` anew."""
        with torch.no_grad():
            codes = self._codes().view(self._groups)
            torch.mul(codes - self._zero, self._scale, out=self.weight.view(self._groups))

    def quantized(self) -> QTensor:
        """What it is now, under the scales and zero points of the start."""
        codes = self._codes().to(torch.uint8).cpu().numpy()
        return QTensor(self._start.grid, codes, self._start.scales, self._start.zeros)

    def changed_codes(self) -> int:
        """How many codes are others than at the start."""
        return int((self.quantized().codes != self._start.codes).sum())

    def _codes(self) -> Tensor:
        """float32 [rows, columns], whole numbers that the grid has."""
        grid, shape = self._start.grid, self._start.codes.shape
        scale = torch.where(self._scale == 0, 1.0, self._scale)
        moved = ((self._b @ self._a).detach().view(self._groups) / scale).view(shape)
        codes = self._first + (self._dither + moved).round_()
        least = 1 if grid.bits == 8 else 0  # symmetric: -127..127
        stored: Tensor = codes.clamp_(least, grid.max_code)
        return stored
