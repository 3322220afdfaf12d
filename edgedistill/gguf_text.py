"""What llama.cpp's programs make of text, from what a GGUF file holds."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from edgedistill.text_program import Message, TextProgram, Tool

END_ROLES = ("eos", "eot", "eom")
METADATA_BYTES = 256  # more than any number takes


class GgufText(TextProgram):
    """The vocabulary of a loaded file, and its template rendered as ``llama-cpp-python`` does.

    How llama.cpp's own programs put BOS before a conversation follows ``common/chat.cpp`` of
    https://github.com/ggml-org/llama.cpp: what the vocabulary adds anyway is taken off the
    rendered text first.

    Args:
        library: the module ``llama_cpp``.
        model: a ``llama_model`` that stays open as long as this.
    """

    name = "llama.cpp"

    def __init__(self, library: Any, model: Any) -> None:
        self._library = library
        self._model = model
        self._vocab = library.llama_model_get_vocab(model)

    def ids(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        return self._tokenize(text, add_special=False)

    def ids_with_additions(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        return self._tokenize(text, add_special=True)

    def ids_of_prompt(self, prompt: str) -> list[int]:
        """See :class:`TextProgram`."""
        library = self._library
        if library.llama_vocab_get_add_bos(self._vocab):
            prompt = prompt.removeprefix(self._special("bos"))
        if library.llama_vocab_get_add_eos(self._vocab):
            prompt = prompt.removesuffix(self._special("eos"))
        return self._tokenize(prompt, add_special=True)

    def has_template(self) -> bool:
        """See :class:`TextProgram`."""
        return self._template is not None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, answering: bool
    ) -> str | None:
        """See :class:`TextProgram`."""
        from jinja2 import TemplateError

        try:
            response = self._formatter(answering)(
                messages=list(messages), tools=list(tools) if tools else None
            )
        # A template that takes apart what is not there raises Python's own errors too.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        return str(response.prompt)

    def stated_ends(self) -> frozenset[int]:
        """The ``eos``, ``eot`` and ``eom`` of the file's metadata."""
        stated = (self._metadata(f"tokenizer.ggml.{role}_token_id") for role in END_ROLES)
        return frozenset(int(value) for value in stated if value is not None)

    def ends(self) -> frozenset[int]:
        """Those at which llama.cpp stops: it knows some by name."""
        is_end, count = self._library.llama_vocab_is_eog, self._library.llama_vocab_n_tokens
        return frozenset(i for i in range(count(self._vocab)) if is_end(self._vocab, i))

    def bos(self) -> int | None:
        """See :class:`TextProgram`."""
        token = int(self._library.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    @cached_property
    def _template(self) -> str | None:
        template: bytes | None = self._library.llama_model_chat_template(self._model, None)
        return None if template is None else template.decode("utf-8", errors="replace")

    def _formatter(self, answering: bool) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        return Jinja2ChatFormatter(
            template=self._template or "",
            eos_token=self._special("eos"),
            bos_token=self._special("bos"),
            add_generation_prompt=answering,
        )

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 2
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(
                self._vocab, data, len(data), ids, room, add_special, True
            )
            if count >= 0:
                return ids[:count]
            room = -count

    def _special(self, role: str) -> str:
        """The token of ``bos`` or ``eos`` as text; empty where there is none."""
        token = getattr(self._library, f"llama_vocab_{role}")(self._vocab)
        if token < 0:
            return ""
        text: bytes = self._library.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", errors="replace")

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        size = self._library.llama_model_meta_val_str(
            self._model, key.encode(), buffer, METADATA_BYTES
        )
        return None if size < 0 else buffer.value.decode("utf-8", errors="replace")
