"""Read the facts of a decoder from ``config.json``, or say by name what is not known."""

from __future__ import annotations

from typing import Any

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.families import ACTIVATIONS, FAMILIES, Activation, Family
from edgedistill.rope import positive, read_layered_ropes, read_rope
from edgedistill.unknown_family import missing_facts

# Beyond any model; a damaged config must not make us list tensors without end.
MOST_LAYERS, LARGEST_SIZE = 4096, 1 << 31


def read_config(config: dict[str, Any], where: str) -> DecoderFacts:
    """Read the facts of a Hugging Face config, of transformers 4 or 5.

    Raises:
        InputError: the family, or something in it, is not known here, or a key is missing.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        missing = missing_facts(config)
        lacks = f": it has {', '.join(missing)}" if missing else ""
        raise InputError(
            f"model_type {kind!r} is not a family that edgedistill knows{lacks}",
            where=where,
            hint=f"known families: {', '.join(FAMILIES)}",
        )
    try:
        return _read(kind, config, where)
    except KeyError as error:
        raise InputError(f"has no {error}", where=where) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"has a value of the wrong kind ({error})", where=where) from error


def _read(kind: str, config: dict[str, Any], where: str) -> DecoderFacts:
    family = FAMILIES[kind]
    config = family.defaults | config
    activation = _activation(family, config, where)
    _refuse_unknown(family, config, where)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    kv_heads = _size(config, "num_key_value_heads", heads)
    head_dim = _size(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"{heads} heads share {kv_heads} key heads of {head_dim}")
    bias = family.optional_bias and bool(config.get("attention_bias"))
    layers = _size(config, "num_hidden_layers", most=MOST_LAYERS)
    facts = DecoderFacts(
        family=kind,
        layers=layers,
        hidden_size=hidden,
        ffn_size=_size(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        max_context_tokens=_size(config, "max_position_embeddings"),
        norm_eps=positive(config, "rms_norm_eps"),
        activation=activation,
        qk_norm=family.qk_norm,
        attention_bias=family.attention_bias or bias,
        output_bias=family.output_bias or bias,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_offset=family.norm_offset,
        post_norms=family.post_norms,
        scaled_embedding=family.scaled_embedding,
        fused_modules=family.fused,
        **_attention(family, config, layers, where),
        **_rotated(family, config, head_dim),
        **_numbers(family, config),
    )
    _check_scaling(family, facts, where)
    return facts


def _attention(family: Family, config: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """How the layers attend: to all or to a window, rotated by which base, or not at all."""
    found: dict[str, Any] = {}
    if family.two_ropes:
        found["rope"], sliding = read_layered_ropes(config, where)
    else:
        found["rope"], sliding = read_rope(config, where), None
    slides = family.windows(config, layers) if family.windows else []
    if any(slides):
        window = _size({"sliding_window": config.get("sliding_window") or 0}, "sliding_window")
        # One of all layers that the context does not outgrow is none.
        outgrown = window < _size(config, "max_position_embeddings")
        if outgrown or sliding is not None or not all(slides):
            found |= {"sliding_layers": tuple(slides), "sliding_rope": sliding}
            found["window_tokens"] = window
    bare = family.unrotated(config, layers) if family.unrotated else []
    if any(bare):
        found["unrotated_layers"] = tuple(bare)
    return found


def _numbers(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Scales and soft caps."""
    stated = {n: key for n, key in family.numbers.items() if config.get(key) is not None}
    found = {name: positive(config, key) for name, key in stated.items()}
    if family.scalar_key:
        found["attention_scale"] = positive(config, family.scalar_key) ** -0.5
    return found


def _rotated(family: Family, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """How many dimensions of a head are rotated, where those are not all."""
    if not family.partly_rotated:
        return {}
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = positive({"partial_rotary_factor": 1.0} | config | stated, "partial_rotary_factor")
    rotated = int(head_dim * share)
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise ValueError(f"partial_rotary_factor {share} rotates {rotated} of {head_dim}")
    return {} if rotated == head_dim else {"rotated_dims": rotated}


def _check_scaling(family: Family, facts: DecoderFacts, where: str) -> None:
    """The scaling is one of the family's, with a factor for every frequency."""
    scaling = facts.rope.scaling
    if scaling is None:
        return
    if family.rope_types and scaling["rope_type"] not in family.rope_types:
        raise InputError(
            f"rope_type {scaling['rope_type']!r} of {facts.family} is not supported", where=where
        )
    for key in ("short_factor", "long_factor"):
        if len(scaling.get(key, ())) not in (0, facts.rotary_dim // 2):
            count = len(scaling[key])
            raise ValueError(f"{key} has {count} numbers for {facts.rotary_dim} rotated dimensions")


def _activation(family: Family, config: dict[str, Any], where: str) -> Activation:
    name = config.get(family.activation_key) or family.activation
    # A family computes what it was trained with, whatever else we could.
    if ACTIVATIONS.get(name) != ACTIVATIONS[family.activation]:
        raise InputError(f"{family.activation_key} {name!r} is not supported yet", where=where)
    return ACTIVATIONS[name]


def _size(
    config: dict[str, Any], key: str, default: int | None = None, *, most: int = LARGEST_SIZE
) -> int:
    """A number of something: a whole one from 1 to ``most``; None or 0 is the default's turn."""
    value = config[key] if default is None else config.get(key) or default
    if int(value) != value or not 1 <= value <= most:
        raise ValueError(f"{key} is {value!r}, not a whole number from 1 to {most}")
    return int(value)


def _refuse_unknown(family: Family, config: dict[str, Any], where: str) -> None:
    window = config.get("sliding_window")
    problem = None
    if window and config.get("use_sliding_window", True) and not family.windows:
        problem = f"sliding_window {window}"
    elif family.norm_offset and config.get("attention_bias"):
        problem = "attention_bias"
    elif config.get("mlp_bias"):
        problem = "mlp_bias"
    elif config.get("use_bidirectional_attention"):
        problem = "use_bidirectional_attention"
    elif config.get("quantization_config"):
        problem = "quantization_config (the student is quantized already)"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) and key not in family.numbers.values():
            problem = f"{key} {config[key]}"
    if problem:
        raise InputError(f"{problem} is not supported yet", where=where)
