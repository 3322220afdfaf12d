"""The live state of a training run, saved as it is: a killed run goes on to equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from edgedistill.errors import StageError
from edgedistill.healing_results import HealingPoint

STATE_FILE = "state.pt"


@dataclass
class DistillState:
    """Where a run is.

    Attributes:
        curve: its points, the first before the first step.
        step: steps of the optimizer that were taken.
        losses: of the steps since the last point.
        learning_rate: of the last step.
        best: the trained tensors at the least held-out KL; None where it never fell.
        best_step: at which that was.
        stale: evaluations since then.
    """

    curve: list[HealingPoint]
    step: int = 0
    losses: tuple[float, ...] = ()
    learning_rate: float = 0.0
    best: list[Tensor] | None = None
    best_step: int = 0
    stale: int = 0

    @property
    def best_kl(self) -> float:
        """The least held-out KL."""
        return min(point.held_out_kl for point in self.curve)

    def took(self, loss: float, learning_rate: float) -> None:
        """Count a step with its mean loss a token."""
        self.step += 1
        self.losses = (*self.losses, loss)
        self.learning_rate = learning_rate

    def measured(self, kl: float, tokens: int, parameters: Sequence[Tensor]) -> None:
        """Add a point; remember the parameters if it is the lowest."""
        if kl < self.best_kl:
            self.best = [parameter.detach().clone() for parameter in parameters]
            self.best_step, self.stale = self.step, 0
        else:
            self.stale += 1
        self.curve.append(
            HealingPoint(
                step=self.step,
                tokens=tokens,
                learning_rate=self.learning_rate,
                loss=sum(self.losses) / len(self.losses),
                held_out_kl=kl,
            )
        )
        self.losses = ()

    def save(
        self, work: Path | None, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Write everything that the next step depends on, aside and renamed."""
        if work is None:
            return
        aside = work / f"{STATE_FILE}.new"
        torch.save(
            {
                "curve": [point.model_dump() for point in self.curve],
                "step": self.step,
                "learning_rate": self.learning_rate,
                "best": self.best,
                "best_step": self.best_step,
                "stale": self.stale,
                "parameters": [parameter.detach() for parameter in parameters],
                "optimizer": optimizer.state_dict(),
            },
            aside,
        )
        aside.rename(work / STATE_FILE)

    @classmethod
    def load(
        cls, work: Path | None, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> DistillState | None:
        """Put parameters and optimizer back to where a run was; None where there was none.

        Raises:
            StageError: what is there is damaged.
        """
        if work is None or not (work / STATE_FILE).exists():
            return None
        try:
            saved = torch.load(work / STATE_FILE, weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise StageError(
                f"its checkpoint cannot be read ({error})",
                where=str(work / STATE_FILE),
                hint="delete it; healing then starts from the beginning",
            ) from error
        with torch.no_grad():
            for parameter, value in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        return cls(
            curve=[HealingPoint.model_validate(point) for point in saved["curve"]],
            step=saved["step"],
            learning_rate=saved["learning_rate"],
            best=saved["best"],
            best_step=saved["best_step"],
            stale=saved["stale"],
        )
