"""ONNX Runtime on the CPU, running the package that ``onnxruntime-genai`` would open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError, StageError, UsageError
from edgedistill.genai_text import GenaiText, open_tokenizer
from edgedistill.onnx_package import (
    CONFIG_FILE,
    DATA_FILE,
    FIRST_LOGIT,
    MODEL_FILE,
    SHIPPED_ACCURACY_LEVEL,
    not_installed,
)
from edgedistill.session import Agreement, Logits, Runtime, Session
from edgedistill.student import read_json

PREFILL_TOKENS = 512  # attention takes memory for new x total tokens: a long prompt runs in parts
LOGIT_ROWS = 128  # positions whose logits lie in memory at once
CPU = ["CPUExecutionProvider"]


class OnnxRuntime(Runtime):
    """Runs ``model.onnx`` with the arithmetic that ships.

    Args:
        accuracy_level: of every ``MatMulNBits``, in place of the file's own.  1 computes in
            float32, which tells an error in the weights from the noise of 8-bit activations.
    """

    extra: ClassVar[str] = "onnx"
    # MatMulNBits rounds activations to 8 bits at the accuracy level that ships.
    quantized_agreement: ClassVar[Agreement] = Agreement(2e-2, 0.90, "int8", 2)

    def __init__(self, accuracy_level: int | None = None) -> None:
        self._accuracy_level = accuracy_level

    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> Session:
        """Load an artifact's directory.

        Raises:
            InputError: a file is missing, damaged or of another kind, or the artifact claims
                fewer than ``context_tokens``.
            UnavailableError: ONNX Runtime is not installed.
        """
        shape = _read_shape(artifact / CONFIG_FILE)
        if context_tokens > shape.context_tokens:
            raise InputError(
                f"holds {shape.context_tokens} tokens of context, not {context_tokens}",
                where=str(artifact / CONFIG_FILE),
            )
        model = _load(artifact, threads, self._accuracy_level)
        if _shape_of(model, shape.context_tokens) != shape:
            raise InputError(
                f"does not describe the graph in {MODEL_FILE}", where=str(artifact / CONFIG_FILE)
            )
        return OnnxSession(artifact, model, shape._replace(context_tokens=context_tokens))

    def settings(self) -> dict[str, str]:
        """Versions, provider and accuracy level."""
        level = self._accuracy_level
        return {
            "onnxruntime": _version("onnxruntime"),
            "onnxruntime-genai": _version("onnxruntime-genai"),
            "provider": "CPUExecutionProvider",
            "accuracy_level": str(SHIPPED_ACCURACY_LEVEL if level is None else level),
        }


class _Shape(NamedTuple):
    """What a session has to know of a model."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int


