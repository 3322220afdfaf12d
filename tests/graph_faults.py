"""Faults of the graph: rotary frequencies, the cache, the row order of rotated heads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.student import Student
from tests.artifact_tensors import (
    FORMATS,
    GgufTensors,
    Tensors,
    edited_graph,
    edited_program,
    rewrite_gguf,
)
from tests.mutations import (
    LOGITS,
    Fault,
    Plant,
    distance,
    distance_after_cache,
    edited,
    in_file,
    in_tensors,
    load_model,
    remade,
    with_config,
)
from tests.peaked import CONTEXT, Good

STEPS = "cache: token by token"
POSITIONS = "positions: near the end of the context"
WINDOW_TOKENS = 12
LAST_ROTATION = 200
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALF_THETA = {"rope_type": "default", "rope_theta": 5000.0}


def rope_fault(name: str, parameters: dict[str, Any], lint: str, good: str) -> Fault:
    """Other rotary frequencies than the config's: in GGUF's header, in the tables of the others."""

    def gguf(good: Good, artifact: Path, dst: Path) -> Path:
        shutil.copytree(artifact, dst)
        facts = Student(good.rung.student).facts
        if facts.rope.scaling is not None:
            rewrite_gguf(dst, {}, without_tensors=("rope_freqs.weight",))
        theta = GgufTensors(dst, facts).scalar("llama.rope.freq_base")
        theta[...] = parameters["rope_theta"]
        return dst

    def tables(format_name: str) -> Plant:
        def run(good: Good, artifact: Path, dst: Path) -> Path:
            shutil.copytree(artifact, dst)
            opened = FORMATS[format_name](dst, Student(good.rung.student).facts)
            cos, sin = opened.rope_tables()
            places, half = cos.shape
            frequencies = parameters["rope_theta"] ** (-np.arange(half) / half)
            angles = np.arange(places)[:, None] * frequencies
            cos[...], sin[...] = np.cos(angles), np.sin(angles)
            return dst

        return run

    plants = {"gguf": gguf, "onnx": tables("onnx"), "coreml": tables("coreml")}
    return Fault(
        name, (lint, LOGITS), plants, remade(with_config(rope_parameters=parameters)), good
    )


def _end_rope_tables(t: Tensors) -> None:
    """The tables were made for a shorter context and end: the last angle stays."""
    for table in t.rope_tables():
        table[LAST_ROTATION:] = table[LAST_ROTATION]


def _end_of_tables(good: Good) -> float:
    """Nats a token behind the tables' end, by ``transformers`` with such position ids."""
    import torch

    model = load_model(good.rung.student)
    ids = torch.randint(3, 200, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    places = torch.arange(CONTEXT).clamp(max=LAST_ROTATION)[None]
    with torch.inference_mode():
        right, wrong = (
            torch.log_softmax(logits[0, LAST_ROTATION:].double(), -1)
            for logits in (model(ids).logits, model(ids, position_ids=places).logits)
        )
    kl = torch.nn.functional.kl_div(wrong, right, log_target=True, reduction="none")
    return float(kl.sum(-1).mean())


def _add_window(artifact: Path) -> None:
    with edited_graph(artifact) as model:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.attribute.add(name="local_window_size", i=WINDOW_TOKENS, type=2)


def _lose_windows(artifact: Path) -> None:
    with edited_graph(artifact) as model:
        for node in model.graph.node:
            kept = [a for a in node.attribute if a.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _rotate_all_alike(artifact: Path) -> None:
    """Sliding layers read the tables of the layers that attend to all."""
    with edited_graph(artifact) as model:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.input[7:9] = ["rope.cos", "rope.sin"]


def _sliding_faults() -> list[Fault]:
    one_base = dict.fromkeys(("full_attention", "sliding_attention"), PLAIN_ROPE)
    return [
        Fault(
            "sliding windows lost",
            ("lint: sliding layers", LOGITS),
            {"onnx": in_file(_lose_windows)},
            remade(with_config(sliding_window=CONTEXT)),
            "gemma3/float",
        ),
        Fault(
            "sliding layers rotated by the base of the others",
            ("lint: RoPE theta of sliding layers", LOGITS),
            {"onnx": in_file(_rotate_all_alike)},
            remade(with_config(rope_parameters=one_base)),
            "gemma3/float",
        ),
    ]


def _windowed(good: Good) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        faulty = with_config(sliding_window=WINDOW_TOKENS)(good, Path(scratch) / "student")
        return distance(good.rung.student, faulty)


def _write_one_place_early(artifact: Path) -> None:
    """ONNX: after the first call, keys and values take the place before their own."""
    from onnx import helper

    with edited_graph(artifact) as model:
        nodes = list(model.graph.node)
        place = next(i for i, node in enumerate(nodes) if "last_key" in node.output)
        one = next(node for node in nodes if "mask.keys" in node.output).input[1]
        nodes[place].input[0] = "fault.last"
        nodes[place:place] = [
            helper.make_node("Shape", ["input_ids"], ["fault.shape"]),
            helper.make_node("Gather", ["fault.shape", one], ["fault.new"], axis=0),
            helper.make_node("Sub", ["mask.keys", "fault.new"], ["fault.past"]),
            helper.make_node("Min", ["fault.past", one], ["fault.early"]),
            helper.make_node("Sub", ["mask.last_key", "fault.early"], ["fault.last"]),
        ]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _rotate_one_place_early(artifact: Path) -> None:
    """Core ML: after the first call, tokens are rotated as if they stood one place earlier."""
    with edited_program(artifact) as block:
        operations = list(block.operations)
        made = {op.outputs[0].name: op for op in operations if op.outputs}
        start, count = made["embed_sub_1"], made["embed_slice_by_index_2"]
        begin, end = made["embed_concat_1"], made["embed_concat_2"]
        zero = begin.inputs["values"].arguments[1]
        fixed = zero.value if zero.WhichOneof("binding") == "value" else None
        one = type(zero)()
        one.value.CopyFrom(fixed or made[zero.name].attributes["val"])
        one.value.immediateValue.tensor.ints.values[:] = [1]
        early = _int_op(start, "sub", "fault_early", begin.inputs["values"].arguments[0], one)
        floor = _int_op(start, "maximum", "fault_start", _named(zero, "fault_early"), zero)
        stop = _int_op(
            start,
            "add",
            "fault_end",
            _named(zero, "fault_start"),
            _named(zero, count.outputs[0].name),
        )
        begin.inputs["values"].arguments[0].CopyFrom(_named(zero, "fault_start"))
        end.inputs["values"].arguments[0].CopyFrom(_named(zero, "fault_end"))
        place = operations.index(start) + 1
        operations[place:place] = [early, floor, stop]
        copies = [type(op).FromString(op.SerializeToString()) for op in operations]
        del block.operations[:]
        block.operations.extend(copies)


def _named(like: Any, name: str) -> Any:
    argument = type(like)()
    argument.name = name
    return argument


def _int_op(like: Any, kind: str, name: str, x: Any, y: Any) -> Any:
    """An op on int32 [1], made from one."""
    op = type(like).FromString(like.SerializeToString())
    op.type = kind
    op.outputs[0].name = name
    op.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    op.inputs["x"].arguments[0].CopyFrom(x)
    op.inputs["y"].arguments[0].CopyFrom(y)
    return op


def _cache_faults() -> list[Fault]:
    return [
        Fault(
            "keys written one place early after the first call",
            (STEPS,),
            {"onnx": in_file(_write_one_place_early)},
            lambda good: distance_after_cache(good.rung.student, lost=1, shift=-1),
        ),
        Fault(
            "tokens rotated one place early after the first call",
            (STEPS,),
            {"coreml": in_file(_rotate_one_place_early)},
            lambda good: distance_after_cache(good.rung.student, lost=0, shift=-1),
        ),
        Fault(
            "rotary tables end before the context does",
            (POSITIONS,),
            {"onnx": in_tensors("onnx", _end_rope_tables)}
            | {"coreml": in_tensors("coreml", _end_rope_tables)},
            _end_of_tables,
        ),
        Fault(
            "a sliding window where there is none",
            (LOGITS,),
            {"onnx": in_file(_add_window)},
            _windowed,
            "mistral/float",
        ),
    ]


def _row_order_faults() -> list[Fault]:
    return [
        Fault(
            "q/k permutation missing",
            (LOGITS,),
            {"gguf": in_tensors("gguf", restore_rotated_rows)},
            edited(restore_rotated_rows),
        ),
        Fault(
            "q/k permutation where there should be none",
            (LOGITS,),
            {f: in_tensors(f, interleave_rotated_rows) for f in ("onnx", "coreml")},
            edited(interleave_rotated_rows),
        ),
    ]


def interleave_rotated_rows(t: Tensors) -> None:
    """The row order of GGUF's llama, where halves of a head are rotated; for other formats."""
    for layer in range(t.facts.layers):
        for kind in "qk":
            rows = t[t.facts.linears(layer)[kind]]
            split = rows.reshape(-1, 2, t.facts.head_dim // 2, rows.shape[1])
            rows[...] = split.swapaxes(1, 2).reshape(rows.shape)


def restore_rotated_rows(t: Tensors) -> None:
    """A checkpoint's row order, where neighbours are rotated; for GGUF."""
    for layer in range(t.facts.layers):
        for kind in "qk":
            rows = t[t.facts.linears(layer)[kind]]
            split = rows.reshape(-1, t.facts.head_dim // 2, 2, rows.shape[1])
            rows[...] = split.swapaxes(1, 2).reshape(rows.shape)


GRAPH_FAULTS = [
    rope_fault("RoPE theta off", HALF_THETA, "lint: RoPE theta", "llama/float"),
    rope_fault("RoPE scaling dropped", PLAIN_ROPE, "lint: RoPE scaling", "llama3/float"),
    *_row_order_faults(),
    *_cache_faults(),
    *_sliding_faults(),
]
