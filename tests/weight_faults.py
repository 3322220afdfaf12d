"""Faults of weights: another matrix, norm, scale or adapter than was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.quantized import Grid, QTensor
from edgedistill.student import Student, write_json
from tests.artifact_tensors import StudentTensors, Tensors
from tests.mutations import (
    LOGITS,
    Fault,
    edited,
    fault_in_input,
    fault_in_weights,
    in_tensors,
    misread_as_float16,
    with_config,
    with_edit,
)
from tests.peaked import Good, adapted
from tests.rounded import round_tensor

ADAPTER = "adapter: effect retained"
MISTRAL = "mistral/float"


def _swap(left: Any, right: Any) -> None:
    kept = left.copy()
    left[...] = right
    right[...] = kept


def swap_layers(t: Tensors) -> None:
    for kind in (t.facts.linears, t.facts.norms, t.facts.biases):
        for name, other in zip(kind(0).values(), kind(1).values(), strict=True):
            _swap(t[name], t[other])


def zero_norm(t: Tensors) -> None:
    t[t.facts.norms(1)["ffn"]][...] = 0


def lose_final_norm(t: Tensors) -> None:
    t[t.facts.final_norm][...] = 1


def lose_norm_offset(t: Tensors) -> None:
    """Formats hold what Gemma's norms multiply by, 1 + w; here they get w."""
    for name in t.facts.all_norms():
        t[name][...] -= 1


def exchange_norms(t: Tensors) -> None:
    _swap(t[t.facts.norms(1)["attention"]], t[t.facts.norms(1)["ffn"]])


def lose_head_norms(t: Tensors) -> None:
    for layer in range(t.facts.layers):
        for kind in "qk":
            t[t.facts.norms(layer)[kind]][...] = 1


def lose_biases(t: Tensors) -> None:
    for layer in range(t.facts.layers):
        for name in t.facts.biases(layer).values():
            t[name][...] = 0


def scale_queries_twice(t: Tensors) -> None:
    for layer in range(t.facts.layers):
        q = t[t.facts.linears(layer)["q"]]
        q[...] = q / np.sqrt(t.facts.head_dim)


def exchange_gate_and_up(t: Tensors) -> None:
    names = t.facts.linears(1)
    _swap(t[names["gate"]], t[names["up"]])


def transpose_square(t: Tensors) -> None:
    o = t[t.facts.linears(1)["o"]]
    o[...] = o.copy().T


def swap_embedding_rows(t: Tensors) -> None:
    e = t[t.facts.embedding]
    _swap(e[ord("e") - ord("!") + 3], e[ord("t") - ord("!") + 3])


def shift_embedding_rows(t: Tensors) -> None:
    e = t[t.facts.embedding]
    e[...] = np.roll(e, 1, axis=0)


def pair_heads_in_turn(t: Tensors) -> None:
    """Query head i with key head i % kv_heads, where it is i // (heads / kv_heads)."""
    heads, size, shared = t.facts.heads, t.facts.head_dim, t.facts.kv_heads
    order = np.arange(heads).reshape(-1, shared).T.reshape(-1)
    for layer in range(t.facts.layers):
        names = t.facts.linears(layer)
        q, o = t[names["q"]], t[names["o"]]
        q[...] = q.reshape(heads, size, -1)[order].reshape(q.shape)
        o[...] = o.reshape(-1, heads, size)[:, order].reshape(o.shape)


def transpose_scales(t: Tensors) -> None:
    scales = t.scales(t.facts.linears(1)["up"])
    scales[...] = scales.copy().T.reshape(scales.shape)


def misread_scales(t: Tensors) -> None:
    scales = t.scales(t.facts.linears(1)["o"])
    scales[...] = misread_as_float16(np.asarray(scales))


def swap_nibbles(t: StudentTensors) -> None:
    _recode(t, lambda codes, zeros: (codes.reshape(len(codes), -1, 2)[..., ::-1], zeros))


def raise_zeros(t: StudentTensors) -> None:
    _recode(t, lambda codes, zeros: (codes, np.minimum(zeros + 1, 15)))


def take_codes_for_signed(t: StudentTensors) -> None:
    _recode(t, lambda codes, zeros: (codes ^ np.uint8(0x80), zeros))


