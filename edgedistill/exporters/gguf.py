"""GGUF, for llama.cpp: one file with weights, metadata and tokenizer, written tensor by tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; which keys and tensors an
architecture wants: llama.cpp's src/llama-arch.cpp and src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.exporter import Exporter
from edgedistill.gguf_blocks import F16, F32, LAYOUTS, BlockLayout, pack_blocks
from edgedistill.gguf_file import GgufFile, gguf_package
from edgedistill.gguf_layout import (
    ARCHITECTURES,
    ROPE_DIVISORS,
    norm_offset,
    row_order,
    tensor_name,
)
from edgedistill.gguf_limits import gguf_problems, window_period
from edgedistill.gguf_vocabulary import GgufVocabulary, read_vocabulary
from edgedistill.progress import track
from edgedistill.quantized import Grid, QTensor
from edgedistill.rope import Rope
from edgedistill.student import Student

if TYPE_CHECKING:
    from gguf import GGUFWriter

WEIGHTS_FILE = "model.gguf"
# The second version of the block formats (ggml.h, GGML_QNT_VERSION).
QUANTIZATION_VERSION = 2
FLOAT16_MAX = 65504.0


class Gguf(Exporter):
    """Float matrices F16, vectors F32; grids Q8_0, Q5_0, Q4_0, Q4_1 and Q2_0, bit by bit."""

    extra: ClassVar[str] = "gguf"
    runtime: ClassVar[str] = "llama_cpp"

    def holds(self, grid: Grid) -> bool:
        """8, 5 and 4 bits in groups of 32, 2 in groups of 64; integer zeros at 4 bits alone."""
        return grid in LAYOUTS

    def problems(self, facts: DecoderFacts) -> list[str]:
        """What llama.cpp's architecture of the family takes for granted."""
        return gguf_problems(facts)

    def stored_bytes(self, shape: tuple[int, ...], grid: Grid | None) -> int:
        """Whole blocks; F16 of a matrix without a grid, F32 of a vector."""
        layout = LAYOUTS[grid] if grid else F16 if len(shape) == 2 else F32
        return math.prod(shape) // layout.block * layout.block_bytes

    def export(self, student: Student, dst: Path, *, context_tokens: int) -> None:
        """Write ``model.gguf``; tied embeddings are stored once, llama.cpp ties them by itself."""
        self.refuse_misfit(student)
        facts = student.facts
        if context_tokens > facts.max_context_tokens:
            raise InputError(
                f"context_tokens {context_tokens} is more than the model's own "
                f"{facts.max_context_tokens}",
                where=str(student.path / "config.json"),
            )
        layouts = {
            name: _layout(student, name, shape) for name, shape in facts.tensor_shapes().items()
        }
        writer: GGUFWriter = gguf_package().GGUFWriter(
            dst / WEIGHTS_FILE, ARCHITECTURES[facts.family]
        )
        _add_model(writer, facts, context_tokens)
        writer.add_file_type(_file_type(facts, layouts))
        writer.add_quantization_version(QUANTIZATION_VERSION)
        _add_vocabulary(writer, read_vocabulary(student))
        divisors = _rope_divisors(facts)
        if divisors is not None:
            _add_info(writer, ROPE_DIVISORS, divisors.shape, F32)
        for name, layout in layouts.items():
            _add_info(writer, tensor_name(facts, name), student.shape(name), layout)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            if divisors is not None:
                writer.write_tensor_data(divisors)
            for name, layout in track(layouts.items(), len(layouts), "writing GGUF"):
                writer.write_tensor_data(_data(student, facts, name, layout))
        finally:
            writer.close()

    def weight_bytes(self, artifact: Path) -> int:
        """Bytes of all tensors, without padding, metadata and tokenizer."""
        tensors = GgufFile(artifact / WEIGHTS_FILE).tensors.values()
        return sum(tensor.size_bytes for tensor in tensors)


def _layout(student: Student, name: str, shape: tuple[int, ...]) -> BlockLayout:
    if student.shape(name) != shape:
        raise InputError(
            f"{name} has the shape {student.shape(name)}, its config asks for {shape}",
            where=str(student.path),
        )
    if name not in student.grids:
        return F16 if len(shape) == 2 else F32
    grid = student.grids[name]
    if grid not in LAYOUTS:
        raise InputError(
            f"{name} is {grid}, which no GGUF block holds",
            where=str(student.path),
            hint=f"grids that fit: {', '.join(map(str, LAYOUTS))}",
        )
    return LAYOUTS[grid]


