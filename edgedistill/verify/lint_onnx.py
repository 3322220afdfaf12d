"""What an ONNX package says of the model in it: its graph, its tables, ``genai_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.onnx_package import (
    CONFIG_FILE,
    FIRST_LOGIT,
    decoder_config,
    graph_file,
    not_installed,
)
from edgedistill.student import read_json
from edgedistill.verify.lint_numbers import ROPE_MAGNITUDE
from edgedistill.verify.lint_onnx_numbers import (
    attention_numbers,
    attribute,
    behind_head,
    stream_numbers,
)
from edgedistill.verify.side_files import read_template
from edgedistill.verify.stated import Stated, describe, table_frequencies, theta_and_divisors

_FLOAT = 1
FLOAT_DTYPES = {_FLOAT: "float32", 10: "float16", 16: "bfloat16"}  # TensorProto.DataType
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
# Inputs of GroupQueryAttention: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
_COS, _SIN = 7, 8
_SUFFIXES = (".codes", ".blocks")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# float32 tables: an error of 6e-8 at place p is 6e-8 / p of a frequency, theta takes its
# head_dim / 2-th power.
TABLE_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


def read_onnx(artifact: Path) -> Stated:
    """Read the graph and the configuration of a package; weights stay on the disk.

    Raises:
        InputError: a file is missing or damaged.
        UnavailableError: the ``onnx`` package is not installed.
    """
    config = _genai_config(artifact)
    graph = _Graph(graph_file(artifact))
    rope = graph.rope(sliding=False) or graph.rope(sliding=True)
    sliding_rope, windows = graph.rope(sliding=True), graph.windows()
    begin = config.get("bos_token_id")
    beside = (artifact / "tokenizer_config.json").is_file()
    counts, head_size = graph.counts(), _whole(decoder_config(artifact).get("head_size"))
    if "head_dim" not in counts and head_size is not None:  # the caches' shape has a name there
        counts["head_dim"] = head_size
    magnitude: dict[str, float | None] = {ROPE_MAGNITUDE: rope.magnitude} if rope else {}
    return Stated(
        counts=counts,
        context_tokens=_whole(config.get("context_length")),
        tied_embeddings=graph.tied(),
        norm_epsilons=graph.norm_epsilons(),
        window_tokens=next((window for window in windows if window > 0), None),
        sliding_layers=_slide(windows) if windows else None,
        sliding_rope_theta=sliding_rope.theta if sliding_rope else None,
        unrotated_layers=graph.unrotated(),
        numbers=graph.numbers(counts.get("head_dim")) | magnitude,
        rope_theta=rope.theta if rope else None,
        rope_divisors=rope.divisors if rope else None,
        rope_tolerance=rope.tolerance if rope else 1e-6,
        bos_id=begin if isinstance(begin, int) else None,
        end_ids=_ends(config.get("eos_token_id")) if config else None,
        storage=graph.storage(),
        chat_template=read_template(artifact),
        has_template=beside,
        architecture=str(config.get("type")) if config else None,
    )


class _Rope(NamedTuple):
    """What a pair of tables was made with, and the relative error of their dtype."""

    theta: float
    divisors: npt.NDArray[np.float64]
    magnitude: float
    tolerance: float


class _Graph:
    def __init__(self, path: Path) -> None:
        try:
            from edgedistill.onnx_graph import read_model
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        self._path = path
        graph = read_model(self._path).graph
        self._outputs = {value.name: value for value in graph.output}
        self._inputs = {value.name: value for value in graph.input}
        self._nodes = list(graph.node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}

    def counts(self) -> dict[str, int]:
        attention = self._attention()
        found: dict[str, int | None] = {"layers": len(attention) or len(self._caches()) or None}
        if attention:
            found["heads"] = attribute(attention[0], "num_heads")
            found["kv_heads"] = attribute(attention[0], "kv_num_heads")
        found["head_dim"] = _last_size(self._caches()[0]) if self._caches() else None
        logits = self._outputs.get("logits")
        found["vocab_size"] = None if logits is None else _last_size(logits)
        scales = [n.input[1] for n in self._of(NORMS[0]) if n.input[1] in self._initializers]
        found["hidden_size"] = self._initializers[scales[0]].dims[0] if scales else None
        gate = self._matrices().get("model.layers.0.mlp.gate_proj.weight")
        found["ffn_size"] = None if gate is None else gate[0]
        return {name: int(value) for name, value in found.items() if value is not None}

    def _caches(self) -> list[Any]:
        return [value for name, value in self._inputs.items() if name.endswith(".key")]

    def tied(self) -> bool | None:
        """Whether the node that makes the logits reads the embedding; None: it cannot be told."""
        head, _ = behind_head(self._nodes)
        name = _stem(head.input[1]) if head is not None and len(head.input) > 1 else ""
        return {_EMBEDDING: True, _HEAD: False}.get(name)

    def windows(self) -> list[int]:
        """Tokens that each layer attends to; 0 or less for all; empty where it is not told."""
        return [int(attribute(n, "local_window_size") or 0) for n in self._attention()]

    def unrotated(self) -> tuple[bool, ...] | None:
        """Of each layer whether it is not rotated; others' graphs may rotate by other nodes."""
        if FIRST_LOGIT not in self._inputs:
            return None
        return tuple(not attribute(node, "do_rotary") for node in self._attention())

    def numbers(self, head_dim: int | None) -> dict[str, float | None]:
        """Scales and soft caps; of others' graphs those that attention states as attributes."""
        if head_dim is None or not self._attention():
            return {}
        found = attention_numbers(self._attention(), head_dim)
        if FIRST_LOGIT in self._inputs:
            found |= stream_numbers(self._nodes, self._scalars())
        return found

    def _scalars(self) -> dict[str, float]:
        scalars = (t for t in self._initializers.values() if not t.dims and t.data_type == _FLOAT)
        return {tensor.name: float(self._array(tensor.name)) for tensor in scalars}

    def _attention(self) -> list[Any]:
        return self._of("GroupQueryAttention")

    def norm_epsilons(self) -> frozenset[float]:
        norms = (node for node in self._nodes if node.op_type in NORMS)
        found = (attribute(node, "epsilon") for node in norms)
        return frozenset(float(value) for value in found if value is not None)

    def storage(self) -> dict[str, str]:
        """Tensors of the checkpoint by the names that our exporter gives them."""
        found = {
            name: FLOAT_DTYPES.get(tensor.data_type, f"type {tensor.data_type}")
            for name, tensor in self._initializers.items()
            if name.endswith((".weight", ".bias"))
        }
        for node in (*self._of("MatMulNBits"), *self._of("GatherBlockQuantized")):
            gathers = node.op_type == "GatherBlockQuantized"
            codes, scales = (node.input[i] for i in ((0, 2) if gathers else (1, 2)))
            tensor = self._initializers.get(scales)
            kind = -1 if tensor is None else int(tensor.data_type)
            stored = describe(
                int(attribute(node, "bits") or 0),
                int(attribute(node, "block_size") or 0),
                zeros=len(node.input) > 3 and bool(node.input[3]),
                scales=FLOAT_DTYPES.get(kind, f"type {kind}"),
            )

            found[_stem(codes)] = stored
        return found

    def rope(self, *, sliding: bool) -> _Rope | None:
        """What the tables say that layers of that kind read; None where none reads any.

        Those that are not rotated do not.
        """
        for node, window in zip(self._attention(), self.windows(), strict=True):
            names = tuple(node.input[_COS : _SIN + 1])
            if (window > 0) != sliding or len(names) < 2 or not attribute(node, "do_rotary"):
                continue
            if not all(name in self._initializers for name in names):
                return None
            cos, sin = (self._array(name) for name in names)
            if cos.shape != sin.shape or cos.ndim != 2 or len(cos) < 2 or not cos.size:
                raise InputError("has rotary tables of a strange shape", where=str(self._path))
            theta, divisors = theta_and_divisors(table_frequencies(cos, sin))
            tolerance = TABLE_TOLERANCE["float32" if cos.dtype == np.float32 else "float16"]
            return _Rope(theta, divisors, float(cos[0, 0]), tolerance)
        return None

    def _of(self, kind: str) -> list[Any]:
        return [node for node in self._nodes if node.op_type == kind]

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """Checkpoint's name -> (rows, columns)."""
        found = {
            name: (tensor.dims[0], tensor.dims[1])
            for name, tensor in self._initializers.items()
            if len(tensor.dims) == 2 and name.endswith(".weight")
        }
        for node in self._of("MatMulNBits"):
            found[_stem(node.input[1])] = (attribute(node, "N"), attribute(node, "K"))
        return found

    def _array(self, name: str) -> npt.NDArray[Any]:
        from onnx import numpy_helper

        try:
            values: npt.NDArray[Any] = numpy_helper.to_array(self._stored(name))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{name} cannot be read ({error})", where=str(self._path)) from error
        return values

    def _stored(self, name: str) -> Any:
        """An initializer with its bytes in it; onnx itself refuses files that are hard links."""
        from onnx import TensorProto

        tensor = self._initializers[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor
        place = {entry.key: entry.value for entry in tensor.external_data}
        if Path(place["location"]).name != place["location"]:
            raise ValueError(f"its data lie outside the directory, at {place['location']!r}")
        offset, length = int(place.get("offset", 0)), int(place["length"])
        path = self._path.parent / place["location"]
        if not 0 <= offset <= offset + length <= path.stat().st_size:
            raise ValueError(f"{length} bytes from {offset} on are not in {path.name}")
        whole = TensorProto()
        whole.CopyFrom(tensor)
        whole.data_location = TensorProto.DEFAULT
        del whole.external_data[:]
        with path.open("rb") as file:
            file.seek(offset)
            whole.raw_data = file.read(length)
        return whole


def _stem(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _slide(windows: list[int]) -> tuple[bool, ...]:
    """Of each layer whether it slides; empty: none does.  An odd window is none of the model's."""
    slides = next((window for window in windows if window > 0), None)
    return tuple(w == slides for w in windows) if slides is not None else ()


def _last_size(value: Any) -> int | None:
    dimensions = value.type.tensor_type.shape.dim
    return dimensions[-1].dim_value or None if dimensions else None


def _genai_config(artifact: Path) -> dict[str, Any]:
    """The model of ``genai_config.json``; empty where there is no such file."""
    path = artifact / CONFIG_FILE
    if not path.is_file():
        return {}
    config = read_json(path).get("model")
    if not isinstance(config, dict):
        raise InputError("has no model", where=str(path))
    return config


def _ends(stated: Any) -> frozenset[int]:
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in listed if isinstance(i, int))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None
