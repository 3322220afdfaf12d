"""What a runtime's own program makes of text: token ids, rendered conversations, where it stops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.chat import load_tokenizer
from edgedistill.student import read_json

Message = dict[str, Any]
Tool = dict[str, Any]


class TextProgram(ABC):
    """Everything between what an app is given as text and what the model reads as ids.

    Attributes:
        name: of the program, for reports.
    """

    name: str

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Ids of a text, special tokens parsed, nothing added."""

    @abstractmethod
    def ids_with_additions(self, text: str) -> list[int]:
        """Ids of a text that is no conversation, with the BOS or EOS that the program adds."""

    @abstractmethod
    def ids_of_prompt(self, prompt: str) -> list[int]:
        """Ids of a rendered conversation, as the program gives them to the model."""

    @abstractmethod
    def has_template(self) -> bool:
        """Whether the program finds a chat template."""

    @abstractmethod
    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, answering: bool
    ) -> str | None:
        """The text of a conversation; None where the template refuses it.

        Args:
            messages: ``role`` and ``content``, or what else a template takes.
            tools: JSON schemas of functions; None without any.
            answering: whether the text ends where the assistant's answer begins.
        """

    @abstractmethod
    def stated_ends(self) -> frozenset[int]:
        """The tokens that the artifact's own metadata call the end of a text or turn."""

    def ends(self) -> frozenset[int]:
        """The tokens at which the program stops; it may know more of them than are stated."""
        return self.stated_ends()

    @abstractmethod
    def bos(self) -> int | None:
        """The beginning-of-sequence token, if there is one."""


class DirectoryText(TextProgram):
    """``transformers`` on the tokenizer files of a directory.

    On a student's directory it is the judge; on an artifact's it reads the files that an app ships
    beside the weights.

    Raises:
        InputError: there is no ``tokenizer.json``, or it cannot be opened.
    """

    name = "the tokenizer files"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer = load_tokenizer(directory)

    def ids(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def ids_with_additions(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def ids_of_prompt(self, prompt: str) -> list[int]:
        """As ``apply_chat_template`` makes them: the template has written all special tokens."""
        return self.ids(prompt)

    def has_template(self) -> bool:
        """See :class:`TextProgram`."""
        return bool(self._tokenizer.chat_template)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, answering: bool
    ) -> str | None:
        """See :class:`TextProgram`."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=answering,
                )
            )
        # A template that takes apart what is not there raises Python's own errors too.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None

    def stated_ends(self) -> frozenset[int]:
        """Those of the generation config, else of the config; and the tokenizer's own."""
        stated = self._stated("generation_config.json")
        if stated is None:
            stated = self._stated("config.json")
        ids = stated if isinstance(stated, list) else [stated]
        own = self._tokenizer.eos_token_id
        return frozenset(int(i) for i in (*ids, own) if i is not None)

    def bos(self) -> int | None:
        """See :class:`TextProgram`."""
        bos: int | None = self._tokenizer.bos_token_id
        return bos

    @cached_property
    def special_strings(self) -> tuple[str, ...]:
        """The special tokens as plain text, those that have a role first."""
        return tuple(dict.fromkeys(self._tokenizer.all_special_tokens))

    @property
    def template(self) -> str:
        """The chat template's source; empty where there is none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else ""

    @property
    def normalizes(self) -> bool:
        """Whether text is brought into composed form (NFC) before it is cut."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        return normalizer is not None and "NFC" in repr(normalizer)

    def _stated(self, file: str) -> Any:
        path = self._directory / file
        return read_json(path).get("eos_token_id") if path.is_file() else None


class ShippedText(DirectoryText):
    """The tokenizer files beside weights, ``tokenizer.json`` taken as it stands.

    An app on a device has no ``transformers``, which would mend a special token that the
    file lost by what ``tokenizer_config.json`` says of it.
    """

    def ids(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        return list(self._file.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _file(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._directory / "tokenizer.json"))