def _data(
    student: Student, facts: DecoderFacts, name: str, layout: BlockLayout
) -> npt.NDArray[Any]:
    order = row_order(facts, name)
    if name in student.grids:
        tensor = student.read_quantized(name)
        return pack_blocks(tensor if order is None else _reordered(tensor, order), name)
    values, offset = student.read(name), norm_offset(facts, name)
    if offset:
        values = values + np.float32(offset)
    if layout is F16:
        # Not-a-number is refused as well: it compares false.
        if not np.abs(values).max() <= FLOAT16_MAX:
            raise InputError(
                f"{name} holds a value that is not a number or too large for float16",
                where=str(student.path),
            )
        values = values.astype(np.float16)
    return np.ascontiguousarray(values if order is None else values[order])


def _reordered(tensor: QTensor, order: npt.NDArray[np.intp]) -> QTensor:
    zeros = None if tensor.zeros is None else tensor.zeros[order]
    return QTensor(tensor.grid, tensor.codes[order], tensor.scales[order], zeros)


def _add_info(writer: GGUFWriter, name: str, shape: tuple[int, ...], layout: BlockLayout) -> None:
    size_bytes = int(np.prod(shape, dtype=np.int64)) // layout.block * layout.block_bytes
    # The dtype is not looked at once the type's number is given.
    writer.add_tensor_info(name, shape, np.dtype(np.float16), size_bytes, layout.type_id)


def _file_type(facts: DecoderFacts, layouts: dict[str, BlockLayout]) -> int:
    """llama.cpp's number for the layout that holds most of the weights."""
    weights: Counter[BlockLayout] = Counter()
    for name, shape in facts.tensor_shapes().items():
        weights[layouts[name]] += int(np.prod(shape, dtype=np.int64))
    return weights.most_common(1)[0][0].file_type


def _rope_divisors(facts: DecoderFacts) -> npt.NDArray[np.float32] | None:
    """float32 [head_dim / 2]: Llama 3.1's scaling, which llama.cpp takes as a tensor."""
    scaling = facts.rope.scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    return facts.rope.frequency_divisors(facts.head_dim)


def _add_model(writer: GGUFWriter, facts: DecoderFacts, context_tokens: int) -> None:
    writer.add_type("model")
    writer.add_size_label(f"{facts.parameters / 1e6:.0f}M")
    writer.add_vocab_size(facts.vocab_size)
    writer.add_context_length(context_tokens)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.ffn_size)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(facts.rope.theta)
    writer.add_layer_norm_rms_eps(facts.norm_eps)
    _add_numbers(writer, facts)
    _add_windows(writer, facts)
    _add_scaling(writer, facts.rope)


def _add_numbers(writer: GGUFWriter, facts: DecoderFacts) -> None:
    """Soft caps and scales, where the architecture has keys for them."""
    if facts.attention_softcap is not None:
        writer.add_attn_logit_softcapping(facts.attention_softcap)
    if facts.logits_softcap is not None:
        writer.add_final_logit_softcapping(facts.logits_softcap)
    if ARCHITECTURES[facts.family] == "granite":
        writer.add_attention_scale(facts.attention_scale or facts.head_dim**-0.5)
        writer.add_embedding_scale(facts.embedding_multiplier)
        writer.add_residual_scale(facts.residual_multiplier)
        # What logits are divided by, against its name.
        writer.add_logit_scale(facts.logits_divisor)


def _add_windows(writer: GGUFWriter, facts: DecoderFacts) -> None:
    if facts.window_tokens is None:
        return
    writer.add_sliding_window(facts.window_tokens)
    if ARCHITECTURES[facts.family] == "gemma2":
        writer.add_sliding_window_pattern(window_period(facts.sliding_layers) or 0)
    else:
        writer.add_sliding_window_pattern(facts.sliding_layers)
    if facts.sliding_rope is not None:
        writer.add_rope_freq_base_swa(facts.sliding_rope.theta)


def _add_scaling(writer: GGUFWriter, rope: Rope) -> None:
    """Linear scaling and YaRN; Llama 3.1's is a tensor."""
    if rope.scaling is None or rope.scaling["rope_type"] == "llama3":
        return
    kinds = gguf_package().RopeScalingType
    factor = float(rope.scaling["factor"])
    writer.add_rope_scaling_factor(factor)
    if rope.scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(kinds.LINEAR)
        return
    writer.add_rope_scaling_type(kinds.YARN)
    original = rope.scaling["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(original))
    # llama.cpp multiplies by the usual factor itself (src/llama-context.cpp).
    usual = 0.1 * math.log(max(1.0, factor)) + 1.0
    writer.add_rope_scaling_attn_factors(rope.attention_factor / usual)


def _add_vocabulary(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    for role, token in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
