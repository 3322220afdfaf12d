"""Emits the ops of a Core ML program under names that depend on the decoder alone."""

from __future__ import annotations

from typing import Any

Var = Any  # a value of the graph: coremltools' Var, which has no types


class NamedOps:
    """Calls like ``ops("add", x=x, y=y)``: the op is named by its place, kind and count.

    Attributes:
        scope: the place, such as ``layer_3``; it begins the names of ops.

    Args:
        mb: ``coremltools.converters.mil.mil.Builder``, inside a program.
    """

    def __init__(self, mb: Any) -> None:
        self._mb = mb
        self._counts: dict[str, int] = {}
        self.scope = "embed"

    def __call__(self, kind: str, **inputs: Any) -> Any:
        """The result of an op: a value, or a tuple of them."""
        stem = f"{self.scope}_{kind}"
        self._counts[stem] = count = self._counts.get(stem, 0) + 1
        return getattr(self._mb, kind)(name=f"{stem}_{count}", **inputs)

    def named(self, name: str, kind: str, **inputs: Any) -> Any:
        """The same under a name of its own: an output's."""
        return getattr(self._mb, kind)(name=name, **inputs)
