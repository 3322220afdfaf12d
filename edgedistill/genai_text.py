"""What ``onnxruntime-genai`` makes of text, from the files of an ONNX package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.errors import InputError
from edgedistill.onnx_package import CONFIG_FILE, not_installed
from edgedistill.student import read_json
from edgedistill.text_program import Message, TextProgram, Tool


class GenaiText(TextProgram):
    """Tokenizer and template of a package, read by the library that runs it.

    Raises:
        InputError: the library does not take the package's tokenizer.
        UnavailableError: it is not installed.
    """

    name = "onnxruntime-genai"

    def __init__(self, package: Path) -> None:
        self._package = package
        self._plain = open_tokenizer(package, adds=False)

    def ids(self, text: str) -> list[int]:
        """See :class:`TextProgram`."""
        return [int(i) for i in self._plain.encode(text)]

    def ids_with_additions(self, text: str) -> list[int]:
        """The library adds nothing unless an app asks for it; this asks."""
        return [int(i) for i in self._adding.encode(text)]

    def ids_of_prompt(self, prompt: str) -> list[int]:
        """By the library's default."""
        return [int(i) for i in self._default.encode(prompt)]

    def has_template(self) -> bool:
        """See :class:`TextProgram`."""
        if (self._package / "chat_template.jinja").is_file():
            return True
        config = self._package / "tokenizer_config.json"
        return config.is_file() and "chat_template" in read_json(config)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, answering: bool
    ) -> str | None:
        """See :class:`TextProgram`."""
        given = {"tools": json.dumps(list(tools), ensure_ascii=False)} if tools else {}
        try:
            return str(
                self._default.apply_chat_template(
                    json.dumps(list(messages), ensure_ascii=False),
                    add_generation_prompt=answering,
                    **given,
                )
            )
        except RuntimeError:
            return None

    def stated_ends(self) -> frozenset[int]:
        """``eos_token_id`` of ``genai_config.json``."""
        path = self._package / CONFIG_FILE
        model = read_json(path).get("model")
        stated = model.get("eos_token_id") if isinstance(model, dict) else None
        ids = stated if isinstance(stated, list) else [stated]
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"model.eos_token_id is {stated!r}", where=str(path))
        return frozenset(ids)

    def ends(self) -> frozenset[int]:
        """Those that the library has read."""
        return frozenset(int(i) for i in self._default.eos_token_ids)

    def bos(self) -> int | None:
        """See :class:`TextProgram`."""
        bos = int(self._default.bos_token_id)
        return bos if bos >= 0 else None

    @cached_property
    def _adding(self) -> Any:
        return open_tokenizer(self._package, adds=True)

    @cached_property
    def _default(self) -> Any:
        return open_tokenizer(self._package, adds=None)


def open_tokenizer(package: Path, *, adds: bool | None) -> Any:
    """The library's tokenizer of a package.

    Args:
        package: the directory with ``genai_config.json`` and ``tokenizer.json``.
        adds: whether special tokens are put around a text; None for the library's default.

    Raises:
        InputError: the library does not take it.
        UnavailableError: the library is not installed.
    """
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    onnxruntime_genai.disable_telemetry_events()
    try:
        tokenizer = onnxruntime_genai.Tokenizer(str(package))
        if adds is not None:
            tokenizer.update_options(add_special_tokens=str(adds).lower())
    except RuntimeError as error:
        raise InputError(
            f"onnxruntime-genai does not take its tokenizer: {error}", where=str(package)
        ) from error
    return tokenizer
