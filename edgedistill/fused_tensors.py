"""Matrices that a checkpoint stores one on top of the other, as some families do (Phi-3).

A student hands them out, and takes them in, as the matrices that they are; here they come together
again.  What is fused is a fact of the family, ``fused_modules`` of :class:`DecoderFacts`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.families import FAMILIES

Array = npt.NDArray[Any]


def fused_tensors(config: dict[str, Any], where: str) -> dict[str, dict[str, int]]:
    """Of a checkpoint with this config each fused tensor -> its parts' names and rows, in order.

    Raises:
        InputError: its family fuses, and something in the config is not known.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.fused:
        return {}
    return DecoderFacts.from_config(config, where=where).fused_tensors()


class FusedParts:
    """Holds the float parts of fused tensors until the last of each has come.

    Args:
        fused: as of :func:`fused_tensors`.
    """

    def __init__(self, fused: dict[str, dict[str, int]]) -> None:
        self._parts = {name: list(parts) for name, parts in fused.items()}
        self._whole_of = {part: name for name, parts in fused.items() for part in parts}
        self._held: dict[str, dict[str, Array]] = {}

    def add(self, name: str, values: Array) -> dict[str, Array]:
        """What there is to store now: the tensor itself, a fused one, or nothing yet."""
        whole = self._whole_of.get(name)
        if whole is None:
            return {name: values}
        held = self._held.setdefault(whole, {})
        held[name] = values
        if len(held) < len(self._parts[whole]):
            return {}
        del self._held[whole]
        return {whole: np.concatenate([held[part] for part in self._parts[whole]])}

    def rest(self) -> dict[str, Array]:
        """Parts whose others never came, such as those that were quantized: under their own names.

        No ``transformers`` opens such a student; a dequantized copy is fused again.
        """
        return {name: values for held in self._held.values() for name, values in held.items()}
