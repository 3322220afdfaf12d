"""A GGUF file's own weights under the reference's config: what the file would be if only rounded.

Held against these, a file shows what its metadata, tokenizer and row order do to it; held against
the reference, these show what rounding alone costs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_layout import checkpoint_tensors, file_shape, file_tensors
from edgedistill.progress import track
from edgedistill.results import Document
from edgedistill.runtimes.llama_cpp import weights_file
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.lint_gguf import storage_name

LOSS_FILE = "weight_loss.json"
FLOATS = ("float32", "float16", "BF16", "F64")


class TensorLoss(Document):
    """How one tensor of a file differs from the reference's.

    Attributes:
        stored: how the file holds it.
        relative_error: norm of the difference / norm of the reference's.
        correlation: cosine between the two.
    """

    stored: str
    relative_error: float
    correlation: float


class WeightLoss(Document):
    """All tensors of a file against the reference's.

    Attributes:
        bits_per_weight: bytes of all tensors x 8 / parameters.
        tensors: by the checkpoint's name.
    """

    bits_per_weight: float
    tensors: dict[str, TensorLoss]


def write_own_weights(path: Path, reference: Path, dst: Path) -> None:
    """Write the weights of a GGUF file as a float32 student with the reference's config.

    Args:
        path: the file, or a directory with one.
        reference: a student directory; its config and tokenizer are kept.
        dst: an empty directory; receives the student and ``weight_loss.json``.

    Raises:
        InputError: the file is damaged, or lacks a tensor that the reference has in that shape.
    """
    file, student = GgufFile(weights_file(path)), Student(reference)
    facts = student.facts
    tensors: dict[str, TensorLoss] = {}
    places = file_tensors(facts, file.tensors)
    with StudentWriter(dst, student) as writer:
        for place in track(list(places), label="reading the file's weights"):
            stored, parts = _read(file, student, place, places[place])
            for name, values in parts.items():
                tensors[name] = _compare(stored, values, student.read(name))
                writer.write(name, values)
    size_bytes = sum(tensor.size_bytes for tensor in file.tensors.values())
    loss = WeightLoss(bits_per_weight=8 * size_bytes / facts.parameters, tensors=tensors)
    (dst / LOSS_FILE).write_text(loss.model_dump_json(indent=2), encoding="utf-8")


def _read(
    file: GgufFile, student: Student, there: str, names: list[str]
) -> tuple[str, dict[str, npt.NDArray[np.float32]]]:
    """(how a tensor is stored, those of the checkpoint in it, in the checkpoint's row order)."""
    shape = file_shape(student.facts, names)
    if there not in file.tensors:
        raise InputError(f"has no tensor {there}", where=str(file.path))
    if file.tensors[there].shape != shape:
        raise InputError(
            f"{there} has the shape {file.tensors[there].shape}, the reference has {shape}",
            where=str(file.path),
        )
    parts = checkpoint_tensors(student.facts, names, file.read(there))
    return storage_name(file.tensors[there].type_id), parts


def _compare(
    stored: str, found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]
) -> TensorLoss:
    a, b = found.reshape(-1), expected.reshape(-1)
    norm_a, norm_b = (float(np.sqrt(np.dot(v, v))) for v in (a, b))
    difference = a - b
    error = float(np.sqrt(np.dot(difference, difference)))
    if norm_b == 0.0:  # a bias of zeros
        return TensorLoss(stored=stored, relative_error=error, correlation=float(norm_a == 0.0))
    cosine = float(np.dot(a, b)) / (norm_a * norm_b) if norm_a else 0.0
    return TensorLoss(stored=stored, relative_error=error / norm_b, correlation=cosine)
