"""Distances between next-token distributions, accumulated chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgedistill.results import TextDivergence

Doubles = npt.NDArray[np.float64]

# Two tokens that the judge holds this near to each other are a tie, which any rounding decides.
TIE_NATS = 0.01


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    """float32 [..., vocab] -> float64 log-probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalized: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def kl_divergence(judge: npt.NDArray[np.float32], artifact: Doubles) -> Doubles:
    """KL(judge || artifact) in nats: log-probabilities [n, vocab] twice -> float64 [n].

    An artifact that gives NaN is infinitely far away.
    """
    own = judge.astype(np.float64)
    kl: Doubles = (np.exp(own) * (own - artifact)).sum(axis=-1)
    return np.where(np.isnan(kl), np.inf, kl)


@dataclass
class Divergence:
    """Collects one text's distances to one judge."""

    text: str
    kl: list[Doubles] = field(default_factory=list)
    same_top: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, judge: npt.NDArray[np.float32], artifact: Doubles) -> None:
        """Take in a chunk: log-probabilities [n, vocab] of both."""
        self.kl.append(kl_divergence(judge, artifact))
        chosen = np.take_along_axis(judge, artifact.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        self.same_top.append(chosen >= judge.max(axis=-1) - TIE_NATS)

    def summary(self) -> TextDivergence:
        """Mean, 99th percentile, maximum and its position, and top-1 agreement."""
        kl, same = np.concatenate(self.kl), np.concatenate(self.same_top)
        return TextDivergence(
            text=self.text,
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99, method="higher")),
            kl_max=float(kl.max()),
            worst_position=int(kl.argmax()),
            top1=float(same.mean()),
        )


@dataclass
class AdapterEffect:
    """How much of the adapter's effect on the log-probabilities an artifact shows.

    The shift of reference against base is projected out of the shift of artifact against base:
    1 when the artifact moved as the reference did, 0 when the adapter is not in it, 2 when twice.
    """

    along: float = 0.0
    whole: float = 0.0

    def add(
        self,
        base: npt.NDArray[np.float32],
        reference: npt.NDArray[np.float32],
        artifact: Doubles,
    ) -> None:
        """Take in a chunk: log-probabilities [n, vocab] of all three.

        Weighted by the reference's probabilities, so that the tail's noise does not drown it.
        """
        weight = np.exp(reference.astype(np.float64))
        shift = reference.astype(np.float64) - base
        shift -= (weight * shift).sum(axis=-1, keepdims=True)
        self.along += float((weight * shift * (artifact - base)).sum())
        self.whole += float((weight * shift * shift).sum())

    @property
    def share(self) -> float:
        """The share of the effect that is there."""
        return self.along / self.whole if self.whole > 0 else float("nan")
