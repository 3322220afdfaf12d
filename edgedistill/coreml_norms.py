"""The residual stream of a Core ML program and its norms, which have to stay inside float16."""

from __future__ import annotations

import math

import numpy as np

from edgedistill.coreml_ops import NamedOps, Var
from edgedistill.coreml_weights import Weights
from edgedistill.decoder import DecoderFacts

# Float16 ends at 65504.  The streams of Gemma 2 and 3 pass it; this leaves room up to 4.2 million.
SCALED_STREAM = 1 / 64


def stream_scale(facts: DecoderFacts) -> float:
    """What the residual stream is multiplied by in the program: a power of two, exact in float16.

    It is told by the family, so that the bytes depend on the student alone, and not on a text on
    which some peak was measured.  Families that multiply the embedding and norm what they add
    (Gemma) let the stream grow beyond float16; the others keep it well inside.
    """
    return SCALED_STREAM if facts.scaled_embedding and facts.post_norms else 1.0


class Norms:
    """Emits RMSNorms and what they stand between.

    With a stream of ``scale * x`` the function of the decoder stays what it is: embeddings and all
    that is added are multiplied by the scale (where norms are behind a half, their weights are),
    and the norms that read the stream divide it out again, eps included.
    """

    def __init__(self, ops: NamedOps, weights: Weights, facts: DecoderFacts) -> None:
        self._ops = ops
        self._weights = weights
        self._facts = facts
        self._scale = stream_scale(facts)

    def embedded(self, rows: Var) -> Var:
        """Rows of the embedding -> the stream."""
        factor = self._facts.embedding_scale * self._scale
        return rows if factor == 1.0 else self._ops("mul", x=rows, y=np.float16(factor))

    def of_stream(self, stream: Var, name: str) -> Var:
        """The norm ``name`` of the stream, whatever its scale: [..., hidden]."""
        return self._norm(stream, self._weight(name), self._scale)

    def added(self, stream: Var, update: Var, norm: str | None) -> Var:
        """The stream with what a half block adds, through its norm if it has one."""
        factor = self._facts.residual_multiplier * self._scale
        if norm:
            update = self._norm(update, self._weight(norm, factor))
        elif factor != 1.0:
            update = self._ops("mul", x=update, y=np.float16(factor))
        return self._ops("add", x=stream, y=update)

    def of_head(self, x: Var, name: str, factor: float = 1.0) -> Var:
        """The norm of queries or keys, multiplied by a factor."""
        return self._norm(x, self._weight(name, factor))

    def _weight(self, name: str, factor: float = 1.0) -> Var:
        return self._weights.vector(name, offset=self._facts.norm_offset, factor=factor)

    def _norm(self, x: Var, weight: Var, scale: float = 1.0) -> Var:
        """RMSNorm over the last axis, safe in float16: ``x / sqrt(mean(x^2) + eps) * weight``.

        The squares are taken of x / p with p = max(max|x|, sqrt(eps)), so that none leaves [0, 1];
        eps becomes (sqrt(eps) / p)^2, in [0, 1] too, and the root is divided by p at last.
        x itself is never scaled: small values beside a large one keep their precision.
        Of x that comes multiplied by ``scale``, eps is multiplied by its square.
        """
        ops, root_eps = self._ops, np.float16(math.sqrt(self._facts.norm_eps))
        largest = ops("reduce_max", x=ops("abs", x=x), axes=[-1], keep_dims=True)
        peak = ops("maximum", x=largest, y=root_eps)
        small = ops("real_div", x=x, y=peak)
        squares = ops("mul", x=small, y=small)
        mean = ops("reduce_mean", x=squares, axes=[-1], keep_dims=True)
        ratio = ops("real_div", x=root_eps, y=peak)
        if scale != 1.0:  # on the ratio: the root of a scaled eps would be subnormal
            ratio = ops("mul", x=ratio, y=np.float16(scale))
        total = ops("add", x=mean, y=ops("mul", x=ratio, y=ratio))
        inverse = ops("real_div", x=ops("rsqrt", x=total), y=peak)
        return ops("mul", x=ops("mul", x=x, y=inverse), y=weight)
