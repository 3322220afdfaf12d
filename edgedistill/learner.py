"""A decoder that a training run moves: what :class:`edgedistill.distill.Distillation` trains."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from edgedistill.decoder_forward import DecoderForward


class Learner(DecoderForward, ABC):
    """Holds its weights in memory; gradients reach some of them, or what they are made from."""

    @abstractmethod
    def trained(self) -> list[Tensor]:
        """The tensors that the optimizer moves, always in the same order."""

    def leaves(self) -> list[Tensor]:
        """The tensors that a backward pass leaves gradients on, always in the same order."""
        return self.trained()

    def collect(self) -> None:
        """Carry gradients from the weights to what is trained, before a step of the optimizer."""

    def settle(self) -> None:
        """Make the weights from what is trained, after it was moved or read back."""

    def last_hidden(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] -> [batch, tokens, hidden], what leaves the last block."""
        hidden = self.embed(ids)
        for layer in range(self.facts.layers):
            hidden = self.block(layer, hidden)
        return hidden
