"""Write a student with fewer blocks, or narrower ones: a plain Hugging Face checkpoint, streamed.

Narrower blocks compute exactly what the wide ones would with the other channels set to zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.layer_kinds import KINDS
from edgedistill.progress import track
from edgedistill.student import Student, StudentWriter

_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")

Places = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def drop_layers(student: Student, dst: Path, dropped: tuple[int, ...]) -> None:
    """Write ``student`` without some blocks into the empty directory ``dst``.

    The others are renumbered; lists in the config with an entry for each layer lose theirs.
    """
    layers = student.facts.layers
    kept = [layer for layer in range(layers) if layer not in dropped]
    numbers = {layer: number for number, layer in enumerate(kept)}
    config = {key: _kept_entries(key, v, layers, kept) for key, v in student.config.items()}
    config["num_hidden_layers"] = len(kept)
    config |= _stated_layers(student.facts, kept)
    with StudentWriter(dst, student, config) as writer:
        for name in track(student.names(), label="dropping layers"):
            match = _BLOCK_TENSOR.fullmatch(name)
            if match is None:
                writer.write(name, student.read(name))
            elif int(match[1]) in numbers:
                renumbered = f"model.layers.{numbers[int(match[1])]}.{match[2]}"
                writer.write(renumbered, student.read(name))


def _stated_layers(facts: DecoderFacts, kept: list[int]) -> dict[str, list[Any]]:
    """Lists of what differs by layer: a pattern that is stated as a number would be counted anew.

    Where all layers are alike there is nothing to count, and some families read no list.
    """
    stated: dict[str, list[Any]] = {}
    if len(set(facts.sliding_layers)) > 1:
        stated["layer_types"] = [KINDS[facts.sliding_layers[layer]] for layer in kept]
    if facts.unrotated_layers:
        # It has 1 for a layer that is rotated.
        stated["no_rope_layers"] = [int(not facts.unrotated_layers[layer]) for layer in kept]
    return stated


def _kept_entries(key: str, value: Any, layers: int, kept: list[int]) -> Any:
    """A value of the config, such as ``layer_types``; other lists may have that length too."""
    if isinstance(value, list) and len(value) == layers and "layer" in key:
        return [value[layer] for layer in kept]
    return value


@dataclass(frozen=True)
class BlockWidth:
    """What stays of a block's widths; places are ascending, and as many in every block.

    Attributes:
        ffn: channels of the feed-forward network.
        kv_groups: key heads, each with the query heads that share it.
        exits: by short names, matrices in the place of the student's own: float32, of its shape.
    """

    ffn: Places
    kv_groups: Places
    exits: Mapping[str, FloatArray] = field(default_factory=dict)


def width_sizes(facts: DecoderFacts) -> dict[str, int]:
    """The sizes that a narrower student changes or has to state, as a Hugging Face config does."""
    return {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.ffn_size,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
    }


def narrow(
    student: Student, dst: Path, hidden: Places, blocks: Iterable[BlockWidth], after: DecoderFacts
) -> None:
    """Write ``student`` with the kept channels alone, of sizes ``after``, into the empty ``dst``.

    Fewer hidden channels change what a norm divides by: the mean is taken over fewer squares.  So
    that it equals the whole student's with the other channels at zero, epsilon included, all that
    writes to the stream is scaled by sqrt(kept / all), and the norms that read it by the inverse.
    A norm between a matrix and the stream hands on what it reads in that scale.

    Args:
        student: the whole one.
        dst: where the narrow one is written.
        hidden: channels of the residual stream that stay, the same everywhere; ascending.
        blocks: what stays of every block, in order; each is written before the next is asked for.
        after: the sizes that all this comes to.
    """
    facts = student.facts
    scales = _stream_scales(facts, len(hidden))
    norms = facts.all_norms()
    config = {**student.config, **width_sizes(after)}
    # What no fact names (a copy of a tied head, say) could not be kept in step.
    with StudentWriter(dst, student, config) as writer:

        def write(name: str, kept: tuple[Places, ...], values: FloatArray) -> None:
            for axis, places in enumerate(kept):
                if len(places) != values.shape[axis]:
                    values = values.take(places, axis=axis)
            if scales.get(name, 1.0) != 1.0:
                # A norm multiplies by its weight with the offset on it.
                offset = facts.norm_offset if name in norms else 0.0
                scaled = (values + np.float64(offset)) * np.float64(scales[name]) - offset
                values = scaled.astype(np.float32)
            writer.write(name, values)

        for layer, block in enumerate(blocks):
            fitted = {facts.linears(layer)[short]: m for short, m in block.exits.items()}
            for name, kept in _block_pieces(facts, layer, hidden, block).items():
                write(name, kept, fitted[name] if name in fitted else student.read(name))
        vocabulary = np.arange(facts.vocab_size)
        for name in dict.fromkeys((facts.embedding, facts.head)):
            write(name, (vocabulary, hidden), student.read(name))
        write(facts.final_norm, (hidden,), student.read(facts.final_norm))


def _block_pieces(
    facts: DecoderFacts, layer: int, hidden: Places, block: BlockWidth
) -> dict[str, tuple[Places, ...]]:
    """Every tensor of a block -> the places that stay along each of its axes."""
    group = facts.heads // facts.kv_heads
    narrow_places = _head_places(block.kv_groups, facts.head_dim)
    wide_places = _head_places(block.kv_groups, group * facts.head_dim)
    rows = {"q": wide_places, "k": narrow_places, "v": narrow_places, "o": hidden}
    rows |= {"gate": block.ffn, "up": block.ffn, "down": hidden}
    columns = dict.fromkeys(rows, hidden) | {"o": wide_places, "down": block.ffn}
    of_head = np.arange(facts.head_dim)
    pieces: dict[str, tuple[Places, ...]] = {
        name: (rows[short], columns[short]) for short, name in facts.linears(layer).items()
    }
    pieces |= {name: (rows[short],) for short, name in facts.biases(layer).items()}
    norms = facts.norms(layer).items()
    return pieces | {n: (of_head if s in ("q", "k") else hidden,) for s, n in norms}


def _head_places(groups: Places, width: int) -> Places:
    """The rows of ``groups`` where each group has ``width`` consecutive ones."""
    return (groups[:, None] * width + np.arange(width)).reshape(-1)


def _stream_scales(facts: DecoderFacts, hidden: int) -> dict[str, float]:
    """Tensor name -> what it is multiplied by; empty where the stream stays as wide as it was."""
    if hidden == facts.hidden_size:
        return {}
    scale = (hidden / facts.hidden_size) ** 0.5
    # An embedding that is multiplied by the root of the width is scaled by that already.
    embedded = 1.0 if facts.scaled_embedding else scale
    scales = {facts.embedding: embedded}
    for layer in range(facts.layers):
        linears, norms, biases = facts.linears(layer), facts.norms(layer), facts.biases(layer)
        scales |= {linears["o"]: scale, linears["down"]: scale}
        scales |= {norms["attention"]: 1 / scale, norms["ffn"]: 1 / scale}
        scales |= {biases["o"]: scale} if "o" in biases else {}
    # A tied head is the scaled embedding, which its norm makes up for.
    scales[facts.final_norm] = 1 / (scale * embedded) if facts.tied_embeddings else 1 / scale
    return scales