def _recode(t: StudentTensors, change: Any) -> None:
    name = t.facts.linears(1)["down"]
    tensor = t.quantized(name)
    codes, zeros = change(tensor.codes, tensor.zeros)
    codes = np.ascontiguousarray(codes).reshape(tensor.codes.shape)
    t.replace(name, QTensor(tensor.grid, codes, tensor.scales, zeros))


def quantize_head(t: StudentTensors) -> None:
    t.replace(t.facts.head, round_tensor(t[t.facts.head], Grid(4, 32)))


def quantize_one_linear(t: StudentTensors) -> None:
    name = t.facts.linears(1)["down"]
    t.replace(name, round_tensor(t[name], Grid(4, 32)))


def replace_tied_head(good: Good, dst: Path) -> Path:
    """A head of its own, near the embedding, where the embedding should serve."""
    tensors = StudentTensors(good.rung.student)
    embedding = tensors[tensors.facts.embedding]
    noise = np.random.default_rng(1).normal(0, 0.2 * embedding.std(), embedding.shape)
    tensors.replace("lm_head.weight", (embedding + noise).astype(np.float32))
    tensors.write(dst)
    write_json(dst / "config.json", Student(dst).config | {"tie_word_embeddings": False})
    return dst


def merge_adapter(times: float) -> Any:
    def run(good: Good, dst: Path) -> Path:
        return adapted(good.base.student, dst, 0, times)

    return run


WEIGHT_FAULTS = [
    fault_in_weights("two layers swapped", swap_layers),
    fault_in_weights("a norm zeroed", zero_norm),
    Fault(
        "norms of w, not 1 + w",
        (LOGITS,),
        {f: in_tensors(f, lose_norm_offset) for f in ("gguf", "onnx")},
        edited(lose_norm_offset),
        "gemma3/float",
    ),
    fault_in_weights("the last norm lost", lose_final_norm),
    fault_in_weights("the norms of a block exchanged", exchange_norms),
    fault_in_weights("q/k norms lost", lose_head_norms, good="qwen3/float"),
    fault_in_weights("biases lost", lose_biases, good="qwen2/float"),
    fault_in_weights("the attention's scale applied twice", scale_queries_twice),
    fault_in_weights("gate and up exchanged", exchange_gate_and_up),
    fault_in_weights("a square matrix transposed", transpose_square),
    fault_in_weights("two rows of the embedding swapped", swap_embedding_rows),
    fault_in_weights("the embedding's rows shifted by one", shift_embedding_rows),
    fault_in_weights("heads paired with the wrong keys", pair_heads_in_turn),
    fault_in_weights("a block of scales transposed", transpose_scales, good="llama/int8"),
    fault_in_weights("scales of another dtype", misread_scales, good="llama/int8"),
    fault_in_weights("4-bit scales transposed", transpose_scales, good="llama/int4"),
    fault_in_input(
        "norm epsilon 100 times too large",
        with_config(rms_norm_eps=1e-3),
        "lint: norm epsilon",
        LOGITS,
        good=MISTRAL,
    ),
    fault_in_input("the last layer lost", with_config(num_hidden_layers=2), "lint: layers", LOGITS),
    fault_in_input("the tied head replaced", replace_tied_head, "lint: tied embeddings", LOGITS),
    fault_in_input(
        "the head quantized by accident",
        with_edit(quantize_head),
        "lint: embedding and head",
        LOGITS,
        good=MISTRAL,
    ),
    fault_in_input(
        "a matrix quantized by accident", with_edit(quantize_one_linear), "lint: dtypes", LOGITS
    ),
    fault_in_input("4-bit codes swapped in pairs", with_edit(swap_nibbles), good="llama/int4"),
    fault_in_input("zero points off by one", with_edit(raise_zeros), good="llama/int4"),
    fault_in_input(
        "codes with the wrong sign", with_edit(take_codes_for_signed), good="llama/int8"
    ),
    fault_in_input("an adapter not merged", merge_adapter(0.0), ADAPTER),
    fault_in_input("an adapter merged twice", merge_adapter(2.0), ADAPTER),
    fault_in_input("an adapter at a quarter of its scale", merge_adapter(0.25), ADAPTER),
]
