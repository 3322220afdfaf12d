"""Scores of a decoder's blocks: how little one, or a run of them, turns the hidden states.

Block influence is 1 - cosine of the states before and after a block (ShortGPT, arXiv 2403.03853,
equation 1).  The angular distance of a run is the angle between the states before its first block
and after its last, over pi (Gromov et al., arXiv 2403.17887, equation 7; they look at the last
token alone, here every token counts).  Both propose; neither is reliable enough to decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def block_influence(states: Sequence[Tensor]) -> list[float]:
    """Influence of each block.

    Args:
        states: of a decoder with n blocks n + 1 tensors [sequences, tokens, hidden]: what enters
            each block, and what leaves the last.

    Returns:
        n values, 0 for a block that turns no state, at most 2.
    """
    return [1.0 - float(_cosines(a, b).mean()) for a, b in itertools.pairwise(states)]


def angular_distance(before: Tensor, after: Tensor) -> float:
    """Mean angle between states before and after a run of blocks, over pi: from 0 to 1."""
    return float(torch.arccos(_cosines(before, after).clamp(-1.0, 1.0)).mean()) / math.pi


def nearest_run(states: Sequence[Tensor], count: int) -> tuple[int, float]:
    """The run of ``count`` consecutive blocks over which the states turn least.

    Args:
        states: as in :func:`block_influence`.
        count: of blocks in the run, at most as many as there are.

    Returns:
        Place of its first block, and its angular distance; the earliest of equals.
    """
    starts = range(len(states) - count)
    distances = [angular_distance(states[start], states[start + count]) for start in starts]
    best = min(starts, key=distances.__getitem__)
    return best, distances[best]


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return functional.cosine_similarity(a.double(), b.double(), dim=-1)
