"""The texts that artifacts are verified on: three of our own, and those that a recipe adds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from edgedistill.errors import InputError

BUILT_IN = ("prose", "code", "multilingual")


def load_texts(extra: Mapping[str, Path]) -> dict[str, str]:
    """Name -> text; a text of a recipe replaces the built-in one of its name.

    Raises:
        InputError: a file is missing, empty, or not UTF-8.
    """
    folder = resources.files("edgedistill.texts")
    texts = {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in BUILT_IN}
    for name, path in extra.items():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
        except UnicodeDecodeError as error:
            raise InputError("is not UTF-8 text", where=str(path)) from error
        if not text.strip():
            raise InputError("is empty", where=str(path), hint="verification needs some text")
        texts[name] = text
    return texts
