"""ONNX decoders that others exported, by their own inputs: those of genai's builder and optimum.

Past keys and values go in and come out as arrays, so the session can be taken back to any place.
It is for checking, not for speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError, StageError, UsageError
from edgedistill.onnx_package import CONFIG_FILE, decoder_config, graph_file, not_installed
from edgedistill.runtimes.onnx_runtime import CPU, OnnxRuntime, runtime_errors
from edgedistill.session import Agreement, Logits, Runtime, Session

PREFILL_TOKENS = 256
LOGIT_ROWS = 128
DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_PAST, _PRESENT = "past_key_values.", "present."


class OtherOnnx(Runtime):
    """ONNX Runtime on graphs that do not follow our convention."""

    extra: ClassVar[str] = OnnxRuntime.extra
    limitation: ClassVar[str | None] = "run by its own inputs, for checking: it was not timed so"
    float_agreement: ClassVar[Agreement] = OnnxRuntime.float_agreement
    quantized_agreement: ClassVar[Agreement] = OnnxRuntime.quantized_agreement

    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> Session:
        """Load the graph of a directory."""
        return OtherOnnxSession(artifact, context_tokens=context_tokens, threads=threads)

    def settings(self) -> dict[str, str]:
        """Versions and provider; the accuracy level is the graph's own."""
        settings = OnnxRuntime().settings()
        return {name: value for name, value in settings.items() if name != "accuracy_level"}


class OtherOnnxSession(Session):
    """A decoder with ``input_ids``, ``attention_mask``, perhaps ``position_ids``, and a cache.

    Args:
        artifact: the directory of the graph.
        context_tokens: most tokens that it will be given.
        threads: for ONNX Runtime.

    Raises:
        InputError: no graph, a damaged one, or inputs that are not known here.
        UnavailableError: ONNX Runtime is not installed.
    """

    def __init__(self, artifact: Path, *, context_tokens: int, threads: int) -> None:
        self._artifact = artifact
        self._path = graph_file(artifact)
        self._model, self._errors = _load(self._path, threads)
        self._inputs = {value.name: value for value in self._model.get_inputs()}
        self._outputs = [value.name for value in self._model.get_outputs()]
        self._refuse_unknown()
        self._names = [name for name in self._inputs if name.startswith(_PAST)]
        self._past = {name: self._empty(name) for name in self._names}
        self.context_tokens = context_tokens
        self.position = 0
        size = self._model.get_outputs()[self._outputs.index("logits")].shape[-1]
        self.vocab_size = size if isinstance(size, int) else self._probe()

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append ``ids`` in parts."""
        self._check(ids)
        for start in range(0, len(ids), PREFILL_TOKENS):
            last: Logits = self._run(ids[start : start + PREFILL_TOKENS])[-1]
        return last

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append ``ids``; a graph that gives the last position alone is run token by token."""
        self._check(ids)
        for start in range(0, len(ids), LOGIT_ROWS):
            chunk = ids[start : start + LOGIT_ROWS]
            before, position = self._past, self.position
            logits = self._run(chunk)
            if len(logits) == len(chunk):
                yield logits
                continue
            self._past, self.position = before, position
            yield np.concatenate([self._run([token]) for token in chunk])

    def rewind(self, position: int) -> None:
        """Cut the cache."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}, the cache holds {self.position} tokens")
        self._past = {name: values[:, :, :position] for name, values in self._past.items()}
        self.position = position

    def close(self) -> None:
        """Free the model and its cache."""
        self._model, self._past = None, {}

    def _run(self, ids: Sequence[int]) -> Logits:
        """Append tokens: float32 [rows, vocab], a row for each or for the last alone."""
        total = self.position + len(ids)
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, total)),
            "position_ids": np.arange(self.position, total)[None],
        }
        feed = {n: v.astype(self._dtype(n)) for n, v in given.items() if n in self._inputs}
        try:
            results = self._model.run(None, {**feed, **self._past})
        except self._errors as error:
            raise StageError(f"ONNX Runtime failed: {error}", where=str(self._path)) from error
        found = dict(zip(self._outputs, results, strict=True))
        self._past = {name: found[name.replace(_PAST, _PRESENT)] for name in self._names}
        self.position = total
        logits: Logits = found["logits"][0].astype(np.float32)
        return logits

    def _probe(self) -> int:
        size = self._run([0]).shape[-1]
        self._past, self.position = {name: self._empty(name) for name in self._names}, 0
        return int(size)

    def _empty(self, name: str) -> npt.NDArray[Any]:
        """No positions: [1, kv heads, 0, head size]; genai's builder gives the sizes by name."""
        shape = self._inputs[name].shape
        stated = decoder_config(self._artifact)
        named = ((shape[1], "num_key_value_heads"), (shape[-1], "head_size")) if shape else ()
        found = [size if isinstance(size, int) else stated.get(key) for size, key in named]
        sizes = [size for size in found if isinstance(size, int) and size > 0]
        if len(shape) != 4 or len(sizes) != 2:
            raise InputError(
                f"{name} has the shape {shape}",
                where=str(self._path),
                hint=f"the sizes can stand in {CONFIG_FILE}: num_key_value_heads, head_size",
            )
        return np.zeros((1, sizes[0], 0, sizes[1]), dtype=self._dtype(name))

    def _dtype(self, name: str) -> Any:
        return DTYPES[self._inputs[name].type]

    def _refuse_unknown(self) -> None:
        known = {"input_ids", "attention_mask", "position_ids"}
        for name, value in self._inputs.items():
            cached = name.startswith(_PAST) and name.replace(_PAST, _PRESENT) in self._outputs
            if not (name in known or cached) or value.type not in DTYPES:
                raise InputError(
                    f"takes the input {name} of {value.type}, which is not known here",
                    where=str(self._path),
                    hint="decoders of onnxruntime-genai's builder and of optimum are read",
                )
        if "logits" not in self._outputs or "input_ids" not in self._inputs:
            raise InputError("is no decoder: it gives no logits", where=str(self._path))

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("there are no tokens to append")
        if self.position + len(ids) > self.context_tokens:
            raise UsageError(
                f"{self.position} + {len(ids)} tokens do not fit into a context of "
                f"{self.context_tokens}"
            )


def _load(path: Path, threads: int) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    errors = runtime_errors()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        model = onnxruntime.InferenceSession(str(path), options, providers=CPU, enable_fallback=0)
    except errors as error:
        raise InputError(f"ONNX Runtime does not load it: {error}", where=str(path)) from error
    return model, errors