class OnnxSession(Session):
    """A model and its cache: one buffer a layer, which ONNX Runtime extends in place.

    The buffers span the whole context, float32 [1, kv_heads, context_tokens, head_dim]; the system
    gives memory to the pages that are written to.

    Args:
        artifact: the package, for its tokenizer.
        model: a ``onnxruntime.InferenceSession``.
        shape: of the model, with the context to make room for.
    """

    def __init__(self, artifact: Path, model: Any, shape: _Shape) -> None:
        from onnxruntime import OrtValue

        self.vocab_size = shape.vocab_size
        self.context_tokens = shape.context_tokens
        self.position = 0
        self._value = OrtValue.ortvalue_from_numpy
        self._artifact = artifact
        self._tokenizer: Any = None
        self._model = model
        self._errors = runtime_errors()
        self._mask = np.ones((1, shape.context_tokens), dtype=np.int64)
        self._binding = model.io_binding()
        self._binding.bind_output("logits")
        buffer = (1, shape.kv_heads, shape.context_tokens, shape.head_dim)
        for layer in range(shape.layers):
            for part in ("key", "value"):
                cache = self._value(np.zeros(buffer, np.float32))
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", cache)
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append ``ids``; the head runs once for each part of ``PREFILL_TOKENS``.

        Raises:
            UsageError: no tokens, a token outside the vocabulary, or too many for the context.
        """
        tokens = self._check(ids)
        last = np.empty(0, dtype=np.float32)
        for start in range(0, tokens.size, PREFILL_TOKENS):
            last = self._run(tokens[start : start + PREFILL_TOKENS], rows=1)[0]
        return last

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append ``ids`` and yield float32 [up to ``LOGIT_ROWS``, vocab] until all are there."""
        tokens = self._check(ids)
        parts = range(0, tokens.size, LOGIT_ROWS)
        chunks = (tokens[start : start + LOGIT_ROWS] for start in parts)
        return (self._run(chunk, rows=chunk.size) for chunk in chunks)

    def rewind(self, position: int) -> None:
        """Forget what lies behind ``position``; it is overwritten, nothing is copied.

        Raises:
            UsageError: the cache does not hold so many tokens.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}, the cache holds {self.position} tokens")
        self.position = position

    def tokenize(self, text: str) -> list[int] | None:
        """Ids by ``onnxruntime-genai``'s tokenizer, which reads the package's own files."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._artifact, adds=False)
        return [int(i) for i in self._tokenizer.encode(text)]

    def text_program(self, artifact: Path) -> GenaiText:
        """See :class:`Session`."""
        return GenaiText(artifact)

    def close(self) -> None:
        """Free the model and its cache."""
        self._binding = self._model = self._tokenizer = None

    def _check(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0:
            raise UsageError("there are no tokens to append")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UsageError(
                f"token {tokens.min() if tokens.min() < 0 else tokens.max()} is not in the "
                f"vocabulary of {self.vocab_size}"
            )
        if self.position + tokens.size > self.context_tokens:
            raise UsageError(
                f"{self.position} + {tokens.size} tokens do not fit into a context of "
                f"{self.context_tokens}"
            )
        return tokens

    def _run(self, tokens: npt.NDArray[np.int64], *, rows: int) -> Logits:
        """Append tokens; the logits of the last ``rows`` of them, float32 [rows, vocab]."""
        end = self.position + tokens.size
        bind = self._binding
        bind.bind_cpu_input("input_ids", tokens.reshape(1, -1))
        bind.bind_cpu_input("attention_mask", self._mask[:, :end])
        first = self._value(np.array([-rows], dtype=np.int64))
        bind.bind_ortvalue_input(FIRST_LOGIT, first)
        bind.bind_output("logits")  # anew, or the next run would write into this one's
        try:
            self._model.run_with_iobinding(bind)
        except self._errors as error:
            raise StageError(f"ONNX Runtime failed: {error}", where=str(self._artifact)) from error
        self.position = end
        # float32 [1, rows, vocab]; the first output that was bound, a copy of ORT's own
        logits: Logits = bind.get_outputs()[0].numpy()
        return logits.reshape(rows, self.vocab_size)


def _load(artifact: Path, threads: int, accuracy_level: int | None) -> Any:
    """An ``onnxruntime.InferenceSession`` over the artifact's graph."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    path = artifact / MODEL_FILE
    for needed in (path, artifact / DATA_FILE):
        if not needed.is_file():
            raise InputError(f"there is no {needed.name}", where=str(artifact))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors; a warning says that logits have more than one row
    source: str | bytes = str(path)
    if accuracy_level is not None:
        source = _with_accuracy_level(path, accuracy_level)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(artifact)
        )
    try:
        # Its fallback would say on stdout that it tries once more.
        model = onnxruntime.InferenceSession(source, options, providers=CPU, enable_fallback=0)
    except runtime_errors() as error:
        raise InputError(
            f"ONNX Runtime does not load it: {error}",
            where=str(path),
            hint="the file is damaged or incomplete: export or copy it again",
        ) from error
    if FIRST_LOGIT not in {value.name for value in model.get_overridable_initializers()}:
        raise InputError("is not a decoder that edgedistill exported", where=str(path))
    return model


def _shape_of(model: Any, context_tokens: int) -> _Shape | None:
    """By the graph's own inputs and outputs, but for the context, which it does not state.

    None where those are not a decoder's.
    """
    keys = [v.shape for v in model.get_inputs() if v.name.endswith(".key")]
    logits = model.get_outputs()[0].shape
    if not keys or len(keys[0]) != 4 or len(logits) != 3:
        return None
    _, kv_heads, _, head_dim = keys[0]
    return _Shape(len(keys), kv_heads, head_dim, logits[-1], context_tokens)


def _with_accuracy_level(path: Path, level: int) -> bytes:
    try:
        from edgedistill.onnx_graph import read_model
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    model = read_model(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    return bytes(model.SerializeToString())


def _read_shape(path: Path) -> _Shape:
    model = read_json(path).get("model")
    try:
        decoder = model["decoder"]  # type: ignore[index]
        return _Shape(
            layers=int(decoder["num_hidden_layers"]),
            kv_heads=int(decoder["num_key_value_heads"]),
            head_dim=int(decoder["head_size"]),
            vocab_size=int(model["vocab_size"]),  # type: ignore[index]
            context_tokens=int(model["context_length"]),  # type: ignore[index]
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"does not describe a decoder ({error!r})", where=str(path)) from error


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: one class a status code, with no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (getattr(state, name) for name in dir(state))
    own = (e for e in found if isinstance(e, type) and issubclass(e, Exception))
    # The bindings' own; texts of a damaged graph are not always UTF-8.
    return (*own, RuntimeError, UnicodeDecodeError)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
