"""Which layers of a decoder attend to a window, and which are not rotated, as its config says it.

Each family has a rule of its own for a config that does not list its layers; all rules take the
config and the number of layers, and answer for each layer.  They are those of the families'
``configuration_*.py`` in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LayerRule = Callable[[dict[str, Any], int], list[bool]]

# Of Gemma 3, where a config does not list the layers: every sixth attends to all.
SLIDING_PATTERN = 6
KINDS = ("full_attention", "sliding_attention")


def all_layers(config: dict[str, Any], layers: int) -> list[bool]:
    """Every layer attends to the window that the config states (Mistral, which lists none).

    Raises:
        ValueError: the config lists layers all the same, and not as they are.
    """
    slides = [config.get("sliding_window") is not None] * layers
    if (_listed(config, layers) or slides) != slides:
        raise ValueError("layer_types, which this family does not read, contradict sliding_window")
    return slides


def all_but_every_second(config: dict[str, Any], layers: int) -> list[bool]:
    """The first, third, … layer attends to a window (Gemma 2)."""
    return _listed(config, layers) or [layer % 2 == 0 for layer in range(layers)]


def by_sliding_window_pattern(config: dict[str, Any], layers: int) -> list[bool]:
    """All but every sixth attend to a window, or as ``sliding_window_pattern`` says (Gemma 3)."""
    every = _step(config, "sliding_window_pattern", SLIDING_PATTERN)
    return _listed(config, layers) or [(layer + 1) % every != 0 for layer in range(layers)]


def above_max_window_layers(config: dict[str, Any], layers: int) -> list[bool]:
    """Where ``use_sliding_window`` says so, those from ``max_window_layers`` on (Qwen 2 and 3)."""
    slides, first = _uses_window(config), config["max_window_layers"]
    if not isinstance(first, int):
        raise TypeError(f"max_window_layers is {first!r}")
    return _windowed(config, layers, [slides and layer >= first for layer in range(layers)])


def unrotated_ones(config: dict[str, Any], layers: int) -> list[bool]:
    """Where ``use_sliding_window`` says so, those without rotation (SmolLM3)."""
    slides = _uses_window(config)
    return _windowed(config, layers, [slides and bare for bare in by_no_rope(config, layers)])


def by_no_rope(config: dict[str, Any], layers: int) -> list[bool]:
    """Of each layer whether it is *not* rotated (SmolLM3).

    ``no_rope_layers`` has, against its name, 1 for a layer that is rotated; without it every
    ``no_rope_layer_interval``-th is not.

    Raises:
        TypeError, ValueError: the list is too short, or no list of 0 and 1.
    """
    stated = config.get("no_rope_layers")
    if stated is None:
        every = _step(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % every == 0 for layer in range(layers)]
    if len(stated) < layers or set(stated) - {0, 1}:
        raise ValueError(f"no_rope_layers are {len(stated)} of {sorted(set(stated))}")
    return [not rotated for rotated in stated[:layers]]


def _uses_window(config: dict[str, Any]) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None


def _windowed(config: dict[str, Any], layers: int, otherwise: list[bool]) -> list[bool]:
    listed = _listed(config, layers)
    if listed and any(listed) and not _uses_window(config):
        raise ValueError("layer_types have sliding_attention, but use_sliding_window is not set")
    return listed or otherwise


def _listed(config: dict[str, Any], layers: int) -> list[bool]:
    """As ``layer_types`` say; empty where a config has none."""
    kinds = config.get("layer_types")
    if kinds is None:
        return []
    if set(kinds) - set(KINDS) or len(kinds) != layers:
        raise ValueError(f"layer_types are {len(kinds)} of {sorted(set(kinds))}")
    return [kind == KINDS[True] for kind in kinds]


def _step(config: dict[str, Any], key: str, default: int) -> int:
    every = config.get(key) or default
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{key} is {every!r}, not a whole number above 0")
    return every
