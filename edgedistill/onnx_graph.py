"""Write an ONNX graph whose weights go to disk one by one, as they are added.

``onnx.save_model`` wants every weight in memory before it writes the first; here ``model.onnx``
holds the nodes and, for each weight, its place in ``model.onnx.data``.
Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedistill.errors import InputError
from edgedistill.onnx_package import DATA_FILE, MODEL_FILE

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
ALIGNMENT_BYTES = 64  # a cache line: kernels read the mapped file in place


class OnnxGraph:
    """A graph under construction; leaving the ``with`` block writes ``model.onnx``.

    Args:
        dst: the directory that gets ``model.onnx`` and ``model.onnx.data``.
    """

    def __init__(self, dst: Path) -> None:
        self._dst = dst
        self._data = (dst / DATA_FILE).open("wb")
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in ``shape`` names a free dimension."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self._outputs.append(_value_info(name, dtype, shape))

    def optional_input(self, name: str, default: npt.NDArray[Any]) -> str:
        """Declare an input that has ``default`` when the caller leaves it out."""
        self.input(name, default.dtype, default.shape)
        return self.constant(name, default)

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add a small array to ``model.onnx`` itself."""
        self._add(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """Append an array to ``model.onnx.data`` and forget it."""
        self._data.write(bytes(-self._data.tell() % ALIGNMENT_BYTES))
        offset = self._data.tell()
        self._data.write(np.ascontiguousarray(array).data)
        tensor = TensorProto(name=name, dims=array.shape, data_type=_element_type(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": DATA_FILE, "offset": offset, "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._add(tensor)
        return name

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Add a weight that is another weight's bytes in another shape: stored once, used twice."""
        tensor = TensorProto()
        tensor.CopyFrom(self._initializers[of])
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(shape)
        self._add(tensor)
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, named after its first output, and return that output's name."""
        name = outputs[0]
        made = helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes)
        self._nodes.append(made)
        return name

    def __contains__(self, name: str) -> bool:
        """Whether a weight or constant of that name is in the graph."""
        return name in self._initializers

    def close(self) -> None:
        """Write ``model.onnx``."""
        self._data.close()
        graph = helper.make_graph(
            self._nodes,
            "decoder",
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgedistill"
        )
        (self._dst / MODEL_FILE).write_bytes(model.SerializeToString())

    def _add(self, tensor: Any) -> None:
        if tensor.name in self._initializers:
            raise ValueError(f"{tensor.name} is in the graph already")
        self._initializers[tensor.name] = tensor

    def __enter__(self) -> Self:
        """The graph itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the graph, or after an error only close the data file."""
        if kind is None:
            self.close()
        else:
            self._data.close()


def read_model(path: Path) -> Any:
    """The ``ModelProto`` of a file, its external weights left on the disk.

    Raises:
        InputError: the file is missing or no ONNX model.
    """
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except DecodeError as error:
        raise InputError("is not an ONNX model, or a damaged one", where=str(path)) from error
    return model


def external_bytes(model: Any, *, besides: Collection[str] = ()) -> int:
    """Bytes of a model's external weights, shared ones counted once, some left out by name."""
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in besides:
            place = {entry.key: entry.value for entry in tensor.external_data}
            places[int(place["offset"])] = int(place["length"])
    return sum(places.values())


def _element_type(dtype: npt.DTypeLike) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value_info(name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> Any:
    return helper.make_tensor_value_info(name, _element_type(dtype), list(shape))
