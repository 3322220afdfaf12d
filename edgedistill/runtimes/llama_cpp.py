"""llama.cpp, through the low-level interface of ``llama-cpp-python``."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgedistill.errors import InputError, StageError, UnavailableError, UsageError
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_text import GgufText
from edgedistill.session import Agreement, Logits, Runtime, Session

WEIGHTS_FILE = "model.gguf"
BATCH_TOKENS = 512
# Rows of logits that a call computes at most: 128 x 49152 x 4 bytes = 25 MB.
LOGIT_ROWS = 128
# Tails of one cache that a batch holds at most, beside sequence 0, the cache itself.
TAILS = 63
_LOG_ERROR = 4  # ggml.h; the table in llama-cpp-python is another
# Bits of the cache -> ggml's type, as ``ggml_type`` numbers it and as its programs call it.
CACHE_TYPES = {16: (1, "float16"), 8: (8, "q8_0")}
CACHE_BLOCK = 32  # numbers of one scale in q8_0, which may not reach over the end of a head

# What the library said last; its log callback is global, and so is this.
_error_lines: deque[str] = deque(maxlen=4)


class LlamaCpp(Runtime):
    """Runs GGUF files on the CPU with the library's own defaults: float16 cache, automatic kernels.

    A cache in 8 bits is ``q8_0``, codes of 8 bits with a float16 scale for each 32 numbers; the
    library has it with flash attention only.  Four bits are not offered: ``q4_0`` moved tiny models
    by a KL of .06 to .1, more than any correct artifact may be away.

    Its integer kernels round activations to 8 bits in blocks of 32, so that a quantized artifact is
    a KL of about 5e-3 away from its own weights in float32 (SmolLM2-135M at 4 and 8 bits).
    """

    extra: ClassVar[str] = "gguf"
    float_agreement: ClassVar[Agreement] = Agreement(1e-4, 0.995, "float16", 4)
    quantized_agreement: ClassVar[Agreement] = Agreement(2e-2, 0.90, "int8", 2)
    kv_cache_choices: ClassVar[tuple[int, ...]] = tuple(CACHE_TYPES)

    def __init__(self, kv_cache_bits: int = 16) -> None:
        """Sessions cache keys and values in ``kv_cache_bits`` bits.

        Raises:
            UsageError: llama.cpp does not, or not well enough.
        """
        problem = self.kv_cache_problem(kv_cache_bits)
        if problem is not None:
            raise UsageError(f"LlamaCpp: {problem}")
        self.kv_cache_bits: int = kv_cache_bits

    @classmethod
    def kv_cache_problem(cls, bits: int, head_dim: int | None = None) -> str | None:
        """See :class:`Runtime`; blocks of a quantized cache have to fill the heads."""
        if bits in CACHE_TYPES and bits < 16 and head_dim is not None and head_dim % CACHE_BLOCK:
            return (
                f"in {bits} bits it caches {CACHE_BLOCK} numbers with one scale, "
                f"and a head of this student has {head_dim}"
            )
        return super().kv_cache_problem(bits, head_dim)

    def with_kv_cache_bits(self, bits: int) -> LlamaCpp:
        """See :class:`Runtime`."""
        return LlamaCpp(bits)

    def agreement(self, quantized: bool) -> Agreement:
        """Keys and values in 8 bits are rounded as activations are before quantized weights."""
        return super().agreement(quantized or self.kv_cache_bits < 16)

    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> LlamaCppSession:
        """Load ``model.gguf`` of a directory, or a GGUF file that is named itself."""
        file = weights_file(artifact)
        return LlamaCppSession(file, context_tokens, threads, self.kv_cache_bits)

    def settings(self) -> dict[str, str]:
        """Versions, and what the CPU kernels were built for."""
        library = _library()
        return {
            "llama-cpp-python": str(library.__version__),
            "llama.cpp": library.llama_version().decode(),
            "kernels": library.llama_print_system_info().decode().strip(" |"),
            "cache": CACHE_TYPES[self.kv_cache_bits][1],
            "flash_attention": "automatic" if self.kv_cache_bits == 16 else "on",
            "batch_tokens": str(BATCH_TOKENS),
        }


def weights_file(artifact: Path) -> Path:
    """The GGUF file of an artifact: itself, its ``model.gguf``, or the only one in it.

    Raises:
        InputError: there is none, or there are several.
    """
    if artifact.is_file():
        return artifact
    if (artifact / WEIGHTS_FILE).is_file():
        return artifact / WEIGHTS_FILE
    found = sorted(artifact.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(
            f"holds {len(found)} GGUF files, not one" if artifact.exists() else "does not exist",
            where=str(artifact),
            hint="name a GGUF file, or the directory of one",
        )
    return found[0]


class LlamaCppSession(Session):
    """A GGUF model and its cache.

    Attributes:
        bos_id: the beginning-of-sequence token that the file states, or None.
        adds_bos: whether llama.cpp's own programs put it before a prompt.
        eos_id: the end-of-sequence token that the file states, or None.
    """

    def __init__(
        self, path: Path, context_tokens: int, threads: int, kv_cache_bits: int = 16
    ) -> None:
        self._library = library = _library()
        self._context: Any = None
        self._batch: Any = None
        self._model: Any = _load(library, path)
        vocab = library.llama_model_get_vocab(self._model)
        self._vocab = vocab
        self.vocab_size = int(library.llama_vocab_n_tokens(vocab))
        self.bos_id = _token_or_none(library.llama_vocab_bos(vocab))
        self.eos_id = _token_or_none(library.llama_vocab_eos(vocab))
        self.adds_bos = bool(library.llama_vocab_get_add_bos(vocab))
        self.context_tokens = context_tokens
        self.position = 0
        try:
            self._context = _new_context(
                library, self._model, path, context_tokens, threads, kv_cache_bits
            )
        except StageError:
            self.close()
            raise
        self._memory = library.llama_get_memory(self._context)
        self._make_batch()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token at which llama.cpp stops: the stated one, and those that it knows by name."""
        is_end = self._library.llama_vocab_is_eog
        return frozenset(i for i in range(self.vocab_size) if is_end(self._vocab, i))

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens in batches; only the last one's logits are computed."""
        self._check(ids)
        for start in range(0, len(ids), BATCH_TOKENS):
            chunk = ids[start : start + BATCH_TOKENS]
            self._wanted[: len(chunk)] = 0
            if start + len(chunk) == len(ids):
                self._wanted[len(chunk) - 1] = 1
            self._append(chunk)
        return self._logits(1).reshape(-1)

    def prefill_each(self, tails: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """Tails that fit together are sequences of one batch, which share the cells of the cache.

        A batch is limited by its buffer and by the cells that the context has left; a tail that
        is longer than that goes through :meth:`prefill`.
        """
        room = min(BATCH_TOKENS, self.context_tokens - self.position)
        for group in _group(tails, room):
            if len(group) == 1:
                yield from super().prefill_each(group)
            else:
                yield from self._prefill_together(group)

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append tokens and yield the logits after each, at most ``LOGIT_ROWS`` rows at a time."""
        self._check(ids)
        for start in range(0, len(ids), LOGIT_ROWS):
            chunk = ids[start : start + LOGIT_ROWS]
            self._wanted[: len(chunk)] = 1
            self._append(chunk)
            yield self._logits(len(chunk))

    def rewind(self, position: int) -> None:
        """Drop the cache's cells from ``position`` on."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}: the cache holds {self.position} tokens")
        if not self._library.llama_memory_seq_rm(self._memory, 0, position, -1):
            raise StageError(f"llama.cpp could not rewind its cache to {position}")
        self.position = position

    def tokenize(self, text: str) -> list[int]:
        """Ids by the tokenizer in the file, special tokens parsed, nothing added."""
        return self.text_program().ids(text)

    def text_program(self, artifact: Path | None = None) -> GgufText:
        """See :class:`Session`; all of it lies in the file that is open."""
        return GgufText(self._library, self._model)

    def close(self) -> None:
        """Free batch, context and model, once."""
        if self._batch is not None:
            self._library.llama_batch_free(self._batch)
        if self._context is not None:
            self._library.llama_free(self._context)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def _make_batch(self) -> None:
        batch = self._library.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._batch = batch
        self._tokens = np.ctypeslib.as_array(batch.token, (BATCH_TOKENS,))
        self._positions = np.ctypeslib.as_array(batch.pos, (BATCH_TOKENS,))
        self._wanted = np.ctypeslib.as_array(batch.logits, (BATCH_TOKENS,))
        np.ctypeslib.as_array(batch.n_seq_id, (BATCH_TOKENS,))[:] = 1
        self._sequences = [batch.seq_id[i] for i in range(BATCH_TOKENS)]

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise UsageError("there are no tokens to append")
        if self.position + len(ids) > self.context_tokens:
            raise UsageError(
                f"{self.position} + {len(ids)} tokens do not fit into the context of "
                f"{self.context_tokens}"
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UsageError(f"a token is outside the vocabulary of {self.vocab_size}")

    def _append(self, chunk: Sequence[int]) -> None:
        self._put(0, chunk, sequence=0)
        self._decode(len(chunk))
        self.position += len(chunk)

    def _prefill_together(self, tails: Sequence[Sequence[int]]) -> Iterator[Logits]:
        for tail in tails:
            self._check(tail)
        count = 0
        for sequence, tail in enumerate(tails, start=1):
            self._library.llama_memory_seq_cp(self._memory, 0, sequence, 0, self.position)
            self._put(count, tail, sequence=sequence)
            count += len(tail)
            self._wanted[count - len(tail) : count - 1] = 0
            self._wanted[count - 1] = 1
        self._decode(count)
        for sequence in range(1, len(tails) + 1):
            self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        yield from self._logits(len(tails))

    def _put(self, start: int, ids: Sequence[int], *, sequence: int) -> None:
        """Fill the batch from ``start`` on with tokens that follow the cache."""
        stop = start + len(ids)
        self._tokens[start:stop] = ids
        self._positions[start:stop] = np.arange(self.position, self.position + len(ids))
        for pointer in self._sequences[start:stop]:
            pointer[0] = sequence

    def _decode(self, count: int) -> None:
        self._batch.n_tokens = count
        _error_lines.clear()
        status = self._library.llama_decode(self._context, self._batch)
        if status != 0:
            raise StageError(f"llama.cpp's decode returned {status}: {_last_errors()}")

    def _logits(self, rows: int) -> Logits:
        # The library's buffer is overwritten by the next call: copy (15 us for 49152 values).
        pointer = self._library.llama_get_logits(self._context)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if address is None:
            raise StageError(f"llama.cpp gave no logits: {_last_errors()}")
        size_bytes = rows * self.vocab_size * np.dtype(np.float32).itemsize
        view = memoryview((ctypes.c_char * size_bytes).from_address(address))
        return np.frombuffer(view, np.float32).reshape(rows, self.vocab_size).copy()


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise UnavailableError(
            f"llama.cpp is not installed ({error})", hint="pip install 'edgedistill[gguf]'"
        ) from error
    global _log_callback
    if _log_callback is None:
        _log_callback = llama_cpp.llama_log_callback(_remember_errors)
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


# Held for as long as the library may call it.
_log_callback: Any = None


def _remember_errors(level: int, text: bytes, _user_data: object) -> None:
    if level == _LOG_ERROR:
        _error_lines.append(text.decode("utf-8", errors="replace").strip())


def _last_errors() -> str:
    return "; ".join(_error_lines) or "it did not say why"


def _load(library: Any, path: Path) -> Any:
    parameters = library.llama_model_default_params()
    parameters.n_gpu_layers = 0
    _error_lines.clear()
    model = library.llama_model_load_from_file(str(path).encode(), parameters)
    if model:
        return model
    said = _last_errors()
    # Our own reader tells what is damaged; if it finds the file whole, llama.cpp's word stands.
    GgufFile(path)
    raise InputError(f"llama.cpp cannot load it: {said}", where=str(path))


def _new_context(
    library: Any, model: Any, path: Path, context_tokens: int, threads: int, kv_cache_bits: int
) -> Any:
    parameters = library.llama_context_default_params()
    if kv_cache_bits != 16:
        parameters.type_k = parameters.type_v = CACHE_TYPES[kv_cache_bits][0]
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.n_ctx = context_tokens
    parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
    parameters.n_outputs_max = parameters.n_outputs_max_per_seq = LOGIT_ROWS
    parameters.n_threads = parameters.n_threads_batch = threads
    # All sequences share the context's cells; else each would own a fraction of them.
    parameters.n_seq_max = TAILS + 1
    parameters.kv_unified = True
    _error_lines.clear()
    context = library.llama_init_from_model(model, parameters)
    if not context:
        raise StageError(
            f"llama.cpp opens no context of {context_tokens} tokens with a cache of "
            f"{kv_cache_bits} bits: {_last_errors()}",
            where=str(path),
        )
    return context


def _group(tails: Sequence[Sequence[int]], room: int) -> Iterator[list[Sequence[int]]]:
    """Neighbours whose tokens fit into ``room`` together, at most ``TAILS`` of them."""
    group: list[Sequence[int]] = []
    count = 0
    for tail in tails:
        if group and (count + len(tail) > room or len(group) == TAILS):
            yield group
            group, count = [], 0
        group.append(tail)
        count += len(tail)
    if group:
        yield group


def _token_or_none(token: int) -> int | None:
    return int(token) if token >= 0 else None
