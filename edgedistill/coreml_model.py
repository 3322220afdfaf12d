"""A Core ML program as a ``Model`` message, its weights streamed into a weight file beside it.

``coremltools.convert`` holds every constant of a program, writes them to a temporary directory and
copies that.  Here its own stages run (of coremltools 9.0), but constants are asked for one by one,
when the message comes to them: the program holds their shapes alone.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgedistill.coreml_blobs import BlobWriter
from edgedistill.coreml_program import Built
from edgedistill.coreml_weights import Parts
from edgedistill.progress import Bar, progress_bar
from edgedistill.quiet_coremltools import import_coremltools

_CONVERTER = "coremltools.converters.mil.converter"
_LOAD = "coremltools.converters.mil.backend.mil.load"
_FILE_IN_PROGRAM = "@model_path/weights/weight.bin"


def write_model(built: Built, weight_file: Path) -> Any:
    """Convert a program to the message that an ``.mlpackage`` holds, for iOS 18.

    Args:
        built: the program, its inputs and what its constants hold.
        weight_file: is written, a tensor at a time.

    Returns:
        ``coremltools.proto.Model_pb2.Model``.

    Raises:
        InputError: a weight does not fit into float16, or its bytes do not fit its shape.
    """
    ct, converter = import_coremltools(), import_coremltools(_CONVERTER)
    with (
        BlobWriter(weight_file) as file,
        progress_bar(len(built.blobs), "writing Core ML") as bar,
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars would tear ours
    ):
        backend = _Backend(built.blobs, file, bar, ct.target.iOS18)
        registry = SimpleNamespace(
            frontends=converter.ConverterRegistry.frontends,
            backends={"mlprogram": lambda: backend.message},
        )
        model, _ = converter.mil_convert_to_proto(
            built.program,
            "milinternal",
            "mlprogram",
            registry,
            main_pipeline=ct.PassPipeline.EMPTY,  # the default one rewrites constants
            inputs=built.inputs,
            specification_version=ct.target.iOS18,
        )
    metadata = model.description.metadata.userDefined
    metadata["com.github.apple.coremltools.version"] = ct.__version__
    metadata["com.github.apple.coremltools.source"] = "milinternal"
    return model


@dataclass(frozen=True)
class _Backend:
    """coremltools' writer of messages, with another hand for what goes into the weight file."""

    blobs: dict[str, Parts]
    file: BlobWriter
    bar: Bar
    specification_version: Any

    def message(self, program: Any, **_options: Any) -> Any:
        """The ``Model`` of a program that has gone through all passes."""
        load = import_coremltools(_LOAD)
        exporter = load.MILProtoExporter(program, "", self.specification_version)
        immediate = exporter.get_milproto_value
        exporter.create_file_value = self._in_file
        exporter.get_milproto_value = lambda var: (
            self._in_file(var) if var.name in self.blobs else immediate(var)
        )
        written = exporter.export()
        return load.CoreMLProtoExporter(
            program,
            written,
            None,
            None,
            classifier_config=None,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=self.specification_version,
        ).export(self.specification_version)

    def _in_file(self, var: Any) -> Any:
        """The value of a constant, a place in the weight file, to which its bytes now go."""
        load, types = import_coremltools(_LOAD), import_coremltools(_LOAD).types
        parts = self.blobs[var.name]() if var.name in self.blobs else [var.val]
        kind = types.builtin_to_string(var.dtype)
        offset = self.file.write(var.name, kind, var.val.size, parts)
        self.bar.advance()
        return load.create_file_value_tensor(
            file_name=_FILE_IN_PROGRAM,
            offset=offset,
            dim=var.val.shape,
            data_type=load.types_to_proto_primitive(var.dtype),
        )
