"""What the judge and every artifact read: token ids, made once by the student's own tokenizer.

A text is read as the model is used: as the user's message of a conversation.  A model that meets a
text without the beginning that it was trained with may be unstable by itself: on SmolLM2-135M a
second word can come half-way to being an attention sink, as the first one is (Xiao et al. 2023,
arXiv 2309.17453), and noise of 1 % on the embeddings then moves that position by 0.08 nats, which
is some hundred times the mean.  Such a position says nothing of an artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from edgedistill.chat import Chat, render_conversation
from edgedistill.errors import InputError

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
NEXT_QUESTION = "And which river runs through it? Name one of its bridges as well."


class UsedText(NamedTuple):
    """A text as the model reads it.

    Attributes:
        ids: of the whole conversation.
        opening: how many of them stand before the text itself.
    """

    ids: list[int]
    opening: int


class TwoTurns(NamedTuple):
    """A conversation whose first turn is in the cache when the second one arrives.

    Attributes:
        ids: of the whole conversation, up to where the second answer begins.
        first_prompt: how many of them the first prompt has.
        cached: how many of them are in the cache after the first answer; at least
            ``first_prompt``, less than all.
    """

    ids: list[int]
    first_prompt: int
    cached: int


def read_as_used(tokenizer: Any, text: str, chat: Chat, *, where: str) -> UsedText:
    """A text as the user's message.

    Without a chat template it follows the beginning-of-sequence token, if the tokenizer has one.

    Args:
        tokenizer: of ``transformers``.
        text: of any length.
        chat: the fixed part of the conversation.
        where: named in errors.

    Raises:
        InputError: the chat template refuses it.
    """
    if tokenizer.chat_template:
        content = text.strip()
        message = {"role": "user", "content": content}
        whole = render_conversation(tokenizer, [message], chat, where=where)
        before = whole[: max(0, whole.find(content))]
    else:
        before = tokenizer.bos_token or ""
        whole = before + text
    return UsedText(_ids(tokenizer, whole), len(_ids(tokenizer, before)))


def read_long(
    tokenizer: Any, texts: Iterable[str], chat: Chat, *, tokens: int, where: str
) -> list[int]:
    """The texts behind each other, again and again, as one message: exactly ``tokens`` ids.

    Said again, a text is foretold by looking back over the whole of it, so the far positions ask
    for attention over long distances.

    Raises:
        InputError: the texts have no tokens; the chat template refuses them.
    """
    once = "\n\n".join(text.strip() for text in texts)
    length = len(_ids(tokenizer, once))
    if length == 0:
        raise InputError("its tokenizer finds no tokens in the texts", where=where)
    # One more than needed: at the seams tokens may merge.
    often = "\n\n".join([once] * (tokens // length + 2))
    return read_as_used(tokenizer, often, chat, where=where).ids[:tokens]


def read_two_turns(tokenizer: Any, chat: Chat, *, most_tokens: int, where: str) -> TwoTurns:
    """Question, answer and next question, and how much of it the cache keeps from the first turn.

    A template may write an answer differently once it is history (Qwen3 drops its reasoning): an
    app keeps the tokens up to there, and so does this.  A template that knows a single turn only
    is read in two parts.
    """
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT_QUESTION},
    ]
    if tokenizer.chat_template:
        first = render_conversation(tokenizer, turns[:1], chat, where=where)
        try:
            whole = render_conversation(tokenizer, turns, chat, where=where)
        except InputError:
            whole = first
    else:
        first = (tokenizer.bos_token or "") + QUESTION + " "
        whole = first + ANSWER + " " + NEXT_QUESTION
    ids = _ids(tokenizer, whole)[:most_tokens]
    cached = min(common_prefix(_ids(tokenizer, first + ANSWER), ids), len(ids) - 1)
    first_prompt = min(common_prefix(_ids(tokenizer, first), ids), cached)
    return TwoTurns(ids, max(1, first_prompt), max(1, cached))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading ids that two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared
