"""The judge: ``transformers`` in float32 on a student directory.

Nothing of our own decoder runs here.  A quantized student is dequantized to a temporary copy first,
because only float students open in ``transformers``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgedistill.errors import InputError, UnavailableError, UsageError
from edgedistill.session import Logits, Runtime, Session
from edgedistill.student import Student, dequantize_student

CHUNK_TOKENS = 128  # logits of so many positions lie in memory at once


class TorchReference(Runtime):
    """``transformers`` in float32 on the CPU; the artifact is a student directory."""

    extra: ClassVar[str] = "build"

    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> Session:
        """Load a student directory, float or quantized, as float32."""
        return TorchSession(load_model(artifact, threads=threads), artifact, context_tokens)

    def settings(self) -> dict[str, str]:
        """Versions and dtype."""
        torch, transformers = _libraries()
        return {
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
            "dtype": "float32",
            "attention": "sdpa, eager where transformers has no other",
        }


class TorchSession(Session):
    """A float32 model with its cache.

    ``torch`` holds the number of threads for the whole process: the last session opened sets it.
    """

    def __init__(self, model: Any, student: Path, context_tokens: int) -> None:
        self._model = model
        self._student = student
        self._cache = new_cache()
        self._tokenizer: Any = None
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.context_tokens = context_tokens
        self.position = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append ``ids`` and return the logits after the last: float32 [vocab]."""
        last: Logits = self._append(ids, keep=1)[0]
        return last

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append ``ids``; logits come in chunks of up to ``CHUNK_TOKENS``: float32 [n, vocab]."""
        self._check_room(ids)
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            yield self._append(chunk, keep=len(chunk))

    def rewind(self, position: int) -> None:
        """Keep the first ``position`` tokens of the cache."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to {position}: the cache holds {self.position} tokens")
        if position == 0:
            self._cache = new_cache()
        else:
            self._cache.crop(position - self.position)
        self.position = position

    def tokenize(self, text: str) -> list[int] | None:
        """Ids by the directory's ``tokenizer.json``; None where it has none."""
        if not (self._student / "tokenizer.json").is_file():
            return None
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._student / "tokenizer.json"))
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def close(self) -> None:
        """Drop model and cache."""
        self._model = self._cache = self._tokenizer = None

    def _check_room(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("at least one token is needed")
        if self.position + len(ids) > self.context_tokens:
            raise UsageError(
                f"{len(ids)} tokens after {self.position} do not fit into context_tokens = "
                f"{self.context_tokens}"
            )
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UsageError(f"a token is not in the vocabulary of {self.vocab_size}")

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        import torch

        self._check_room(ids)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        self.position += len(ids)
        logits: Logits = output.logits[0].numpy().astype(np.float32, copy=False)
        return logits


def load_model(student: Path, *, threads: int) -> Any:
    """A causal language model of ``transformers`` in float32, in evaluation mode.

    Args:
        student: float or quantized; the latter is dequantized to a temporary directory.
        threads: of torch, for the whole process.

    Raises:
        InputError: the directory is damaged, or ``transformers`` does not know the model.
        UnavailableError: torch is not installed.
    """
    torch, transformers = _libraries()
    quantized = Student(student).is_quantized
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="edgedistill-") as scratch:
        readable = student
        if quantized:
            readable = Path(scratch)
            dequantize_student(student, readable)
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(readable),
                dtype=torch.float32,
                # Its own choice of attention: Gemma 2 has soft caps, for which sdpa has no place.
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"transformers cannot open it ({error})",
                where=str(student),
                hint="a student is a complete Hugging Face directory of a causal language model",
            ) from error
    _check_complete(info, student)
    return model.eval()


def new_cache() -> Any:
    """An empty cache that keeps every token, also under a sliding window (the mask does that)."""
    from transformers import DynamicCache

    return DynamicCache()


def _check_complete(info: dict[str, Any], student: Path) -> None:
    """transformers fills missing weights with random numbers and only warns."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            raise InputError(
                f"{kind.replace('_', ' ')}: {', '.join(keys[:3])} ({len(keys)} in all)",
                where=str(student),
                hint="weights and config.json do not belong together",
            )


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(
            f"torch and transformers are needed here ({error})",
            hint="pip install 'edgedistill[build]'",
        ) from error
    return torch, transformers
