"""What llama.cpp's architectures take for granted, so that a GGUF can carry nothing else.

Read from llama.cpp's ``src/models/*.cpp`` (``load_arch_hparams`` and the graphs), and seen in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgedistill.decoder import DecoderFacts
from edgedistill.gguf_layout import ARCHITECTURES
from edgedistill.rope import Rope

# By which llama.cpp knows the models whose attention is scaled by hidden size over heads.
WIDE_SCALE_LAYERS = {"gemma2": 46, "gemma3": 62}
# SmolLM3's layers without rotation: every fourth (``n_no_rope_layer_step``).
NO_ROPE_STEP = 4
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


@dataclass(frozen=True)
class _Architecture:
    """What one of llama.cpp's architectures reads beyond plain blocks.

    Attributes:
        scalings: kinds of RoPE scaling that its graph applies.
        windows: whether it has sliding layers: ``any``, those of a ``period``, or ``none``.
        numbers: facts that its metadata state.
        always: facts that it cannot do without.
        biases: short names of the projections whose bias it adds.
        rotates_all: whether every layer is rotated; else all but every fourth.
    """

    scalings: tuple[str, ...] = ("linear", "yarn")
    windows: str = "none"
    numbers: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    biases: str = "qkvo"
    rotates_all: bool = True


_PLAIN = _Architecture()
_KNOWN = {
    "llama": _Architecture(scalings=("linear", "yarn", "llama3")),
    "qwen2": _Architecture(biases="qkv"),
    "qwen3": _Architecture(biases="qkv"),
    "smollm3": _Architecture(biases="qkv", rotates_all=False),
    "granite": _Architecture(
        scalings=("linear", "yarn", "llama3"),
        numbers=(
            "attention_scale",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_divisor",
        ),
    ),
    "gemma2": _Architecture(
        scalings=("linear",),
        windows="period",
        numbers=("attention_softcap", "logits_softcap"),
        always=("attention_softcap", "logits_softcap"),
        biases="",
    ),
    "gemma3": _Architecture(
        scalings=("linear",), windows="any", numbers=("logits_softcap",), biases=""
    ),
}
_WORDS = {
    "attention_softcap": "a soft cap of attention scores",
    "logits_softcap": "a soft cap of logits",
    "embedding_multiplier": "an embedding multiplier",
    "residual_multiplier": "a residual multiplier",
    "logits_divisor": "logits that are divided",
}


def gguf_problems(facts: DecoderFacts) -> list[str]:
    """In words, what llama.cpp could not be told of a decoder; nothing for one that it can run.

    Args:
        facts: of the decoder.
    """
    name = ARCHITECTURES[facts.family]
    known = _KNOWN.get(name, _PLAIN)
    found = [
        *_attention(facts, name, known),
        *_numbers(facts, name, known),
        *_ropes(facts, name, known),
        *_layers(facts, name, known),
    ]
    return [f"{problem}: GGUF cannot carry that" for problem in found]


def implied_attention_scale(facts: DecoderFacts) -> float:
    """What llama.cpp scales attention by where no key says it."""
    layers = WIDE_SCALE_LAYERS.get(ARCHITECTURES[facts.family])
    width = facts.hidden_size // facts.heads if facts.layers == layers else facts.head_dim
    return float(width**-0.5)


def window_period(slides: tuple[bool, ...]) -> int | None:
    """The ``p`` whose every p-th layer attends to all, 0 where all slide; None: there is none."""
    for period in range(len(slides) + 1):
        if all(one == (not period or i % period < period - 1) for i, one in enumerate(slides)):
            return period
    return None


def _attention(facts: DecoderFacts, name: str, known: _Architecture) -> list[str]:
    implied = implied_attention_scale(facts)
    stated = facts.attention_scale or facts.head_dim**-0.5
    scaled = math.isclose(stated, implied, rel_tol=1e-6)
    if scaled or "attention_scale" in known.numbers:
        return []
    if facts.norm_offset:
        return [f"query_pre_attn_scalar: llama.cpp takes {implied**-2:.0f} for it"]
    return [f"an attention scale of {stated:g}: llama.cpp's {name} takes {implied:g}"]


def _numbers(facts: DecoderFacts, name: str, known: _Architecture) -> list[str]:
    found = []
    for fact, words in _WORDS.items():
        value = getattr(facts, fact)
        if value not in (None, 1.0) and fact not in known.numbers:
            found.append(f"{words} ({value:g}), which llama.cpp's {name} has not")
        elif value is None and fact in known.always:
            found.append(f"no soft cap where llama.cpp's {name} always has one ({fact})")
    return found


def _ropes(facts: DecoderFacts, name: str, known: _Architecture) -> list[str]:
    if facts.sliding_rope is not None and facts.sliding_rope.scaling is not None:
        return ["a RoPE scaling of the sliding layers, which llama.cpp has not"]
    scaling = facts.rope.scaling
    if scaling is None:
        return []
    if scaling["rope_type"] not in known.scalings:
        return [f"the RoPE scaling {scaling['rope_type']} of {facts.family}"]
    return _yarn(facts.rope) if scaling["rope_type"] == "yarn" else []


def _yarn(rope: Rope) -> list[str]:
    scaling = rope.scaling or {}
    return [
        f"YaRN with {key} {scaling[key]}, for which llama.cpp takes {usual}"
        for key, usual in YARN_DEFAULTS.items()
        if scaling.get(key, usual) != usual
    ]


def _layers(facts: DecoderFacts, name: str, known: _Architecture) -> list[str]:
    found = []
    slides = facts.sliding_layers
    if any(slides) and known.windows == "none":
        words = f"layers that attend to a window of {facts.window_tokens} tokens"
        found.append(f"{words}, which llama.cpp's {name} has not")
    elif any(slides) and known.windows == "period" and window_period(slides) is None:
        shown = "".join("s" if one else "." for one in slides)
        found.append(f"sliding layers in no period ({shown}), as llama.cpp's {name} counts them")
    bare = facts.unrotated_layers or (False,) * facts.layers
    step = math.inf if known.rotates_all else NO_ROPE_STEP
    if list(bare) != [(layer + 1) % step == 0 for layer in range(facts.layers)]:
        wanted = "rotates all" if known.rotates_all else f"rotates all but every {NO_ROPE_STEP}th"
        which = ", ".join(str(layer) for layer, one in enumerate(bare) if one) or "none"
        found.append(f"layers without rotation ({which}): llama.cpp's {name} {wanted}")
    lacking = sorted(set(facts.biases(0)) - set(known.biases))
    if lacking:
        found.append(f"biases of {', '.join(lacking)}, which llama.cpp's {name} has not")
    return found
