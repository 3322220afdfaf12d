"""Production logs: JSON lines, one request a line, read forgivingly.

Logs are written by other people's programs.  Keys have several common names, contents may be split
into parts, lines may be broken: what can be understood is taken, what cannot is counted and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from edgedistill.errors import InputError

PROMPT_KEYS = ("prompt", "input", "query", "question", "text")
ANSWER_KEYS = ("answer", "response", "completion", "output")
TIME_KEYS = ("timestamp", "time", "ts", "created", "created_at")
TAG_KEYS = ("tags", "labels")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
MAX_LINE_BYTES = 4_000_000
MAX_TAG_CHARACTERS = 64  # what is longer is a text, not a tag
MILLISECONDS_FROM = 1e11  # as seconds this is the year 5138
LAST_SECOND = 253402300799.0  # of the year 9999, where Python's calendar ends
SHOWN_PROBLEMS = 10


class Turn(NamedTuple):
    """One message: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a log that could be understood.

    Attributes:
        line: its number in the file, from 1.
        turns: the conversation, ending with the user's message that was to be answered.
        answer: what was answered, where the log has it.
        time_s: seconds since 1970 (UTC); None where the log has none that can be read.
        tags: sorted, without repeats.
    """

    line: int
    turns: tuple[Turn, ...]
    answer: str | None
    time_s: float | None
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        """All that was said by user and assistant; system prompts are the application's."""
        return "\n".join(turn.content for turn in self.turns if turn.role != "system")


@dataclass(frozen=True)
class Logs:
    """What a file holds: requests in order, and what is wrong with the other lines."""

    path: Path
    requests: list[Request]
    problems: list[InputError]


def read_logs(path: Path) -> Logs:
    """Read a log file; blank lines are nothing.

    Raises:
        InputError: it cannot be read, holds no request, or more broken lines than requests (the
            first ten are named).
    """
    requests: list[Request] = []
    problems: list[InputError] = []
    try:
        with path.open("rb") as file:
            for number, line in _lines(file):
                if line is not None and not line.strip():
                    continue
                try:
                    requests.append(_parse(line, number, f"{path}:{number}"))
                except InputError as problem:
                    problems.append(problem)
    except OSError as error:
        raise InputError(f"the log cannot be read: {error.strerror}", where=str(path)) from error
    if len(problems) > len(requests):
        raise _too_many(problems, len(requests), path)
    if not requests:
        hint = 'write one JSON object a line, with "messages" or "prompt"'
        raise InputError("the log holds no request", where=str(path), hint=hint)
    return Logs(path, requests, problems)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line; None for one too long to be kept in memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            continue
        while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _parse(line: bytes | None, number: int, where: str) -> Request:
    if line is None:
        raise InputError(f"is longer than {MAX_LINE_BYTES} bytes", where=where)
    try:
        # A lone surrogate is legal in JSON and in no file.
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON in UTF-8 ({_short(str(error))})", where=where) from error
    if not isinstance(fields, dict):
        raise InputError(f"is {type(fields).__name__}, not a JSON object", where=where)
    turns = _turns(fields, where)
    answer = _first(fields, ANSWER_KEYS)
    answer = _text(answer) if answer is not None else None
    while turns and turns[-1].role != "user":
        last = turns.pop()
        if answer is None and last.role == "assistant":
            answer = last.content
    if not turns or not turns[-1].content.strip():
        hint = "a request ends with what the user said"
        raise InputError("the user says nothing", where=where, hint=hint)
    time_s = _time(_first(fields, TIME_KEYS))
    return Request(number, tuple(turns), answer, time_s, _tags(_first(fields, TAG_KEYS)))


def _turns(fields: dict[str, Any], where: str) -> list[Turn]:
    messages = fields.get("messages")
    if messages is None:
        prompt = _text(_first(fields, PROMPT_KEYS))
        if prompt is None:
            hint = f"known keys: messages, {', '.join(PROMPT_KEYS)}"
            raise InputError("holds neither messages nor a prompt", where=where, hint=hint)
        return [Turn("user", prompt)]
    if not isinstance(messages, list):
        raise InputError(f"messages = {_short(messages)} is not a list", where=where)
    return [_turn(message, f"messages.{i}", where) for i, message in enumerate(messages)]


def _turn(message: Any, key: str, where: str) -> Turn:
    if not isinstance(message, dict):
        raise InputError(f"{key} = {_short(message)} is not a message", where=where)
    role, content = message.get("role"), _text(message.get("content"))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        hint = f"known roles: {', '.join(ROLES)}"
        raise InputError(f"{key}.role = {_short(role)} is not known", where=where, hint=hint)
    if content is None:
        hint = "a text, or a list of parts of the type text"
        raise InputError(f"{key}.content is not a text", where=where, hint=hint)
    return Turn(known, content)


def _text(value: Any) -> str | None:
    """A text, or the joined texts of a list of parts; None for what is neither."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if not texts or len(texts) < len(parts):
            return None
        value = "".join(texts)
    return _writable(value) if isinstance(value, str) else None


def _writable(text: str) -> str:
    """The text without lone surrogates, which no file in UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _first(fields: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def _time(value: Any) -> float | None:
    """Seconds since 1970 from ISO 8601, seconds or milliseconds; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    if not isinstance(value, int | float) or not 0 <= value <= 1000 * LAST_SECOND:
        return None
    seconds = value / 1000 if value > MILLISECONDS_FROM else float(value)
    return seconds if seconds <= LAST_SECOND else None


def _tags(value: Any) -> tuple[str, ...]:
    """``["a", "b"]``, ``"a"`` or ``{"key": "value"}``, which becomes ``key=value``."""
    if isinstance(value, dict):
        found = [f"{key}={item}" for key, item in value.items() if _is_plain(item)]
    else:
        items = value if isinstance(value, list) else [value]
        found = [str(item) for item in items if _is_plain(item)]
    tags = {_writable(tag.strip()) for tag in found}
    return tuple(sorted(tag for tag in tags if 0 < len(tag) <= MAX_TAG_CHARACTERS))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _too_many(problems: list[InputError], usable: int, path: Path) -> InputError:
    shown = "\n".join(f"- {problem}" for problem in problems[:SHOWN_PROBLEMS])
    hidden = len(problems) - SHOWN_PROBLEMS
    more = f"\n- and {hidden} more" if hidden > 0 else ""
    what = f"{len(problems)} lines cannot be understood, {usable} can\n{shown}{more}"
    return InputError(what, where=str(path), hint="is this a log of requests, one a line?")
