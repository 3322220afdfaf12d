"""What the hub says of a model in small files: its configs and chat template, no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.errors import InputError, UnavailableError, UsageError
from edgedistill.intake import from_home, is_remote
from edgedistill.student import read_json

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_NAME = re.compile(rf"(?:hf://)?({_PART}/{_PART})(?:@([^@\s]+))?")
ASK_SECONDS = 15.0


@dataclass(frozen=True)
class HubConfig:
    """A model on the hub.

    Attributes:
        source: ``hf://org/name@COMMIT``, as a recipe names it.
        name: without the organization.
        config: its ``config.json``.
        tokenizer: its class as its config has it; None where it has no config.
        chat_template: whether it has one.
    """

    source: str
    name: str
    config: dict[str, Any]
    tokenizer: str | None
    chat_template: bool


def hub_name(source: str, base: Path) -> tuple[str, str | None] | None:
    """``org/name`` and revision, where a source means the hub; None where it is a path.

    Raises:
        UsageError: ``hf://`` with something else behind it.
    """
    match = _HUB_NAME.fullmatch(source)
    if is_remote(source):
        if match is None:
            raise UsageError(f"{source!r} is not hf://org/name@REVISION")
    elif match is None or source.endswith(".gguf") or (base / from_home(Path(source))).exists():
        return None
    return match[1], match[2]


def fetch_hub_config(name: str, revision: str | None) -> HubConfig:
    """Fetch what is small of a model: its config, its tokenizer's, its chat template.

    Args:
        name: ``org/name``.
        revision: a commit, branch or tag; None for the newest.

    Raises:
        InputError: the model has no ``config.json``.
        UnavailableError: the hub cannot be reached, or does not give the model.
        UsageError: the hub calls the name impossible.
    """
    where = f"hf://{name}" + (f"@{revision}" if revision else "")
    config = _fetch(name, "config.json", revision, where)
    if config is None:
        raise InputError("has no config.json", where=where, hint="is it a language model?")
    commit = config.parent.name  # files lie in snapshots/COMMIT
    tokens_file = _fetch(name, "tokenizer_config.json", commit, where)
    tokens = read_json(tokens_file) if tokens_file else {}
    template = bool(tokens.get("chat_template"))
    return HubConfig(
        source=f"hf://{name}@{commit}",
        name=name.partition("/")[2],
        config=read_json(config),
        tokenizer=str(tokens.get("tokenizer_class") or "not stated") if tokens_file else None,
        chat_template=template or _fetch(name, "chat_template.jinja", commit, where) is not None,
    )


def _fetch(name: str, file: str, revision: str | None, where: str) -> Path | None:
    """A file of a model, in the hub's cache; None where the model has no such file."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "huggingface_hub is not installed", hint="pip install 'edgedistill[build]'"
        ) from error
    try:
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=ASK_SECONDS))
    except RemoteEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UsageError(f"{where}: {error}") from error
    except OSError as error:
        raise UnavailableError(
            f"there is no such directory, and the hub cannot give it ({type(error).__name__})",
            where=where,
            hint="check name, revision and network, or download it and name the directory",
        ) from error
