"""How a conversation becomes a prompt: by the student's chat template and the recipe's ``chat``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgedistill.errors import InputError


class Chat(BaseModel):
    """The fixed part of every conversation.

    Attributes:
        system: the system message, put before the case's own messages; None adds none.
        template_args: extra variables of the chat template, such as ``enable_thinking: false``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str | None = None
    template_args: dict[str, Any] = {}


def load_tokenizer(student: Path) -> Any:
    """The student's tokenizer by ``transformers``; no code from the directory is run.

    Raises:
        InputError: there is none, or it cannot be opened.
    """
    from transformers import AutoTokenizer

    if not (student / "tokenizer.json").is_file():
        raise InputError("holds no tokenizer.json", where=str(student))
    try:
        return AutoTokenizer.from_pretrained(
            str(student), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"its tokenizer cannot be opened ({error})", where=str(student)) from error


def render_conversation(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    chat: Chat,
    *,
    where: str,
    answering: bool = True,
) -> str:
    """The text up to where the assistant's answer begins.

    Args:
        tokenizer: of ``transformers``, with a chat template.
        messages: ``role`` and ``content`` each; the system message of ``chat`` is put first where
            they bring none.
        chat: the fixed part of the conversation.
        where: named in errors.
        answering: False for a conversation whose last message is an answer; all of it is rendered.

    Raises:
        InputError: there is no template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError(
            "has no chat template, so a conversation cannot be rendered",
            where=where,
            hint="put the model's chat_template.jinja into the directory",
        )
    conversation = list(messages)
    if chat.system is not None and conversation[0]["role"] != "system":
        conversation.insert(0, {"role": "system", "content": chat.system})
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=answering,
            **chat.template_args,
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template refuses it: {error}",
            where=where,
            hint="its roles or the recipe's chat.template_args do not suit the template",
        ) from error
    return str(text)
