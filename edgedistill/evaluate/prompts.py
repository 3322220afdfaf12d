"""From cases to token ids: the student's own chat template and tokenizer, and the boundary rule.

The boundary rule: a choice is tokenized as the continuation of its prompt.  The ids of
``prompt + choice`` are taken as one text, and what follows the prompt's own ids is the choice.
Where the two texts merge across the boundary, so that the prompt's ids are no prefix, the choice
is tokenized on its own and appended.  No special tokens are added beyond the template's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.evaluate.suite import Case

SHOWN_CASES = 3


@dataclass(frozen=True)
class Prompt:
    """The token ids of a case.

    Attributes:
        id: of the case.
        ids: of the rendered prompt, ending where the assistant's answer begins; never empty.
        choices: for each choice the ids that follow the prompt; never empty.
    """

    id: str
    ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Prompt and longest choice: what has to fit into the context."""
        return len(self.ids) + max(len(choice) for choice in self.choices)


def render_prompts(
    student: Path, cases: Sequence[Case], chat: Chat, *, context_tokens: int
) -> list[Prompt]:
    """The ids of every case, in order.

    Args:
        student: a directory with ``tokenizer.json`` and a chat template.
        cases: what to ask.
        chat: its system message is put before the messages of every case that has none.
        context_tokens: what a prompt with its longest choice must not exceed.

    Raises:
        InputError: no tokenizer, no chat template, a template that refuses the messages, a choice
            without tokens, cases that do not fit into the context.
    """
    tokenizer = load_tokenizer(student)
    texts = [
        render_conversation(
            tokenizer,
            [message.model_dump() for message in case.messages],
            chat,
            where=f"{student}, case {case.id}",
        )
        for case in cases
    ]
    continued = [text + c for text, case in zip(texts, cases, strict=True) for c in case.choices]
    alone = _Alone(tokenizer)
    wholes = iter(_encode(tokenizer, continued))
    prompts = []
    for case, ids in zip(cases, _encode(tokenizer, texts), strict=True):
        choices = [_continuation(ids, next(wholes), c, alone) for c in case.choices]
        if not ids or not all(choices):
            raise InputError(
                f"case {case.id}: the prompt or a choice of {list(case.choices)} has no tokens",
                where=str(student),
            )
        prompts.append(Prompt(case.id, tuple(ids), tuple(tuple(choice) for choice in choices)))
    _check_lengths(prompts, context_tokens)
    return prompts


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


class _Alone:
    """Ids of choices tokenized on their own, each once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, choice: str) -> list[int]:
        if choice not in self._known:
            self._known[choice] = _encode(self._tokenizer, [choice])[0]
        return self._known[choice]


def _continuation(prompt: list[int], whole: list[int], choice: str, alone: _Alone) -> list[int]:
    if len(whole) > len(prompt) and whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return alone(choice)


def _check_lengths(prompts: Sequence[Prompt], context_tokens: int) -> None:
    long = [prompt for prompt in prompts if prompt.tokens > context_tokens]
    if long:
        shown = ", ".join(f"{p.id} ({p.tokens} tokens)" for p in long[:SHOWN_CASES])
        raise InputError(
            f"{len(long)} of {len(prompts)} cases do not fit into context_tokens = "
            f"{context_tokens}: {shown}{', ...' if len(long) > SHOWN_CASES else ''}",
            hint="raise context_tokens in the recipe, or shorten the cases",
        )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading ids that two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
