"""The scales and soft caps that a graph of ours computes with, read off its nodes and constants."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgedistill.verify.lint_numbers import (
    ATTENTION_SCALE,
    ATTENTION_SOFTCAP,
    EMBEDDING_SCALE,
    LOGITS_DIVISOR,
    LOGITS_SOFTCAP,
    RESIDUAL_SCALE,
)

GATHERS = ("Gather", "GatherBlockQuantized")
ADD_AND_NORM = "SkipSimplifiedLayerNormalization"
# What logits go through behind the head, in any order: four nodes at most.
LOGIT_STEPS, MOST_LOGIT_STEPS = ("Div", "Tanh", "Mul"), 4


def attribute(node: Any, name: str) -> Any:
    """An attribute of a node that is a number; None where it is not stated."""
    for stated in node.attribute:
        if stated.name == name:
            return stated.f if stated.type == stated.FLOAT else stated.i
    return None


def behind_head(nodes: list[Any]) -> tuple[Any, list[Any]]:
    """(the node of the head, or None; what its result goes through until it is ``logits``)."""
    made = {name: node for node in nodes for name in node.output}
    node = made.get("logits")
    steps: list[Any] = []
    while node is not None and node.op_type in LOGIT_STEPS and len(steps) < MOST_LOGIT_STEPS:
        steps.insert(0, node)
        node = made.get(node.input[0])
    return node, steps


def attention_numbers(attention: list[Any], head_dim: int) -> dict[str, float | None]:
    """Of the nodes that attend, by the words of :mod:`edgedistill.verify.lint_numbers`."""
    scales = [attribute(node, "scale") or head_dim**-0.5 for node in attention]
    caps = [attribute(node, "softcap") or None for node in attention]
    return {ATTENTION_SCALE: _odd_one(scales), ATTENTION_SOFTCAP: _odd_one(caps)}


def stream_numbers(nodes: list[Any], scalars: dict[str, float]) -> dict[str, float | None]:
    """Likewise of what embeddings, the stream and logits are multiplied with.

    Args:
        nodes: of the graph.
        scalars: its constants of no dimensions, by name.
    """
    made = {name: node for node in nodes for name in node.output}
    (embedded,) = [n.output[0] for n in nodes if n.op_type in GATHERS and "input_ids" in n.input]
    scaled = [n for n in nodes if n.op_type == "Mul" and n.input[0] == embedded]
    branches = [made.get(node.input[1]) for node in nodes if node.op_type == ADD_AND_NORM]
    steps = behind_head(nodes)[1]
    before_tanh = [n for n in steps if n.op_type == "Tanh"]
    divisors = [scalars.get(n.input[1]) for n in steps if n.op_type == "Div"]
    caps = [scalars.get(n.input[1]) for n in steps if n.op_type == "Mul"]
    if before_tanh:  # a cap divides and multiplies by the same number
        caps.append(divisors.pop())
    return {
        EMBEDDING_SCALE: scalars.get(scaled[0].input[1]) if scaled else 1.0,
        RESIDUAL_SCALE: _odd_one([_factor(node, scalars) for node in branches]),
        LOGITS_SOFTCAP: _odd_one(caps) if before_tanh else None,
        LOGITS_DIVISOR: divisors[0] if divisors else 1.0,
    }


def _factor(branch: Any, scalars: dict[str, float]) -> float | None:
    """By which a node multiplies what is added to the stream."""
    if branch is None or branch.op_type != "Mul":
        return 1.0
    return scalars.get(branch.input[1], 1.0)


def _odd_one(values: list[float | None]) -> float | None:
    """The number of all; where they differ, the rarest: it is the one that is wrong."""
    return min(Counter(values).items(), key=lambda entry: entry[1])[0] if values else None
