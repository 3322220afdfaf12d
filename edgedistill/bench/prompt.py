"""Text to token ids as an app does it: chat template, then tokenizer, and back to text.

``transformers`` would do the same, but it imports torch, whose memory would drown the figure of
peak memory.  The template runs in Jinja's sandbox with the variables that Hugging Face documents
for chat templates (https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgedistill.errors import InputError
from edgedistill.student import read_json

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class UserPrompt:
    """What a user says, and how many tokens the prompt has that it is rendered into."""

    text: str
    tokens: int


class Prompter:
    """The tokenizer and the chat template of a student directory.

    A student without a template gets the text as it is.

    Raises:
        InputError: there is no ``tokenizer.json``, or the template is not valid.
    """

    def __init__(self, student: Path) -> None:
        self._where = str(student)
        self._tokenizer = _open_tokenizer(student)
        config_file = student / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        self._specials = {k: _content(config.get(k)) for k in ("bos_token", "eos_token")}
        self._template = _open_template(student, config)

    def render(self, text: str) -> str:
        """The prompt for one user message, up to where the answer begins."""
        if self._template is None:
            return text
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=[{"role": "user", "content": text}],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._specials,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"its chat template fails: {error}", where=self._where) from error

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt; special tokens are parsed, none is added."""
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def is_visible(self, ids: Sequence[int]) -> bool:
        """Whether these generated tokens put a whole character on the screen that is not blank."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return bool(text.replace("�", "").strip())

    def exact_ids(self, tokens: int) -> list[int]:
        """Exactly ``tokens`` ids of running English text, repeated when it is too short."""
        ids = self.encode(_prose())
        if not ids:
            raise InputError("its tokenizer gives no tokens for English text", where=self._where)
        return (ids * (tokens // len(ids) + 1))[:tokens]

    def user_prompt(self, tokens: int) -> UserPrompt | None:
        """The longest text of whole words whose rendered prompt has at most ``tokens`` tokens.

        None when the chat template alone has more.
        """
        words = _prose().split()
        words *= tokens // len(words) + 1  # a word has at least one token
        best = None
        for count in range(1, len(words) + 1):
            text = " ".join(words[:count])
            length = len(self.encode(self.render(text)))
            if length > tokens:
                break
            best = UserPrompt(text, length)
        return best


def _prose() -> str:
    return (resources.files("edgedistill.texts") / "prose.txt").read_text(encoding="utf-8")


def _open_tokenizer(student: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = student / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "there is no tokenizer.json",
            where=str(student),
            hint="save the student with its fast tokenizer: tokenizer.save_pretrained(dir)",
        )
    return Tokenizer.from_file(str(path))


def _open_template(student: Path, config: dict[str, Any]) -> Template | None:
    path = student / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"its chat template is not valid: {error}", where=str(student)) from error


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _content(token: Any) -> str:
    """A special token's text; a tokenizer config holds it as a string or as a table."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
