"""Bits per byte of an artifact and its reference on the same texts, with a paired interval."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgedistill.evaluate.statistics import CONFIDENCE, Bools, Floats, bootstrap_sums
from edgedistill.results import Interval

LEAST_TEXTS = 10


@dataclass(frozen=True)
class TextPairs:
    """What two models make of the same n texts; all arrays are [n].

    Attributes:
        weights: positive.
        sizes: of the texts, in bytes.
        reference: bits per byte of the reference; ``artifact`` likewise.
    """

    weights: Floats
    sizes: Floats
    reference: Floats
    artifact: Floats

    @property
    def count(self) -> int:
        """The number of texts."""
        return len(self.weights)

    def select(self, chosen: Bools) -> TextPairs:
        """The pairs of some texts."""
        return replace(self, **{name: values[chosen] for name, values in vars(self).items()})

    def bits_per_byte(self) -> tuple[float, float]:
        """Of the reference and the artifact: all bits / all bytes, weighted by text."""
        bytes_of_each = self.weights * self.sizes
        total = bytes_of_each.sum()
        return (
            float(bytes_of_each @ self.reference / total),
            float(bytes_of_each @ self.artifact / total),
        )

    def loss(self) -> float:
        """The artifact's bits per byte minus the reference's."""
        reference, artifact = self.bits_per_byte()
        return artifact - reference

    def loss_interval(self) -> Interval:
        """95% interval of :meth:`loss`.

        A percentile bootstrap over texts, both models resampled together.  One text says nothing
        of how texts differ: its interval is unbounded.
        """
        if self.count < 2:
            return Interval(low=-np.inf, high=np.inf)
        tail = (1.0 - CONFIDENCE) / 2.0
        low, high = np.quantile(self._resampled_losses(), [tail, 1.0 - tail])
        return Interval(low=float(low), high=float(high))

    def loss_p_value(self) -> float:
        """One-sided, of "the artifact needs no more bits": the share of resamples where it is so.

        Of few texts the bootstrap says too much; fewer than ``LEAST_TEXTS`` give 1.
        """
        if self.count < LEAST_TEXTS:
            return 1.0
        losses = self._resampled_losses()
        return float(1 + np.count_nonzero(losses <= 0.0)) / (1 + len(losses))

    def _resampled_losses(self) -> Floats:
        """float64 [resamples]."""
        bytes_of_each = self.weights * self.sizes
        columns = np.stack([bytes_of_each, bytes_of_each * (self.artifact - self.reference)], 1)
        total, bits = np.moveaxis(bootstrap_sums(columns), -1, 0)
        losses: Floats = bits / total
        return losses
