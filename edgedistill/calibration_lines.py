"""Read text to calibrate on or to train on: JSON lines of several kinds, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from edgedistill.errors import InputError
from edgedistill.verify.texts import load_texts

# A long text is cut into passages of so many characters for each token of a sequence, some two
# sequences each, so that a small budget still sees many places of it.
PASSAGE_CHARACTERS_PER_TOKEN = 8
LINE_HINT = (
    'a line is {"text": ...}, {"messages": [{"role": ..., "content": ...}]}, '
    '{"prompt": ..., "answer": ...} or {"rendered": ...}'
)

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class RecordedTokens:
    """An answer as the ids that a teacher wrote, one entry for each.

    Attributes:
        ids: of the answer, with the one that ends it.
        top_ids: the likeliest ids in the place of each; empty where none were recorded.
        top_log_probs: theirs, in nats, over the teacher's whole vocabulary.
    """

    ids: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_log_probs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class CalibrationLine:
    """One text, or one conversation.

    Attributes:
        where: for errors.
        text: that stands alone; None for a conversation.
        rendered: a conversation as the chat template writes it, its marks included.
        turns: of the conversation, without its last answer.
        answer: the assistant's, to the last turn; None where it is still to come.
        reasoning: that the teacher wrote before the answer.
        recorded: the answer as ids.
        slices: the groups that the line belongs to.
    """

    where: str
    text: str | None = None
    rendered: str | None = None
    turns: tuple[dict[str, str], ...] = ()
    answer: str | None = None
    reasoning: str | None = None
    recorded: RecordedTokens | None = None
    slices: tuple[str, ...] = ()


class _Message(BaseModel):
    role: str
    content: str


class _Line(BaseModel):
    """What is read of a JSON line; its other keys are for others."""

    text: str | None = None
    rendered: str | None = None
    messages: list[_Message] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    choices: list[str] | None = None
    answer: Any = None
    reasoning: str | None = None
    slices: tuple[str, ...] = ()
    tokens: tuple[int, ...] | None = Field(default=None, min_length=1)
    top_tokens: tuple[tuple[int, ...], ...] = ()
    top_log_probs: tuple[tuple[float, ...], ...] = ()

    @model_validator(mode="after")
    def _top_fits(self) -> Self:
        shape = [len(row) for row in self.top_tokens]
        if shape != [len(row) for row in self.top_log_probs]:
            raise ValueError("top_tokens and top_log_probs are not of one shape")
        if shape and (not all(shape) or len(shape) != len(self.tokens or ())):
            raise ValueError("top_tokens has to have some for each of tokens")
        if any(len(set(row)) < len(row) for row in self.top_tokens):
            raise ValueError("top_tokens repeats a token in one place")
        if not all(value <= 0.0 for row in self.top_log_probs for value in row):
            raise ValueError("top_log_probs has one that is not a logarithm of a probability")
        return self


def calibration_lines(file: Path | None, sequence_tokens: int) -> list[CalibrationLine]:
    """All lines of a file, long texts in passages.

    Args:
        file: JSON lines (``.jsonl``) or plain text; None for the built-in texts.
        sequence_tokens: that passages are cut for.

    Raises:
        InputError: the file is unreadable, not of its format, or holds no text.
    """
    lines: list[CalibrationLine]
    if file is None:
        lines = [CalibrationLine(where, text) for where, text in load_texts({}).items()]
    elif file.suffix == ".jsonl":
        numbered = enumerate(_read(file).split("\n"), start=1)
        lines = [_parse(line, f"{file}:{number}") for number, line in numbered if line.strip()]
    else:
        lines = [CalibrationLine(str(file), _read(file))]
    size = sequence_tokens * PASSAGE_CHARACTERS_PER_TOKEN
    found: list[CalibrationLine] = []
    for line in lines:
        if line.text is None:
            found.append(line)
        else:
            parts = _passages(line.text, size)
            found += [CalibrationLine(line.where, part, slices=line.slices) for part in parts]
    if not found:
        raise InputError("holds no text", where=str(file), hint="calibration needs some text")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", where=str(file)) from error


def _parse(line: str, where: str) -> CalibrationLine:
    try:
        fields = _Line.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type":
            message = "is not a JSON object"
        raise InputError(message, where=where, hint=LINE_HINT) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", where=where, hint=LINE_HINT) from error
    turns = _turns(fields)
    if turns is None:
        if fields.text is None and fields.rendered is None:
            raise InputError("has neither text nor messages", where=where, hint=LINE_HINT)
        rendered = fields.rendered if fields.text is None else None
        return CalibrationLine(where, fields.text, rendered, slices=fields.slices)
    answer = _answer(fields, turns, where)
    recorded = None
    if fields.tokens is not None:
        recorded = RecordedTokens(fields.tokens, fields.top_tokens, fields.top_log_probs)
    return CalibrationLine(
        where,
        turns=tuple(turns),
        answer=answer,
        reasoning=fields.reasoning,
        recorded=recorded,
        slices=fields.slices,
    )


def _turns(fields: _Line) -> Turns | None:
    if fields.messages is not None:
        return [message.model_dump() for message in fields.messages]
    return None if fields.prompt is None else [{"role": "user", "content": fields.prompt}]


def _answer(fields: _Line, turns: Turns, where: str) -> str | None:
    """The answer to the last turn, which is taken off the turns where it is one of them."""
    if fields.choices is not None:
        if type(fields.answer) is not int or not 0 <= fields.answer < len(fields.choices):
            raise InputError(
                f"answer = {fields.answer!r} is not the place of one of its choices", where=where
            )
        return fields.choices[fields.answer]
    if isinstance(fields.answer, str):
        return fields.answer
    if turns[-1]["role"] == "assistant" and len(turns) > 1:
        return turns.pop()["content"]
    return None


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
