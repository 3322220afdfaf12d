"""What a Core ML package of ours says of the model in it: program, constants, files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.mil_package import Constant, Operation, Package, read_package
from edgedistill.verify.side_files import read_ends, read_template, read_token
from edgedistill.verify.stated import Stated, describe, table_frequencies, theta_and_divisors

PACKAGE = "model.mlpackage"
_EMBEDDING = "model_embed_tokens_weight"
_QUANTIZED, _TABLE = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
# Ops that weigh the tokens, one a layer, and those that may follow the head's matrix.
_ATTENTION = ("scaled_dot_product_attention", "softmax")
_BEHIND_HEAD = ("mul", "tanh", "real_div")
BITS = {"uint2": 2, "uint3": 3, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
# float16 keeps 11 bits; the root of epsilon is stored, and the base of the rotary frequencies is
# the head_dim / 2-th power of what the tables say.
NORM_TOLERANCE, ROPE_TOLERANCE = 4e-3, 2e-2


def read_coreml(artifact: Path) -> Stated:
    """Read ``model.mlpackage`` and the files beside it.

    Raises:
        InputError: a file is missing or damaged, or the program is not a decoder of ours.
        UnavailableError: coremltools is not installed.
    """
    program = _Program(read_package(artifact / PACKAGE))
    rope = program.rope("rope")
    beside = (artifact / "tokenizer_config.json").is_file()
    return Stated(
        counts=program.counts(),
        context_tokens=program.context_tokens(),
        tied_embeddings=program.tied(),
        norm_epsilons=program.norm_epsilons(),
        norm_tolerance=NORM_TOLERANCE,
        **program.sliding(),
        rope_theta=rope[0] if rope else None,
        rope_divisors=rope[1] if rope else None,
        rope_tolerance=ROPE_TOLERANCE,
        bos_id=read_token(artifact, "bos_token"),
        end_ids=read_ends(artifact) if beside else None,
        storage=program.storage(),
        chat_template=read_template(artifact),
        has_template=beside,
    )


class _Program:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._constants = package.constants
        self._made = {op.outputs[0]: op for op in package.operations if op.outputs}

    def counts(self) -> dict[str, int]:
        found: dict[str, int | None] = {}
        cache = self._package.states.get("key_cache")
        if cache is None or len(cache[1]) != 5:
            raise InputError("has no key_cache of five dimensions", where=str(self._package.path))
        found["layers"], _, found["kv_heads"], _, head_dim = cache[1]
        found["head_dim"] = head_dim
        found["vocab_size"], found["hidden_size"] = self._shape(_EMBEDDING) or (None, None)
        queries = self._shape("model_layers_0_self_attn_q_proj_weight")
        found["heads"] = queries[0] // max(1, head_dim) if queries else None
        gate = self._shape("model_layers_0_mlp_gate_proj_weight")
        found["ffn_size"] = gate[0] if gate else None
        return {name: value for name, value in found.items() if value is not None}

    def context_tokens(self) -> int | None:
        """What its input takes; a metadata entry that contradicts it counts as none."""
        spec = self._package.inputs.get("input_ids")
        longest = spec.largest[-1] if spec and spec.largest else None
        stated = self._package.metadata.get("context_tokens", str(longest))
        return longest if stated == str(longest) else None

    def tied(self) -> bool | None:
        """Whether the matrix that makes the logits is the embedding."""
        head, steps = self._made.get("logits"), 0
        while head is not None and head.kind in _BEHIND_HEAD and steps <= len(_BEHIND_HEAD):
            head, steps = self._maker(head.inputs.get("x", (None,))[0]), steps + 1
        weight = head.inputs.get("weight", (None,))[0] if head else None
        return weight == _EMBEDDING if isinstance(weight, str) else None

    def norm_epsilons(self) -> frozenset[float]:
        """Each norm takes the maximum with the root of its epsilon."""
        roots = (
            self._constant(op.inputs["y"][0])
            for op in self._package.operations
            if op.kind == "maximum" and "y" in op.inputs
        )
        values = (float(root.values().reshape(-1)[0]) for root in roots if root is not None)
        return frozenset(value * value for value in values)

    def sliding(self) -> dict[str, Any]:
        """Which layers hide what lies before a window, told by the mask that each one adds."""
        windows = [self._window(op) for op in self._package.operations if op.kind in _ATTENTION]
        found = {window for window in windows if window is not None}
        if not found:
            return {"sliding_layers": ()}
        rope = self.rope("rope_sliding") or self.rope("rope")
        return {
            "window_tokens": found.pop() if len(found) == 1 else None,
            "sliding_layers": tuple(window is not None for window in windows),
            "sliding_rope_theta": rope[0] if rope else None,
        }

    def _window(self, attention: Operation) -> int | None:
        """What the mask of one attention is compared with; None where it is the caller's own."""
        if attention.kind == "softmax":  # of scores to which the mask was added
            added = self._maker(attention.inputs["x"][0])
            mask = self._maker(added.inputs["y"][0]) if added else None
        else:
            mask = self._maker(attention.inputs["attn_mask"][0])
        if mask is not None and mask.kind == "tile":
            mask = self._maker(mask.inputs["x"][0])
        if mask is None or mask.kind != "select":
            return None
        near = self._maker(mask.inputs["cond"][0])
        window = self._constant(near.inputs["y"][0]) if near else None
        return int(window.values().reshape(-1)[0]) if window is not None else None

    def rope(self, name: str) -> tuple[float, npt.NDArray[np.float64]] | None:
        """(theta, divisors) of the tables ``<name>_cos`` and ``<name>_sin``, if there are such."""
        tables = [self._constants.get(f"{name}_{part}") for part in ("cos", "sin")]
        if any(table is None or len(table.shape) != 2 or table.shape[0] < 2 for table in tables):
            return None
        cos, sin = (table.values() for table in tables if table is not None)
        return theta_and_divisors(table_frequencies(cos, sin))

    def storage(self) -> dict[str, str]:
        """The program's name of a tensor (dots are underscores) -> how it is stored."""
        found = {name: constant.dtype for name, constant in self._constants.items()}
        for name, op in self._made.items():
            if op.kind == _QUANTIZED:
                found[name] = self._quantized(op)
        return found

    def _quantized(self, op: Operation) -> str:
        data, scale = op.inputs["data"][0], self._constant(op.inputs["scale"][0])
        if scale is None:
            return "quantized, without scales"
        shape, bits = self._data(data)
        groups = scale.shape[-1] if scale.shape else 0
        offset = "offset" in op.inputs
        group_size = shape[-1] // groups if shape and groups else 0
        return describe(bits, group_size, zeros=offset, scales=scale.dtype)

    def _data(self, data: str | Constant) -> tuple[tuple[int, ...], int]:
        """(shape, bits) of codes, which at 2 and 3 bits go through a table."""
        table = self._made.get(data) if isinstance(data, str) else None
        if table is not None and table.kind == _TABLE:
            data = table.inputs["indices"][0]
        constant = self._constant(data)
        return (constant.shape, BITS.get(constant.dtype, 0)) if constant else ((), 0)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of a matrix, quantized or not."""
        op = self._made.get(name)
        if op is not None and op.kind == _QUANTIZED:
            shape = self._data(op.inputs["data"][0])[0]
        else:
            constant: Any = self._constants.get(name)
            shape = constant.shape if constant is not None else ()
        return shape if len(shape) == 2 else None

    def _maker(self, source: str | Constant | None) -> Operation | None:
        return self._made.get(source) if isinstance(source, str) else None

    def _constant(self, source: str | Constant) -> Constant | None:
        return self._constants.get(source) if isinstance(source, str) else source
