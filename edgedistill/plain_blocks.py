"""What a decoder has beyond plain blocks, which is all that the ONNX exporter writes."""

from __future__ import annotations

from edgedistill.decoder import DecoderFacts


def beyond_plain_blocks(facts: DecoderFacts) -> list[str]:
    """In words, what the blocks of the Llama, Mistral and Qwen families do not have.

    Args:
        facts: of the decoder.

    Returns:
        Nothing for a decoder of plain blocks.
    """
    has = {
        "norms that multiply by 1 + w": facts.norm_offset != 0.0,
        "norms behind attention and FFN": facts.post_norms,
        "an embedding that is multiplied": facts.embedding_scale != 1.0,
        f"the activation {facts.activation}": facts.activation != "silu",
        "an attention scale of its own": facts.attention_scale is not None,
        "layers that attend to a sliding window": facts.window_tokens is not None,
        "layers without rotation": any(facts.unrotated_layers),
        "heads that are rotated in part": facts.rotary_dim != facts.head_dim,
        "rotations that scale what they rotate": facts.rope.attention_factor != 1.0,
        "a soft cap of attention scores": facts.attention_softcap is not None,
        "a soft cap of logits": facts.logits_softcap is not None,
        "a residual multiplier": facts.residual_multiplier != 1.0,
        "logits that are divided": facts.logits_divisor != 1.0,
    }
    return [words for words, there in has.items() if there]


def plain_block_problems(facts: DecoderFacts, format_name: str) -> list[str]:
    """One problem for an exporter of plain blocks, or none.

    Args:
        facts: of the decoder.
        format_name: as people write it.
    """
    found = beyond_plain_blocks(facts)
    if not found:
        return []
    return [f"{facts.family} cannot be exported to {format_name} yet: it has {', '.join(found)}"]
