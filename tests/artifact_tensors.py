"""The tensors of a student or of an artifact, in place: what is written here is what is run.

One change of the weights, written once, is made in a student directory (for ``transformers`` to
judge) and in the bytes of a GGUF, ONNX or Core ML artifact.  Files are taken apart by the formats'
own libraries (``gguf``, ``onnx``, coremltools' protobuf), never by the readers under test.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.gguf_layout import tensor_name
from edgedistill.quantized import QTensor
from edgedistill.student import Student, StudentWriter

Array = npt.NDArray[Any]
CORE_ML = Path("model.mlpackage/Data/com.apple.CoreML")
_BLOB_HEADER = "<IIQQ"  # sentinel, type, size and place of the data (StorageFormat.hpp)


class Tensors(ABC):
    """Tensors by their name in a checkpoint; every array is writable and shares the file's bytes.

    Rows are output features.  In a GGUF of the llama architecture the rows of q and k lie in
    another order within each head.
    """

    def __init__(self, facts: DecoderFacts) -> None:
        self.facts = facts

    @abstractmethod
    def __getitem__(self, name: str) -> Array:
        """A tensor that is not quantized, in the dtype in which it is stored."""

    @abstractmethod
    def scales(self, name: str) -> Array:
        """The scales of a quantized matrix: [rows, groups]."""

    def rope_tables(self) -> tuple[Array, Array]:
        """Cosines and sines [context_tokens, head_dim / 2], where the format stores them."""
        raise NotImplementedError


class StudentTensors(Tensors):
    """All tensors of a student, in memory; :meth:`write` makes a student of them."""

    def __init__(self, student: Path) -> None:
        self._student = Student(student)
        super().__init__(self._student.facts)
        self._values: dict[str, Array | QTensor] = {
            name: self._student.read_quantized(name)
            if name in self._student.grids
            else self._student.read(name)
            for name in self._student.names()
        }

    def __getitem__(self, name: str) -> Array:
        value = self._values[name]
        assert not isinstance(value, QTensor)
        return value

    def scales(self, name: str) -> Array:
        return self.quantized(name).scales

    def quantized(self, name: str) -> QTensor:
        """A quantized matrix."""
        value = self._values[name]
        assert isinstance(value, QTensor)
        return value

    def replace(self, name: str, value: Array | QTensor) -> None:
        """Put another value, of any dtype or grid, in the place of a tensor."""
        self._values[name] = value

    def write(self, dst: Path) -> Path:
        """Write the student to a new directory; returns it."""
        dst.mkdir(parents=True)
        with StudentWriter(dst, self._student) as writer:
            for name, value in self._values.items():
                writer.write(name, value)
        return dst


class GgufTensors(Tensors):
    """Through ``gguf.GGUFReader`` on a writable map; scales of Q8_0, Q5_0, Q4_0 and Q4_1 blocks."""

    _BLOCK_BYTES: ClassVar = {"Q8_0": 34, "Q5_0": 22, "Q4_0": 18, "Q4_1": 20}

    def __init__(self, artifact: Path, facts: DecoderFacts) -> None:
        import gguf

        super().__init__(facts)
        self._reader = gguf.GGUFReader(artifact / "model.gguf", "r+")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def __getitem__(self, name: str) -> Array:
        values: Array = self._tensors[tensor_name(self.facts, name)].data
        return values

    def scales(self, name: str) -> Array:
        tensor = self._tensors[tensor_name(self.facts, name)]
        blocks = tensor.data.reshape(
            len(tensor.data), -1, self._BLOCK_BYTES[tensor.tensor_type.name]
        )
        scales: Array = blocks[..., :2].view("<f2")[..., 0]
        return scales

    def scalar(self, key: str) -> Array:
        """A number in the metadata: an array of one element."""
        value: Array = self._reader.fields[key].parts[-1]
        return value


class OnnxTensors(Tensors):
    """Initializers in ``model.onnx.data``."""

    def __init__(self, artifact: Path, facts: DecoderFacts) -> None:
        import onnx

        super().__init__(facts)
        graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._dtype_of = onnx.helper.tensor_dtype_to_np_dtype
        self._bytes = np.memmap(artifact / "model.onnx.data", np.uint8, "r+")

    def __getitem__(self, name: str) -> Array:
        tensor = self._initializers[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, size = int(place["offset"]), int(place["length"])
        dtype = self._dtype_of(tensor.data_type)
        values: Array = self._bytes[start : start + size].view(dtype).reshape(tensor.dims)
        return values

    def scales(self, name: str) -> Array:
        return self[f"{name}.scales"]

    def rope_tables(self) -> tuple[Array, Array]:
        return self["rope.cos"], self["rope.sin"]


class CoreMlTensors(Tensors):
    """Constants of the program, in ``weight.bin``."""

    _DTYPES: ClassVar = {10: "<f2", 21: "i1", 31: "u1"}  # MIL.proto's DataType

    def __init__(self, artifact: Path, facts: DecoderFacts) -> None:
        super().__init__(facts)
        self._operations = {
            op.outputs[0].name: op
            for op in main_block(read_spec(artifact)).operations
            if op.outputs
        }
        self._bytes = np.memmap(artifact / CORE_ML / "weights/weight.bin", np.uint8, "r+")

    def __getitem__(self, name: str) -> Array:
        return self._blob(self._operations[name.replace(".", "_")].attributes["val"])

    def scales(self, name: str) -> Array:
        (argument,) = self._operations[name.replace(".", "_")].inputs["scale"].arguments
        if argument.WhichOneof("binding") == "name":
            return self._blob(self._operations[argument.name].attributes["val"])
        return self._blob(argument.value)

    def rope_tables(self) -> tuple[Array, Array]:
        return self["rope_cos"], self["rope_sin"]

    def _blob(self, value: Any) -> Array:
        place = value.blobFileValue.offset
        header = self._bytes[place : place + struct.calcsize(_BLOB_HEADER)].tobytes()
        _, _, size, start = struct.unpack(_BLOB_HEADER, header)
        kind = value.type.tensorType
        values: Array = self._bytes[start : start + size].view(self._DTYPES[kind.dataType])
        return values.reshape([d.constant.size for d in kind.dimensions])


FORMATS: dict[str, type[GgufTensors | OnnxTensors | CoreMlTensors]] = {
    "gguf": GgufTensors,
    "onnx": OnnxTensors,
    "coreml": CoreMlTensors,
}


def read_spec(artifact: Path) -> Any:
    """The ``Model`` message of a Core ML artifact."""
    from edgedistill.quiet_coremltools import import_coremltools

    spec = import_coremltools("coremltools.proto.Model_pb2").Model()
    spec.ParseFromString((artifact / CORE_ML / "model.mlmodel").read_bytes())
    return spec


def main_block(spec: Any) -> Any:
    """The one block of a program, whose operations may be edited."""
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


@contextmanager
def edited_program(artifact: Path) -> Iterator[Any]:
    """The block of a Core ML artifact, written back when the ``with`` ends."""
    spec = read_spec(artifact)
    yield main_block(spec)
    (artifact / CORE_ML / "model.mlmodel").write_bytes(spec.SerializeToString())


@contextmanager
def edited_graph(artifact: Path) -> Iterator[Any]:
    """The ``ModelProto`` of an ONNX artifact, written back; weights stay where they are."""
    import onnx

    path = artifact / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    yield model
    path.write_bytes(model.SerializeToString())


def rewrite_gguf(
    artifact: Path,
    changes: dict[str, Any],
    *,
    added: dict[str, Any] | None = None,
    without_tensors: tuple[str, ...] = (),
) -> None:
    """Write a GGUF anew with other metadata.

    Args:
        artifact: the directory of ``model.gguf``.
        changes: key -> value of the same type; None drops the key.
        added: key -> value of any type, in place of what has that key.
        without_tensors: what is left out.
    """
    import gguf

    path, aside = artifact / "model.gguf", artifact / "aside.gguf"
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(aside, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in (added or {}):
            continue
        value = changes.get(key, field.contents())
        if value is not None:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=inner)
    for key, value in (added or {}).items():
        first = value[0] if isinstance(value, list) else value
        inner = gguf.GGUFValueType.get_type(first) if isinstance(value, list) else None
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), sub_type=inner)
    kept = [tensor for tensor in reader.tensors if tensor.name not in without_tensors]
    for tensor in kept:
        writer.add_tensor_info(
            tensor.name,
            tensor.data.shape,
            tensor.data.dtype,
            tensor.data.nbytes,
            tensor.tensor_type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in kept:
        writer.write_tensor_data(tensor.data)
    writer.close()
    aside.replace(path)
