"""Core ML: a stateful ``model.mlpackage`` for iOS 18 and macOS 15."""

from __future__ import annotations

import math
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import edgedistill
from edgedistill.coreml_weights import INTEGER_BITS, TABLE_BITS
from edgedistill.errors import InputError
from edgedistill.exporter import Exporter
from edgedistill.quantized import Grid
from edgedistill.student import Student, copy_side_files, write_json

PACKAGE = "model.mlpackage"
MODEL_FILE = "com.apple.CoreML/model.mlmodel"
WEIGHTS_FOLDER = "com.apple.CoreML/weights"
WEIGHTS_FILE = f"{WEIGHTS_FOLDER}/weight.bin"
NAMESPACE = uuid.UUID("6d4c2a8e-0f0b-5c55-9f0e-4f6a1f2b7c11")


class Coreml(Exporter):
    """Builds the program op by op (nothing is traced) and keeps its constants as they are written.

    The convention of inputs, states and output stands in :mod:`edgedistill.coreml_program`.
    """

    extra: ClassVar[str] = "coreml"
    runtime: ClassVar[str] = "core_ml"

    def holds(self, grid: Grid) -> bool:
        """2, 3, 4 and 8 bits in groups of any size, with fixed and with integer zeros."""
        return grid.bits in (*TABLE_BITS, *INTEGER_BITS)

    def stored_bytes(self, shape: tuple[int, ...], grid: Grid | None) -> int:
        """Codes, float16 scales, zeros as wide as what they are taken from; float16 of all else."""
        weights = math.prod(shape)
        if grid is None:
            return 2 * weights
        groups = weights // grid.group_size
        through_table = grid.bits in TABLE_BITS  # of bytes, so zeros are bytes too
        zero_bits = 8 if through_table else grid.bits
        zeros = -(-groups * zero_bits // 8) if grid.zero == "integer" else 0
        table = grid.max_code + 1 if through_table else 0
        return -(-weights * grid.bits // 8) + 2 * groups + zeros + table

    def export(self, student: Student, dst: Path, *, context_tokens: int) -> None:
        """Write ``model.mlpackage`` with tokenizer, chat template and configs beside it.

        Raises:
            InputError: a grid that the format cannot carry, a weight that does not fit into
                float16, or a context longer than the student's.
            UnavailableError: coremltools is not installed.
        """
        self.refuse_misfit(student)
        for name, grid in student.grids.items():
            if not self.holds(grid):
                raise InputError(
                    f"{name} is on {grid}, which no constant of Core ML holds",
                    where=str(student.path),
                    hint="quantize to 2, 3, 4 or 8 bits",
                )
        self.refuse_context(student, context_tokens)
        from edgedistill.coreml_model import write_model
        from edgedistill.coreml_program import build_program

        package = dst / PACKAGE
        built = build_program(student, context_tokens)
        (package / "Data" / WEIGHTS_FOLDER).mkdir(parents=True)
        model = write_model(built, package / "Data" / WEIGHTS_FILE)
        _describe(model, student, context_tokens)
        _write_program(model, package)
        copy_side_files(student.path, dst)
        write_json(dst / "config.json", student.config)

    def weight_bytes(self, artifact: Path) -> int:
        """Bytes of all constants in the weight file, its headers and padding left out."""
        from edgedistill.mil_weight_file import WeightFile

        return WeightFile(artifact / PACKAGE / "Data" / WEIGHTS_FILE).data_bytes


def _describe(spec: Any, student: Student, context_tokens: int) -> None:
    """Metadata without a date: the same student gives the same bytes."""
    metadata = spec.description.metadata
    metadata.shortDescription = (
        f"{student.facts.family} decoder, {context_tokens} tokens of context"
    )
    metadata.versionString = edgedistill.__version__
    metadata.userDefined["edgedistill"] = edgedistill.__version__
    metadata.userDefined["context_tokens"] = str(context_tokens)


def _write_program(spec: Any, package: Path) -> None:
    """What an mlpackage has beside its weights, identifiers made from the contents, not at random.

    Layout: ``modelpackage/src/ModelPackage.cpp`` of https://github.com/apple/coremltools.
    """
    program = spec.SerializeToString(deterministic=True)
    (package / "Data" / MODEL_FILE).write_bytes(program)
    digest = sha256(program).hexdigest()
    model_id, weights_id = (
        str(uuid.uuid5(NAMESPACE, f"{n} {digest}")) for n in ("model", "weights")
    )
    author = "com.apple.CoreML"
    entries = {
        model_id: {
            "author": author,
            "description": "CoreML Model Specification",
            "name": "model.mlmodel",
            "path": MODEL_FILE,
        },
        weights_id: {
            "author": author,
            "description": "CoreML Model Weights",
            "name": "weights",
            "path": WEIGHTS_FOLDER,
        },
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": model_id,
    }
    write_json(package / "Manifest.json", manifest)
