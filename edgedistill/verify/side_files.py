"""What the files beside the weights say: ends of a text, the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.errors import InputError
from edgedistill.student import read_json


def read_template(directory: Path) -> str | None:
    """The chat template: ``chat_template.jinja``, or that of ``tokenizer_config.json``.

    Raises:
        InputError: a file is damaged.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read ({error})", where=str(path)) from error
    stated = _optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(stated, list):
        named = [entry for entry in stated if isinstance(entry, dict)]
        stated = {e.get("name"): e.get("template") for e in named}.get("default")
    return stated if isinstance(stated, str) else None


def read_ends(directory: Path) -> frozenset[int]:
    """The tokens that end a text: of ``generation_config.json``, else ``config.json``; and the
    tokenizer's own ``eos_token``.

    Raises:
        InputError: a file is damaged.
    """
    generation = _optional(directory / "generation_config.json")
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = _optional(directory / "config.json").get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in [*listed, read_token(directory, "eos_token")] if _is_id(i))


def read_token(directory: Path, role: str) -> int | None:
    """The id of ``eos_token`` or ``bos_token`` of ``tokenizer_config.json``.

    Raises:
        InputError: a file is damaged.
    """
    token: Any = _optional(directory / "tokenizer_config.json").get(role)
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return None
    tokenizer = _optional(directory / "tokenizer.json")
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == content and _is_id(entry.get("id")):
            return int(entry["id"])
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = vocabulary.get(content) if isinstance(vocabulary, dict) else None
    return found if _is_id(found) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
