"""Ask a teacher once, and write down what it answers: ``heal`` learns from the file without it.

The teacher may be too large to stand beside a student in training, or may run elsewhere: whatever
writes such lines will do.

{"messages": [...], "answer": "good"}
{"messages": [...], "answer": "good", "tokens": [4221, 2],
 "top_tokens": [[4221, 1075], [2, 198]], "top_log_probs": [[-0.21, -1.9], [-0.001, -7.2]]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgedistill.calibration_lines import CalibrationLine, calibration_lines
from edgedistill.chat import Chat, render_conversation
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.generate import Voice
from edgedistill.evaluate.score import log_softmax
from edgedistill.plugins import load_plugin
from edgedistill.progress import progress_bar
from edgedistill.session import Logits, Session
from edgedistill.student import Student
from edgedistill.verify.prompts import common_prefix

DECIMALS = 5  # of a log-probability


@dataclass(frozen=True)
class RecordSettings:
    """How a teacher is asked.

    Attributes:
        chat: the fixed part of every conversation, the same as the student's.
        top_k: tokens whose probabilities are recorded in the place of each; 0 records the words.
        max_tokens: the longest answer.
        lines: that are asked, from the first; None asks all.
        threads: of the teacher.
    """

    chat: Chat = field(default_factory=Chat)
    top_k: int = 0
    max_tokens: int = 256
    lines: int | None = None
    threads: int = 2


class _Token(NamedTuple):
    """A place of an answer: the likeliest tokens, the one that was written first."""

    top: list[int]
    log_probs: list[float]


def record_answers(teacher: Path, data: Path, out: Path, settings: RecordSettings) -> int:
    """Write the teacher's greedy answer to the last question of every conversation.

    Answers that the file has already are not shown to the teacher.

    Args:
        teacher: a student directory, of any size that fits.
        data: JSON lines with ``messages`` or ``prompt``.
        out: a new file, written aside and renamed.
        settings: of the asking.

    Returns:
        How many lines were written.

    Raises:
        InputError: the teacher or the data are unreadable, ``out`` exists, a line is no
            conversation.
        StageError: the teacher's logits are not finite.
    """
    if out.exists():
        raise InputError("is there already", where=str(out), hint="name a new file")
    context = Student(teacher).facts.max_context_tokens
    lines = calibration_lines(data, context)[: settings.lines]
    for line in lines:
        if not line.turns:
            raise InputError(
                "is no conversation, so there is nothing to answer",
                where=line.where,
                hint='a line is {"messages": [...]} or {"prompt": ...}',
            )
    voice = Voice.of(teacher, settings.chat)
    aside = out.with_name(f"{out.name}.new")
    runtime = load_plugin("runtimes", "torch_reference")()
    opened = runtime.open(teacher, context_tokens=context, threads=settings.threads)
    with opened as session, aside.open("w", encoding="utf-8") as file:
        for entry in _answers(session, lines, voice, settings):
            file.write(json.dumps(entry) + "\n")
    aside.rename(out)
    return len(lines)


def _answers(
    session: Session, lines: Sequence[CalibrationLine], voice: Voice, settings: RecordSettings
) -> Iterator[dict[str, Any]]:
    """A line of the record for each; what neighbouring prompts share is computed once."""
    cached: list[int] = []
    with progress_bar(len(lines), "recording") as bar:
        for line in lines:
            prompt = render_conversation(
                voice.tokenizer, line.turns, settings.chat, where=line.where
            )
            ids: list[int] = voice.tokenizer(prompt, add_special_tokens=False).input_ids
            room = min(settings.max_tokens, session.context_tokens - len(ids))
            if room < 1:
                raise InputError(
                    f"its {len(ids)} tokens leave no room for an answer", where=line.where
                )
            keep = min(common_prefix(cached, ids), len(ids) - 1)
            session.rewind(keep)
            logits = session.prefill(ids[keep:])
            written = _write(session, logits, voice, room, settings.top_k, line.where)
            cached = ids
            yield _entry(line, voice, written, settings.top_k)
            bar.advance()


def _write(
    session: Session, logits: Logits, voice: Voice, room: int, top_k: int, where: str
) -> list[_Token]:
    """The greedy answer, with the token that ends it."""
    written: list[_Token] = []
    while True:
        log_probs = log_softmax(logits)
        if not np.isfinite(log_probs.max()):
            raise StageError(
                f"the teacher's logits are not finite after {len(written)} tokens", where=where
            )
        top = np.argsort(-log_probs, kind="stable")[: max(1, top_k)]
        written.append(_Token(top.tolist(), np.round(log_probs[top], DECIMALS).tolist()))
        token = written[-1].top[0]
        if token in voice.end_ids or len(written) == room:
            return written
        logits = session.step(token)


def _entry(
    line: CalibrationLine, voice: Voice, written: Sequence[_Token], top_k: int
) -> dict[str, Any]:
    tokens = [token.top[0] for token in written]
    entry: dict[str, Any] = {"messages": list(line.turns), "answer": voice.text(tokens)}
    if line.slices:
        entry["slices"] = list(line.slices)
    if top_k:
        entry["tokens"] = tokens
        entry["top_tokens"] = [token.top for token in written]
        entry["top_log_probs"] = [token.log_probs for token in written]
    return entry
