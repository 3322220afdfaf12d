"""llama.cpp's own quantizer, by the low-level interface of ``llama-cpp-python`` 0.3.36.

Its importance matrix is the mean of the squared inputs of every column, as ``llama-imatrix``
collects it; here it comes out of our decoder, on the same calibration ids as everything else.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgedistill.calibration import Ids
from edgedistill.decoder_forward import DecoderForward
from edgedistill.errors import StageError
from edgedistill.gguf_file import GgufFile, gguf_package
from edgedistill.gguf_layout import tensor_name
from edgedistill.student import Student

# GGUF name -> float32 [columns]
ImportanceMatrix = dict[str, npt.NDArray[np.float32]]

# The matrices that read the same thing, by the first of them.
READ_TOGETHER = {"q": "qkv", "o": "o", "gate": ("gate", "up"), "down": ("down",)}
_LOG_ERROR = 4  # ggml.h


def importance_matrix(student: Student, ids: list[Ids]) -> ImportanceMatrix:
    """The mean of the squared inputs of every column of the blocks' matrices.

    Args:
        student: float.
        ids: the calibration text, sequences of one length, int64 [tokens] each.
    """
    forward, facts = DecoderForward(student), student.facts
    found: ImportanceMatrix = {}
    with torch.inference_mode():
        hidden = [forward.embed(torch.from_numpy(sequence)[None]) for sequence in ids]
        for layer in range(facts.layers):
            sums: dict[str, torch.Tensor] = {}

            def watch(first: str, x: torch.Tensor, into: dict[str, torch.Tensor] = sums) -> None:
                squares = x.double().square().sum(dim=(0, 1))
                into[first] = into.get(first, torch.zeros_like(squares)) + squares

            hidden = [forward.block(layer, states, watch) for states in hidden]
            count = sum(len(sequence) for sequence in ids)
            for first, squares in sums.items():
                for short in READ_TOGETHER[first]:
                    name = tensor_name(facts, facts.linears(layer)[short])
                    found[name] = (squares / count).float().numpy()
    return found


def quantize(
    source: Path, out: Path, file_type: str, importance: ImportanceMatrix | None = None
) -> dict[str, int]:
    """Write ``out`` as ``llama-quantize`` would, on one thread.

    Args:
        source: a float GGUF file.
        out: the new file.
        file_type: such as ``Q4_K_M``.
        importance: by tensor; without it types that need one are refused by llama.cpp.

    Returns:
        Weights by block type, as they lie in the file (types fall back where 256 does not divide
        the columns).

    Raises:
        StageError: llama.cpp fails; its log tells why.
    """
    import llama_cpp

    said: list[str] = []

    def remember(level: int, text: bytes, _user_data: object) -> None:
        if level == _LOG_ERROR:
            said.append(text.decode("utf-8", errors="replace").strip())

    parameters = llama_cpp.llama_model_quantize_default_params()
    known = {name for name, _ in parameters._fields_}
    # ctypes takes an unknown field without a word.
    if not {"nthread", "ftype", "imatrix"} <= known:
        raise StageError(f"llama_model_quantize_params of this version has other fields: {known}")
    parameters.nthread = 1
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    entries = _entries(llama_cpp, importance or {})
    if importance:
        parameters.imatrix = entries
    # The callback is the library's only one: whoever set it before gets it back.
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    callback = llama_cpp.llama_log_callback(remember)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(out).encode(), ctypes.byref(parameters)
        )
    finally:
        llama_cpp.llama_log_set(before, data)
    if status:
        raise StageError(f"llama_model_quantize returned {status}: {'; '.join(said)}")
    return weights_by_type(out)


def weights_by_type(file: Path) -> dict[str, int]:
    """How many weights of a GGUF file lie in which block type, most first."""
    kinds = gguf_package().GGMLQuantizationType
    known = {int(kind): str(kind.name) for kind in kinds}
    counts: Counter[str] = Counter()
    for tensor in GgufFile(file).tensors.values():
        counts[known.get(tensor.type_id, str(tensor.type_id))] += int(np.prod(tensor.shape))
    return dict(counts.most_common())


def _entries(library: Any, importance: ImportanceMatrix) -> Any:
    """The array of ``llama_model_imatrix_data``, ended by a null name, with all it points to."""
    kind = library.llama_model_imatrix_data
    entries = (kind * (len(importance) + 1))()
    kept = []
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        values = np.ascontiguousarray(values, dtype=np.float32)
        kept.append((name.encode(), values))
        entry.name = kept[-1][0]
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(values)
    entries.kept = kept
    return entries
