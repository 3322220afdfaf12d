"""What GPTQ over a student takes, by arithmetic: known before torch is imported."""

from __future__ import annotations

from edgedistill.decoder import DecoderFacts
from edgedistill.stage import StageCost
from edgedistill.student import SHARD_BYTES

# An array of what a half computed of up to this size lies in memory, a larger one in a mapped file.
HELD_BYTES = 256 * 1024 * 1024
# Two streams, of which each reads the entry of every half twice, and its exit once more.
FORWARDS_A_TOKEN = 5
# Of the calibration text that what the head reads is taken from, in one more pass.
HEAD_TOKENS = 8192


def gptq_cost(facts: DecoderFacts, tokens: int) -> StageCost:
    """Tokens forward, and the more of what the embedding holds and what a block holds.

    Hidden states lie in mapped files.

    Args:
        facts: of the student that arrives.
        tokens: of the calibration text.
    """
    shapes = facts.tensor_shapes()
    sizes = [shapes[name][0] * shapes[name][1] for name in facts.linears(0).values()]
    wide = max(facts.heads * facts.head_dim, facts.ffn_size)
    # What the half at work computed inside, of each of the two streams.
    inside = 2 * min(4 * tokens * wide, HELD_BYTES)
    # In float32 as it was, as it was quantized, and once on the way.
    embedding = 3 * 4 * facts.vocab_size * facts.hidden_size
    # A block in float32 before and after; the widest Hessian, its factor, and two copies on the
    # way; of the largest matrix what refitting its scales and revising its codes takes.
    block = 2 * 4 * sum(sizes) + 4 * 4 * wide * wide + 6 * 4 * max(sizes)
    held = max(inside + max(embedding, block), min(facts.parameters, SHARD_BYTES))
    return StageCost(FORWARDS_A_TOKEN * tokens + min(tokens, HEAD_TOKENS), held)
