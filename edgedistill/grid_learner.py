"""A quantized student that learns without leaving its grids: an adapter, or scales.

The adapter is :mod:`edgedistill.adapter_matrix`'s: matrices on 8 bits learn what others lost.
Scales and norms are trained as factors that start at 1 (the end-to-end phase of EfficientQAT, Chen
et al. 2024, arXiv 2407.11062, trains scales alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.adapter_matrix import AdapterMatrix
from edgedistill.decoder_forward import CPU
from edgedistill.errors import InputError
from edgedistill.learner import Learner
from edgedistill.quantized import FOLDED_FROM_BITS, QTensor
from edgedistill.stages.quantize_rtn import shorten
from edgedistill.student import Student

GridTrained = Literal["adapter", "scales"]
FloatArray = npt.NDArray[np.float32]


class ScalesMatrix:
    """One matrix whose scales are trained, and the weights that come of that.

    Attributes:
        weight: float32 [rows, columns], a leaf of the graph.
        factor: float32 [rows, groups], what each scale is multiplied with, less 1.

    Args:
        quantized: where to start; its codes and zero points stay.
        device: where all of it is.
    """

    def __init__(self, quantized: QTensor, device: torch.device = CPU) -> None:
        self._start = quantized
        self._grid = quantized.grid
        rows, columns = quantized.shape
        self._groups = (rows, columns // self._grid.group_size, self._grid.group_size)
        zero, scale = (
            torch.from_numpy(values.astype(np.float32)).to(device)
            for values in (quantized.zero_points(), quantized.scales)
        )
        self._zero, self._scale = zero[..., None], scale
        self._codes = torch.from_numpy(quantized.codes).to(device).view(self._groups)
        self.factor = torch.zeros_like(self._scale, requires_grad=True)
        self.weight = torch.empty(rows, columns, device=device, requires_grad=True)
        self.settle()

    def trained(self) -> list[Tensor]:
        """The factors of its scales."""
        return [self.factor]

    def collect(self) -> None:
        """From the gradient of ``weight``, which is taken away, that of ``factor``."""
        assert self.weight.grad is not None  # every matrix takes part in every logit
        gradient = self.weight.grad.view(self._groups)
        self.weight.grad = None
        self.factor.grad = (gradient * self._steps()).sum(-1) * self._scale

    def settle(self) -> None:
        """Make ``weight`` anew."""
        with torch.no_grad():
            torch.mul(self._steps(), self._stored()[..., None], out=self.weight.view(self._groups))

    def quantized(self) -> QTensor:
        """What it is now: scales as they are stored, codes and zero points of the start."""
        return QTensor(self._grid, self._start.codes, self._storable(), self._start.zeros)

    def changed_codes(self) -> int:
        """None: scales alone move."""
        return 0

    def _steps(self) -> Tensor:
        """Codes less zero points, float32 [rows, groups, group_size]."""
        return self._codes - self._zero

    def _stored(self) -> Tensor:
        """Scales as they are stored, float32 [rows, groups]."""
        return torch.from_numpy(self._storable().astype(np.float32)).to(self._scale.device)

    def _storable(self) -> npt.NDArray[np.float16]:
        scales = (self._scale * (1 + self.factor.detach())).cpu().numpy().astype(np.float16)
        return shorten(scales) if self._grid.zero == "integer" else scales


class _Vector(NamedTuple):
    """A norm or a bias: what it was, what is added to it in use, its trained factor less 1."""

    start: Tensor
    offset: float
    factor: Tensor


class GridLearner(Learner):
    """A quantized student in memory; embedding and head are as they are.

    Args:
        student: its blocks' matrices quantized.
        trained: ``adapter`` (of the matrices on 8 bits), or ``scales``; norms and biases with
            either.
        rank: of the adapter.
        device: where all of it is.

    Raises:
        InputError: there is no matrix that an adapter could be folded into.
    """

    def __init__(
        self,
        student: Student,
        trained: GridTrained,
        rank: int = 16,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(student, device)
        self._matrices: dict[str, ScalesMatrix | AdapterMatrix] = {}
        self._vectors: dict[str, _Vector] = {}
        self._weights: dict[str, Tensor] = {}
        outside = {self.facts.embedding, self.facts.head}
        draw = torch.Generator().manual_seed(0)
        for name, shape in self.facts.tensor_shapes().items():
            grid = student.grids.get(name)
            if grid is None or name in outside:
                self._hold(name, shape)
            elif trained == "scales":
                self._train(name, ScalesMatrix(student.read_quantized(name), device))
            elif grid.bits >= FOLDED_FROM_BITS:
                self._train(name, AdapterMatrix(student.read_quantized(name), rank, draw, device))
            else:
                self._hold(name, shape)
        if not self._matrices:
            raise InputError(
                f"no matrix of the blocks has {FOLDED_FROM_BITS} bits, which an adapter needs",
                where=str(student.path),
                hint="quantize with `linears: {v: {bits: 8}, o: {bits: 8}}`, or train `scales`",
            )

    def _train(self, name: str, matrix: ScalesMatrix | AdapterMatrix) -> None:
        self._matrices[name], self._weights[name] = matrix, matrix.weight

    def _hold(self, name: str, shape: tuple[int, ...]) -> None:
        """As it is, but for vectors, which are trained as factors."""
        values = super()._tensor(name)
        if len(shape) == 1:
            factor = torch.zeros_like(values, requires_grad=True)
            # A norm multiplies by its weight with the offset on it: the factor is of that.
            offset = self.facts.norm_offset if name in self.facts.all_norms() else 0.0
            self._vectors[name] = _Vector(values, offset, factor)
            values = values.clone().requires_grad_()
        self._weights[name] = values

    def trained(self) -> list[Tensor]:
        """Factors of vectors, then what is trained of each matrix."""
        vectors = [vector.factor for vector in self._vectors.values()]
        return vectors + [part for m in self._matrices.values() for part in m.trained()]

    def leaves(self) -> list[Tensor]:
        """Vectors and whole matrices: what is trained of them comes from their gradients."""
        return [
            *(self._weights[n] for n in self._vectors),
            *(self._weights[n] for n in self._matrices),
        ]

    def collect(self) -> None:
        """By the chain rule, from the weights to what is trained."""
        for name, vector in self._vectors.items():
            gradient = self._weights[name].grad
            assert gradient is not None  # every vector takes part in every logit
            vector.factor.grad = gradient * (vector.start + vector.offset)
            self._weights[name].grad = None
        for matrix in self._matrices.values():
            matrix.collect()

    def settle(self) -> None:
        """Make vectors and matrices anew."""
        with torch.no_grad():
            for name, vector in self._vectors.items():
                # Not (start + offset) * (1 + factor) - offset: an untrained vector stays as it is.
                torch.mul(vector.start, 1 + vector.factor, out=self._weights[name])
                self._weights[name] += vector.offset * vector.factor
        for matrix in self._matrices.values():
            matrix.settle()

    def codes(self) -> int:
        """How many there are in the matrices that are trained."""
        return sum(matrix.weight.numel() for matrix in self._matrices.values())

    def changed_codes(self) -> int:
        """How many codes are others than at the start."""
        return sum(matrix.changed_codes() for matrix in self._matrices.values())

    def written(self) -> Iterator[tuple[str, FloatArray | QTensor]]:
        """Every tensor as it is now, quantized ones on their grids."""
        for name in self.student.names():
            if name in self._matrices:
                yield name, self._matrices[name].quantized()
            elif name in self.student.grids:
                yield name, self.student.read_quantized(name)
            else:
                yield name, self._weights[name].detach().cpu().numpy()

    def _tensor(self, name: str) -> Tensor:
        return self._weights[name]
