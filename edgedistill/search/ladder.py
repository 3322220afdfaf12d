"""The ladder: remedies that a search may try.  One entry is one candidate.

In which order they come up follows from what they cost and how large they are
(:func:`edgedistill.search.candidates.in_order`), not from their order here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# As the YAML of a recipe has them: a stage's name -> its fields.
StepData = dict[str, Any]


@dataclass(frozen=True)
class OfLayers:
    """A field that is a share of the student's layers, at least one of them."""

    share: float

    def count(self, layers: int) -> int:
        """How many that is."""
        return max(1, round(self.share * layers))


@dataclass(frozen=True)
class Remedy:
    """A candidate of the ladder.

    Attributes:
        name: that its rung gets.
        what: it does, for people.
        steps: of the rung, as in a recipe; a field may be :class:`OfLayers`.
        gentler: names of remedies that change the student less and of which this one is a harsher
            form: where one of them missed the floor, this one is not expected to reach it.
        reads_text: whether it trains, for which the built-in texts are too short.
    """

    name: str
    what: str
    steps: tuple[Mapping[str, Mapping[str, Any]], ...]
    gentler: tuple[str, ...] = ()
    reads_text: bool = False

    def stages(self) -> list[str]:
        """The names of its stages, in order."""
        return [name for step in self.steps for name in step]

    def for_layers(self, layers: int) -> list[StepData]:
        """Its steps for a student of so many layers."""
        return [
            {name: _resolved(fields, layers) for name, fields in step.items()}
            for step in self.steps
        ]


# Stages from the cheapest to the dearest; a candidate is as dear as its dearest stage.
STAGES_BY_COST = (
    "quantize_rtn",
    "quantize_gptq",
    "quantize_mixed",
    "recover",
    "prune_width",
    "prune_depth",
    "heal",
)

_ON_8, _ON_4 = {"bits": 8}, {"bits": 4, "zero": "fixed"}
_TWO_BITS = {"quantize_gptq": {"bits": 2, "linears": {"v": _ON_8, "o": _ON_8}, "embeddings": _ON_4}}
_HEAL = {"heal": {"trained": "lora", "tokens": 131072, "passes": 2}}
_DEPTH = {"prune_depth": {"layers": OfLayers(0.1)}}
_WIDTH = {"prune_width": {"ffn_share": 0.75}}

LADDER = (
    Remedy("int8", "8 bits by rounding", ({"quantize_rtn": {"bits": 8}},)),
    Remedy(
        "int4", "4 bits by rounding", ({"quantize_rtn": {"bits": 4, "zero": "fixed"}},), ("int8",)
    ),
    Remedy(
        "int4-gptq", "4 bits by GPTQ", ({"quantize_gptq": {"bits": 4, "zero": "fixed"}},), ("int8",)
    ),
    Remedy(
        "int4-gptq-zeros",
        "4 bits by GPTQ with zero points",
        ({"quantize_gptq": {"bits": 4, "zero": "integer"}},),
        ("int8",),
    ),
    Remedy(
        "int4-gptq-embeddings4",
        "4 bits by GPTQ, embedding too",
        (
            {
                "quantize_gptq": {
                    "bits": 4,
                    "zero": "fixed",
                    "embeddings": {"bits": 4, "zero": "fixed"},
                }
            },
        ),
        ("int8", "int4-gptq"),
    ),
    Remedy(
        "mixed3.5",
        "mixed bits, 3.5 a weight",
        ({"quantize_mixed": {"bits_per_weight": 3.5}},),
        ("int8", "int4-gptq"),
    ),
    Remedy(
        "mixed4",
        "mixed bits, 4 a weight",
        ({"quantize_mixed": {"bits_per_weight": 4.0}},),
        ("int8", "int4-gptq"),
    ),
    Remedy(
        "mixed5",
        "mixed bits, 5 a weight",
        ({"quantize_mixed": {"bits_per_weight": 5.0}},),
        ("int8",),
    ),
    Remedy(
        "mixed6",
        "mixed bits, 6 a weight",
        ({"quantize_mixed": {"bits_per_weight": 6.0}},),
        ("int8",),
    ),
    Remedy(
        "int2-recovered",
        "2 bits by GPTQ, with v and o on 8, which learn to make up for the others",
        (_TWO_BITS, {"recover": {"tokens": 65536}}),
        ("int8", "int4-gptq", "mixed3.5"),
        reads_text=True,
    ),
    Remedy(
        "narrow-int8",
        "a quarter of the FFN pruned, healed, 8 bits",
        (_WIDTH, _HEAL, {"quantize_rtn": {"bits": 8}}),
        ("int8",),
        reads_text=True,
    ),
    Remedy(
        "narrow-int4-gptq",
        "a quarter of the FFN pruned, healed, 4 bits by GPTQ",
        (_WIDTH, _HEAL, {"quantize_gptq": {"bits": 4, "zero": "fixed"}}),
        ("int8", "int4-gptq"),
        reads_text=True,
    ),
    Remedy(
        "shallow-int8",
        "a tenth of the layers pruned, healed, 8 bits",
        (_DEPTH, _HEAL, {"quantize_rtn": {"bits": 8}}),
        ("int8",),
        reads_text=True,
    ),
    Remedy(
        "shallow-int4-gptq",
        "a tenth of the layers pruned, healed, 4 bits by GPTQ",
        (_DEPTH, _HEAL, {"quantize_gptq": {"bits": 4, "zero": "fixed"}}),
        ("int8", "int4-gptq"),
        reads_text=True,
    ),
)


def cost_rank(stages: Sequence[str]) -> int:
    """Where the dearest of some stages stands among all; a stage that is not known comes last."""
    dearest = len(STAGES_BY_COST)
    ranks = [STAGES_BY_COST.index(s) if s in STAGES_BY_COST else dearest for s in stages]
    return max(ranks, default=-1)


def _resolved(fields: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {k: v.count(layers) if isinstance(v, OfLayers) else v for k, v in fields.items()}
