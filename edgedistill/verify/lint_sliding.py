"""Hold what an artifact says of sliding windows against the student's ``config.json``."""

from __future__ import annotations

from typing import Any

from edgedistill.results import Check
from edgedistill.verify.lint_check import lint_check, near
from edgedistill.verify.stated import Stated


def sliding_checks(stated: Stated, config: Any) -> list[Check]:
    """The checks of a decoder some of whose layers attend to a window; none for others.

    Nor are there any where the format is not read for that.

    Args:
        stated: what the artifact says.
        config: of ``transformers``.
    """
    slides = _slides(config)
    if stated.sliding_layers is None or not (any(slides) or any(stated.sliding_layers)):
        return []
    if not any(stated.sliding_layers) and config.sliding_window >= _context(stated, config):
        return []  # a window that no text outgrows is none
    expected = int(config.sliding_window) if any(slides) else None
    pairs = {
        "sliding window": (expected, stated.window_tokens),
        "sliding layers": (_layers(slides), _layers(stated.sliding_layers)),
    }
    found = [lint_check(words, a == b, a, b) for words, (a, b) in pairs.items()]
    if any(slides):
        found += _theta(stated, config.rope_parameters)
    return found


def _slides(config: Any) -> tuple[bool, ...]:
    """Of each layer; all attend to the window of a config whose class lists no layers (Mistral)."""
    if hasattr(type(config), "layer_types"):
        return tuple(kind == "sliding_attention" for kind in config.layer_types or [])
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    return (window is not None,) * int(config.num_hidden_layers)


def _context(stated: Stated, config: Any) -> int:
    longest = int(config.max_position_embeddings)
    return longest if stated.context_tokens is None else min(stated.context_tokens, longest)


def _theta(stated: Stated, parameters: dict[str, Any]) -> list[Check]:
    """The base of sliding layers, which has to be stated where it is one of their own."""
    own, found = parameters.get("sliding_attention"), stated.sliding_rope_theta
    if own is None and found is None:
        return []
    theta = float((own or parameters)["rope_theta"])
    # Where all layers have one base, that is held against the config by itself.
    right = found is not None and (
        (own is None and found == stated.rope_theta) or near(found, theta, stated.rope_tolerance)
    )
    shown = None if found is None else f"{found:.7g}"
    return [lint_check("RoPE theta of sliding layers", right, f"{theta:g}", shown)]


def _layers(slides: tuple[bool, ...]) -> str:
    """``.`` for a layer that attends to all, ``s`` for one that slides."""
    return "".join("s" if one else "." for one in slides) if any(slides) else "none"
