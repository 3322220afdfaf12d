"""Calibration text as token ids: what a stage runs the student on to see what it computes with.

A text is read as the model is used, as the user's message of a conversation (see
:mod:`edgedistill.verify.prompts` for why), and every sequence starts where a conversation starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.student import Student
from edgedistill.verify.prompts import read_as_used
from edgedistill.verify.texts import load_texts

Ids = npt.NDArray[np.int64]

# A long text is cut into passages of so many characters for each token of a sequence, some two
# sequences each, so that a small budget still sees many places of it.
PASSAGE_CHARACTERS_PER_TOKEN = 8
WHOLE_TEXT_PASSAGE_TOKENS = 512  # where all of a text is read
LEAST_SHARE_OF_TEXT = 0.5  # of a sequence, once the conversation around the text is taken off
LINE_HINT = 'a line is {"text": ...} or {"messages": [{"role": ..., "content": ...}]}'


class Calibration(BaseModel):
    """The text that a student is calibrated on.

    Attributes:
        file: JSON lines (``.jsonl``) with ``text`` or ``messages`` each, as training data has them
            (the right one of ``choices`` is the answer), or plain text; None for the three short
            texts that every artifact is verified on, some 1,500 tokens, of which all are used.
        tokens: how many are used; what a file holds beyond them is left out.
        sequence_tokens: length of a sequence, never over the student's context.
        seed: of the order in which lines and passages are taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path | None = None
    tokens: Annotated[int, Field(ge=32)] = 65536
    sequence_tokens: Annotated[int, Field(ge=16)] = 512
    seed: Annotated[int, Field(ge=0)] = 0


class _Message(BaseModel):
    role: str
    content: str


class _Line(BaseModel):
    """What is read of a JSON line; its other keys are for others."""

    text: str | None = None
    messages: list[_Message] | None = Field(default=None, min_length=1)
    choices: list[str] | None = None
    answer: Any = None


Document = str | list[dict[str, str]]


def calibration_ids(student: Path, calibration: Calibration, chat: Chat) -> list[Ids]:
    """The calibration text, as the student's own tokenizer and chat template write it.

    Conversations are packed behind each other, the last of a sequence is cut; a long text is
    continued in the next sequence, behind the conversation's opening again.

    Args:
        student: a student directory with a tokenizer.
        calibration: which text, and how much of it.
        chat: the fixed part of every conversation.

    Returns:
        ``tokens // sequence_tokens`` sequences of int64 [sequence_tokens], the same for the same
        arguments; one of ``tokens`` where that is less.  The built-in texts may give fewer.

    Raises:
        InputError: the file is unreadable, not of its format, or holds fewer tokens; the chat
            template refuses it.
    """
    tokenizer = load_tokenizer(student)
    most = Student(student).facts.max_context_tokens
    length = min(calibration.sequence_tokens, calibration.tokens, most)
    count = calibration.tokens // length
    documents = _documents(calibration.file, length)
    packer = _Packer(length)
    for index in np.random.default_rng(calibration.seed).permutation(len(documents)):
        where, document = documents[index]
        for piece in _pieces(tokenizer, document, chat, length, where):
            packer.add(piece)
        if len(packer.sequences) >= count:
            return packer.sequences[:count]
    if calibration.file is None:
        return packer.sequences or [packer.rest()]
    held = len(packer.sequences) * length
    raise InputError(
        f"fills {len(packer.sequences)} sequences of {length} tokens, "
        f"calibration asks for {count} (tokens: {calibration.tokens})",
        where=str(calibration.file),
        hint=f"state `tokens: {held}`, or give more text" if held else "give more text",
    )


