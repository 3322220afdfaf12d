"""What an artifact's own bytes say of the model in it: the common words of all formats."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

# The largest step of an angle between two places of a table is one radian, so that doubling the
# place never loses count of the turns.
FIRST_PLACE = 1


@dataclass(frozen=True)
class Stated:
    """What an artifact says; None, or a missing key, is what its format has no place for.

    Attributes:
        counts: ``layers``, ``hidden_size``, ``ffn_size``, ``heads``, ``kv_heads``, ``head_dim``
            and ``vocab_size``, each as a number read from tensors, the graph or metadata.
        context_tokens: the longest context that it claims.
        tied_embeddings: whether the head reads the embedding's own bytes.
        norm_epsilons: of the norms, all that occur.
        window_tokens: that sliding layers attend to; None where no layer slides.
        sliding_layers: of each layer whether it slides, empty where none does; None where the
            format is not read for that.
        sliding_rope_theta: base of the rotary frequencies of those that do.
        unrotated_layers: of each layer whether it is not rotated; None where the format is not read
            for that.
        numbers: scales and soft caps, by the words of :mod:`edgedistill.verify.lint_numbers`; None
            is no soft cap.
        norm_tolerance: largest relative error of them that the format's own rounding makes.
        rope_theta: base of the rotary frequencies.
        rope_divisors: float64 [head_dim / 2], what its scaling divides each frequency by.
        rope_tolerance: largest relative error of both that the format's own rounding makes.
        bos_id: the beginning-of-sequence token.
        adds_bos: whether its tokenizer puts that before a text.
        end_ids: the tokens that it names as ends of a text or a turn.
        storage: checkpoint's tensor name -> how it is stored, see :func:`describe`.
        tokens: entries of its vocabulary list.
        chat_template: Jinja; ``has_template`` is False where the format's part at hand has no place
            for one, such as a package without the files beside it.
        architecture: the family, in the format's own word.
        metadata: what else it says of itself, such as ``name`` and ``licence``.
    """

    counts: dict[str, int]
    context_tokens: int | None = None
    tied_embeddings: bool | None = None
    norm_epsilons: frozenset[float] = frozenset()
    window_tokens: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    sliding_rope_theta: float | None = None
    unrotated_layers: tuple[bool, ...] | None = None
    numbers: dict[str, float | None] = field(default_factory=dict)
    norm_tolerance: float = 1e-6
    rope_theta: float | None = None
    rope_divisors: Doubles | None = None
    rope_tolerance: float = 1e-6
    bos_id: int | None = None
    adds_bos: bool | None = None
    end_ids: frozenset[int] | None = None
    storage: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None
    chat_template: str | None = None
    has_template: bool = True
    architecture: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def describe(bits: int, group_size: int, *, zeros: bool, scales: str) -> str:
    """How a quantized tensor is stored: ``int4 in 32s with zeros, float16 scales``."""
    return f"int{bits} in {group_size}s{' with zeros' if zeros else ''}, {scales} scales"


def table_frequencies(cos: npt.NDArray[np.floating], sin: npt.NDArray[np.floating]) -> Doubles:
    """Rotary frequencies, in radians a place, that tables of cosines and sines were made with.

    The angle at place 1 gives each frequency roughly; at places 2, 4, 8, … the same angle is known
    but for whole turns, which the estimate so far tells, and divides its rounding error by the
    place.

    Args:
        cos: [places, n], any float dtype, of at least two places; ``sin`` alike.

    Returns:
        float64 [n].
    """
    frequencies = _angle(cos, sin, FIRST_PLACE)
    place = 2 * FIRST_PLACE
    while place < len(cos):
        rest = _angle(cos, sin, place)
        turns = np.round((frequencies * place - rest) / (2 * np.pi))
        frequencies = (rest + 2 * np.pi * turns) / place
        place *= 2
    return frequencies


def theta_and_divisors(frequencies: Doubles) -> tuple[float, Doubles]:
    """The base of rotary frequencies, and what each is divided by beyond it.

    The two fastest frequencies tell the base: ``linear`` scaling divides both alike, ``llama3``
    leaves both as they are.

    Args:
        frequencies: float64 [head_dim / 2], fastest first.

    Returns:
        (theta, float64 [head_dim / 2]).
    """
    count = len(frequencies)
    theta = float((frequencies[0] / frequencies[1]) ** count) if count > 1 else 1.0
    plain = theta ** (-np.arange(count) / count)
    return theta, plain / frequencies


def _angle(cos: npt.NDArray[np.floating], sin: npt.NDArray[np.floating], place: int) -> Doubles:
    angle: Doubles = np.arctan2(sin[place].astype(np.float64), cos[place].astype(np.float64))
    return angle
