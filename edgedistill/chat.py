"""How a case becomes a prompt: what a recipe says of the chat template."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Chat(BaseModel):
    """The fixed part of every conversation.

    Attributes:
        system: the system message, put before the case's own messages; None adds none.
        template_args: extra variables of the chat template, such as ``enable_thinking: false``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str | None = None
    template_args: dict[str, Any] = {}
