"""The processes that train together, each on a device of its own; mostly one, on the CPU.

Each holds all weights and takes a share of every batch; gradients are added up before a step, so
that all take the same one (data parallelism).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from edgedistill.decoder_forward import CPU

Item = TypeVar("Item")


@dataclass(frozen=True)
class Team:
    """What one process knows of it; by default it is alone.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """Whether this process writes what all have come to."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of them falls to this process: each falls to exactly one."""
        return items[self.rank :: self.size]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put into each tensor the sum of all processes' own, which is the same in all of them."""
        if self.size == 1:
            return
        pending = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in pending:
            work.wait()

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.add_up([tensor])
        return float(tensor)


ALONE = Team()
