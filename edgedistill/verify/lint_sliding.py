"""Hold what an artifact says of sliding windows against the student's ``config.json``."""

from __future__ import annotations

from typing import Any

from edgedistill.results import Check
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
    expected = int(config.sliding_window) if any(slides) else None
    found = [_same("sliding window", expected, stated.window_tokens)]
    found.append(_same("sliding layers", _layers(slides), _layers(stated.sliding_layers)))
    if any(slides):
        parameters = config.rope_parameters
        theta = float(parameters.get("sliding_attention", parameters)["rope_theta"])
        stated_theta = stated.sliding_rope_theta
        near = stated_theta is not None and abs(stated_theta - theta) <= (
            stated.rope_tolerance * theta
        )
        shown = "not stated" if stated_theta is None else f"{stated_theta:.7g}"
        detail = shown if near else f"{shown}, expected {theta:g}"
        found.append(Check(name="lint: RoPE theta of sliding layers", passed=near, detail=detail))
    return found


def _slides(config: Any) -> tuple[bool, ...]:
    """Of each layer; all attend to the window of a config whose class lists no layers (Mistral)."""
    if hasattr(type(config), "layer_types"):
        return tuple(kind == "sliding_attention" for kind in config.layer_types or [])
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    return (window is not None,) * int(config.num_hidden_layers)


def _layers(slides: tuple[bool, ...]) -> str:
    """``.`` for a layer that attends to all, ``s`` for one that slides."""
    return "".join("s" if one else "." for one in slides) if any(slides) else "none"


def _same(words: str, expected: object, found: object) -> Check:
    passed = expected == found
    detail = f"{found}" if passed else f"{found}, expected {expected}"
    return Check(name=f"lint: {words}", passed=passed, detail=detail)