def rendered_texts(tokenizer: Any, file: Path | None, chat: Chat) -> Iterator[str]:
    """All of a calibration file, in its order, as the chat template writes it.

    A long text comes in passages, each as a user's message; without a template as it is.

    Args:
        tokenizer: of ``transformers``.
        file: as :class:`Calibration` names it.
        chat: the fixed part of every conversation.

    Raises:
        InputError: the file is unreadable or not of its format; the chat template refuses it.
    """
    for where, document in _documents(file, WHOLE_TEXT_PASSAGE_TOKENS):
        if isinstance(document, str):
            if not tokenizer.chat_template:
                yield document
                continue
            document = [{"role": "user", "content": document}]
        answering = document[-1]["role"] != "assistant"
        yield render_conversation(tokenizer, document, chat, where=where, answering=answering)


class _Packer:
    """Fills sequences of one length: a piece that fills one stands alone, shorter ones are joined.

    The end of a piece that does not fit is dropped, so that no sequence starts within one.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._open: list[int] = []
        self.sequences: list[Ids] = []

    def add(self, piece: list[int]) -> None:
        if len(piece) < self._length:
            self._open += piece
            if len(self._open) < self._length:
                return
            piece, self._open = self._open[: self._length], []
        self.sequences.append(np.array(piece, dtype=np.int64))

    def rest(self) -> Ids:
        """What fills no sequence."""
        return np.array(self._open, dtype=np.int64)


def _pieces(
    tokenizer: Any, document: Document, chat: Chat, length: int, where: str
) -> Iterator[list[int]]:
    """A document as ids, at most ``length`` at once."""
    if not isinstance(document, str):
        answering = document[-1]["role"] != "assistant"
        text = render_conversation(tokenizer, document, chat, where=where, answering=answering)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        yield ids[:length]
        return
    used = read_as_used(tokenizer, document, chat, where=where)
    opening, body = used.ids[: used.opening], used.ids[used.opening :]
    room = length - len(opening)
    if room < length * LEAST_SHARE_OF_TEXT:
        raise InputError(
            f"the conversation around a text takes {len(opening)} of a sequence's {length} tokens",
            where=where,
            hint="raise calibration.sequence_tokens, or shorten chat.system",
        )
    for start in range(0, len(body), room):
        yield opening + body[start : start + room]


def _documents(file: Path | None, length: int) -> list[tuple[str, Document]]:
    """Documents with their places; long texts in passages."""
    found: list[tuple[str, Document]]
    if file is None:
        found = list(load_texts({}).items())
    elif file.suffix == ".jsonl":
        lines = enumerate(_read(file).split("\n"), start=1)
        places = ((f"{file}:{number}", line) for number, line in lines if line.strip())
        found = [(where, _parse(line, where)) for where, line in places]
    else:
        found = [(str(file), _read(file))]
    size = length * PASSAGE_CHARACTERS_PER_TOKEN
    documents: list[tuple[str, Document]] = []
    for where, document in found:
        parts = _passages(document, size) if isinstance(document, str) else [document]
        documents += [(where, part) for part in parts]
    if not documents:
        raise InputError("holds no text", where=str(file), hint="calibration needs some text")
    return documents


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", where=str(file)) from error


def _parse(line: str, where: str) -> Document:
    try:
        fields = _Line.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"{key}: {first['msg']}" if key else "is not a JSON object"
        raise InputError(message, where=where, hint=LINE_HINT) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", where=where, hint=LINE_HINT) from error
    if fields.messages is None:
        if fields.text is None:
            raise InputError("has neither text nor messages", where=where, hint=LINE_HINT)
        return fields.text
    messages = [message.model_dump() for message in fields.messages]
    if fields.choices is not None:
        if type(fields.answer) is not int or not 0 <= fields.answer < len(fields.choices):
            raise InputError(
                f"answer = {fields.answer!r} is not the place of one of its choices", where=where
            )
        messages.append({"role": "assistant", "content": fields.choices[fields.answer]})
    return messages


def _passages(text: str, characters: int) -> Iterator[str]:
    """Cut a text into passages of at most so many characters, at the end of a line or a word."""
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            middle = start + characters // 2
            cuts = (text.rfind(mark, middle, end) for mark in ("\n\n", "\n", " "))
            end = next((cut + 1 for cut in cuts if cut >= 0), end)
        if passage := text[start:end].strip():
            yield passage
        start = end
