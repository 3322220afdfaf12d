"""How much each FFN channel, KV group and hidden channel carries, by its activations on a text.

- FFN channel: mean |act(gate) * up| times the norm of its column of ``down``, which is the size of
  what it adds to the stream (the activation-aware score of Wanda, arXiv 2306.11695, summed over
  the column as FLAP, arXiv 2312.11983, does for whole channels).
- KV group: mean norm of what its query heads add to the stream through their columns of ``o``.
- Hidden channel: mean |output| of all norms, summed over them (Minitron, arXiv 2407.14679,
  section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder import DecoderFacts
from edgedistill.decoder_forward import DecoderForward, rms_norm
from edgedistill.held_out import BATCH_TOKENS
from edgedistill.progress import track
from edgedistill.pruned_student import KeptWidth, Places
from edgedistill.pruning_results import KeptImportance
from edgedistill.student import Student

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """Scores; larger carries more.

    Attributes:
        ffn: float64 [ffn_size] of each layer.
        kv_groups: float64 [kv_heads] of each layer.
        hidden: float64 [hidden_size].
    """

    ffn: list[Scores]
    kv_groups: list[Scores]
    hidden: Scores

    def largest(self, sizes: DecoderFacts) -> KeptWidth:
        """The places with the largest scores, as many as ``sizes`` has; of equals the first."""
        return KeptWidth(
            ffn=[_largest(scores, sizes.ffn_size) for scores in self.ffn],
            kv_groups=[_largest(scores, sizes.kv_heads) for scores in self.kv_groups],
            hidden=_largest(self.hidden, sizes.hidden_size),
        )

    def kept_shares(self, kept: KeptWidth) -> list[KeptImportance]:
        """The share of the scores that stays, of each kind of channel of which some go."""
        ffn = [_share(s, p) for s, p in zip(self.ffn, kept.ffn, strict=True)]
        groups = [_share(s, p) for s, p in zip(self.kv_groups, kept.kv_groups, strict=True)]
        shares = {"ffn channels": ffn, "KV groups": groups}
        shares["hidden channels"] = [_share(self.hidden, kept.hidden)]
        return [
            KeptImportance(what=what, mean=float(np.mean(found)), least=min(found))
            for what, found in shares.items()
            if min(found) < 1.0
        ]


def _largest(scores: Scores, count: int) -> Places:
    """Ascending places of the ``count`` largest."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _share(scores: Scores, places: Places) -> float:
    return float(scores[places].sum() / scores.sum()) if len(places) < len(scores) else 1.0


def channel_importance(student: Path, ids: Tensor) -> Importance:
    """Score all channels of a student in one streamed pass.

    Args:
        student: a student directory.
        ids: int64 [sequences, tokens].
    """
    with torch.inference_mode():
        return _score(Student(student), ids)


def _score(student: Student, ids: Tensor) -> Importance:
    decoder, facts = DecoderForward(student), student.facts
    count = max(1, BATCH_TOKENS // ids.shape[1])
    parts = list(torch.split(decoder.embed(ids), count))
    ffn, groups = [], []
    hidden = torch.zeros(facts.hidden_size, dtype=torch.float64)
    for layer in track(range(facts.layers), label="weighing channels"):
        sums = _LayerSums(student, layer)
        parts = [decoder.block(layer, part, sums.watch) for part in parts]
        ffn.append((sums.gated * sums.down_norms / ids.numel()).numpy())
        groups.append((sums.groups / ids.numel()).numpy())
        hidden += sums.normalized
    weight = torch.from_numpy(student.read(facts.final_norm))
    for part in parts:
        hidden += _sum_abs(rms_norm(part, weight, facts))
    return Importance(ffn, groups, (hidden / ids.numel()).numpy())


class _LayerSums:
    """Sums over tokens of one layer's activations, in float64."""

    def __init__(self, student: Student, layer: int) -> None:
        facts: DecoderFacts = student.facts
        names = facts.linears(layer)
        down = torch.from_numpy(student.read(names["down"]))
        self.down_norms = down.double().norm(dim=0)
        output = torch.from_numpy(student.read(names["o"]))
        # One matrix [hidden, group's columns] for each KV group.
        self._outputs = output.chunk(facts.kv_heads, dim=1)
        self.gated = torch.zeros(facts.ffn_size, dtype=torch.float64)
        self.groups = torch.zeros(facts.kv_heads, dtype=torch.float64)
        self.normalized = torch.zeros(facts.hidden_size, dtype=torch.float64)

    def watch(self, short: str, x: Tensor) -> None:
        """Take in what enters a matrix: [sequences, tokens, columns]."""
        if short == "down":
            self.gated += _sum_abs(x)
        elif short == "o":
            parts = x.chunk(len(self._outputs), dim=-1)
            added = (functional.linear(p, w) for p, w in zip(parts, self._outputs, strict=True))
            self.groups += torch.stack([a.norm(dim=-1).double().sum() for a in added])
        else:
            self.normalized += _sum_abs(x)


def _sum_abs(x: Tensor) -> Tensor:
    """[sequences, tokens, channels] -> float64 [channels]."""
    return x.abs().sum(dim=(0, 1), dtype=torch.float64)
