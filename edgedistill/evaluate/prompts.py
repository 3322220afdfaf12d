"""From cases to token ids: the student's own chat template and tokenizer, and the boundary rule.

The boundary rule: a choice, or a text that answers a conversation, is tokenized as the
continuation of its prompt.  The ids of ``prompt + choice`` are taken as one text, and what follows
the prompt's own ids is the choice.  Where the two texts merge across the boundary, so that the
prompt's ids are no prefix, the choice is tokenized on its own and appended.  No special tokens are
added beyond the template's; a text that stands alone follows the token that begins texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.evaluate.suite import Case, ChoiceCase, GenerateCase, TextCase

SHOWN_CASES = 3


@dataclass(frozen=True)
class Prompt:
    """The token ids of a case.

    Attributes:
        id: of the case.
        ids: of the rendered prompt, ending where the assistant's answer begins; never empty.
        choices: what may follow: the ids of each choice, or of the text; never empty, but for a
            case that is answered in the model's own words, which has none.
        answer_tokens: the longest answer in the model's own words.
    """

    id: str
    ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and longest continuation: what has to fit into the context."""
        return len(self.ids) + max((len(c) for c in self.choices), default=self.answer_tokens)


def render_prompts(
    student: Path, cases: Sequence[Case], chat: Chat, *, context_tokens: int
) -> list[Prompt]:
    """The ids of every case, in order.

    Args:
        student: a directory with ``tokenizer.json`` and a chat template.
        cases: what to ask.
        chat: its system message is put before the messages of every case that has none.
        context_tokens: what a prompt with its longest choice or answer must not exceed.

    Raises:
        InputError: no tokenizer, no chat template, a template that refuses the messages, a choice
            without tokens, cases that do not fit into the context.
    """
    tokenizer = load_tokenizer(student)
    texts = [_beginning(tokenizer, case, chat, student) for case in cases]
    following = [_continuations(case) for case in cases]
    continued = [t + c for t, choices in zip(texts, following, strict=True) for c in choices]
    alone = _Alone(tokenizer)
    wholes = iter(_encode(tokenizer, continued))
    prompts = []
    for case, ids, choices in zip(cases, _encode(tokenizer, texts), following, strict=True):
        tails = [_continuation(ids, next(wholes), c, alone) for c in choices]
        if not ids or not all(tails):
            raise InputError(
                f"case {case.id}: the prompt or a choice of {list(choices)} has no tokens",
                where=str(student),
            )
        room = case.max_tokens if isinstance(case, GenerateCase) else 0
        prompts.append(Prompt(case.id, tuple(ids), tuple(tuple(t) for t in tails), room))
    _check_lengths(prompts, context_tokens)
    return prompts


def _beginning(tokenizer: Any, case: Case, chat: Chat, student: Path) -> str:
    """The text up to what is scored or written."""
    where = f"{student}, case {case.id}"
    if case.messages:
        messages = [message.model_dump() for message in case.messages]
        return render_conversation(tokenizer, messages, chat, where=where)
    # Where a family has no token that begins texts, the one that ends them stands between two.
    begins = tokenizer.bos_token or tokenizer.eos_token
    if not begins:
        raise InputError(
            "the tokenizer has no token that begins or ends texts, which a text that stands "
            "alone follows",
            where=where,
            hint="give the case messages that the text answers",
        )
    return str(begins)


def _continuations(case: Case) -> tuple[str, ...]:
    if isinstance(case, ChoiceCase):
        return case.choices
    return (case.text,) if isinstance(case, TextCase) else ()


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
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
            hint="raise context_tokens, or shorten the cases; a long text can be several cases",
        )
