"""Calibration text as token ids: what a stage runs the student on to see what it computes with.

A text is read as the model is used, as the user's message of a conversation (see
:mod:`edgedistill.verify.prompts` for why), and every sequence starts where a conversation starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from edgedistill.calibration_lines import CalibrationLine, calibration_lines
from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.on_policy import is_drawn
from edgedistill.student import Student
from edgedistill.verify.prompts import common_prefix, read_as_used

Ids = npt.NDArray[np.int64]
Top = tuple[tuple[int, ...], tuple[float, ...]]

WHOLE_TEXT_PASSAGE_TOKENS = 512  # where all of a text is read
SHOWN = 40  # characters
LEAST_SHARE_OF_TEXT = 0.5  # of a sequence, once the conversation around the text is taken off


class Calibration(BaseModel):
    """The text that a student is calibrated on.

    Attributes:
        file: JSON lines (``.jsonl``) with ``text``, ``messages``, ``rendered`` (with the template's
            marks in it), or ``prompt`` and ``answer`` each, as training data has them (the right
            one of ``choices`` is the answer), or plain text; None for the three short texts that
            every artifact is verified on, some 1,500 tokens, of which all are used.
        tokens: how many are used; what a file holds beyond them is left out.
        sequence_tokens: length of a sequence, never over the student's context.
        seed: of the order in which lines and passages are taken.
        own_text: of the formats of ``file``, such as ``edgedistill write-text`` writes: what the
            student says by itself, for domains that ``file`` has nothing of.
        own_share: of the sequences that are taken from there, evenly spread; all of them where
            there is no ``file``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path | None = None
    own_text: Path | None = None
    own_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    tokens: Annotated[int, Field(ge=32)] = 65536
    sequence_tokens: Annotated[int, Field(ge=16)] = 512
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass
class Piece:
    """A conversation, or a part of a text, as ids; equal lengths.

    Attributes:
        ids: of all of it.
        answers: whether each is part of the assistant's last answer, or ends it.
        tops: what a teacher found likeliest in the place of each, where that was recorded.
    """

    ids: list[int]
    answers: list[bool] = field(default_factory=list)
    tops: list[Top | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = self.answers or [False] * len(self.ids)
        self.tops = self.tops or [None] * len(self.ids)

    def first(self, tokens: int) -> Piece:
        """Its beginning."""
        return Piece(self.ids[:tokens], self.answers[:tokens], self.tops[:tokens])

    def add(self, other: Piece) -> None:
        """Put another behind it."""
        self.ids += other.ids
        self.answers += other.answers
        self.tops += other.tops


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
    pieces = calibration_pieces(student, calibration, chat)
    return [np.array(piece.ids, dtype=np.int64) for piece in pieces]


def calibration_pieces(
    student: Path,
    calibration: Calibration,
    chat: Chat,
    *,
    tail_power: float = 0.0,
    reasoning: str | None = None,
    hint: str | None = None,
) -> list[Piece]:
    """As :func:`calibration_ids`, with what is known of each token.

    Args:
        student: as there.
        calibration: as there.
        chat: as there.
        tail_power: lines are drawn with odds of ``count ** -tail_power``, by the count of lines of
            the rarest of their slices; 0 draws all alike.
        reasoning: how an answer is written behind its reasoning, with ``{reasoning}`` and
            ``{answer}`` in it; None leaves reasoning out.
        hint: what mends a file that holds too little; default: fewer ``calibration.tokens``.
    """
    tokenizer = load_tokenizer(student)
    facts = Student(student).facts
    length = min(calibration.sequence_tokens, calibration.tokens, facts.max_context_tokens)
    reader = _Reader(tokenizer, chat, length, facts.vocab_size, reasoning)
    return _mixed(reader, calibration, calibration.tokens // length, tail_power, hint)


def _mixed(
    reader: _Reader, calibration: Calibration, count: int, tail_power: float, hint: str | None
) -> list[Piece]:
    """So many sequences of both texts, evenly mixed: more of them begin with the same ones."""
    own_text = calibration.own_text
    if own_text is None:
        return _drawn(reader, calibration, count, tail_power, hint)
    own = calibration.model_copy(update={"file": own_text})
    more = "write more text with `edgedistill write-text`, or lower calibration.own_share"
    if calibration.file is None:
        return _drawn(reader, own, count, 0.0, more)
    owned = [is_drawn(place, calibration.own_share) for place in range(count)]
    texts = {
        False: iter(_drawn(reader, calibration, count - sum(owned), tail_power, hint)),
        True: iter(_drawn(reader, own, sum(owned), 0.0, more)),
    }
    return [next(texts[mine]) for mine in owned]


def _drawn(
    reader: _Reader, calibration: Calibration, count: int, tail_power: float, hint: str | None
) -> list[Piece]:
    """So many sequences of ``calibration.file``."""
    if count == 0:
        return []
    length = reader.length
    lines = calibration_lines(calibration.file, length)
    packer = _Packer(length)
    for index in _order(lines, calibration.seed, tail_power):
        for piece in reader.pieces(lines[index]):
            packer.add(piece)
        if len(packer.sequences) >= count:
            return packer.sequences[:count]
    if calibration.file is None:
        return packer.sequences or [packer.rest]
    held = len(packer.sequences) * length
    raise InputError(
        f"fills {len(packer.sequences)} sequences of {length} tokens, "
        f"and {count} are asked for ({count * length} tokens)",
        where=str(calibration.file),
        hint=hint or (f"state `tokens: {held}`, or give more text" if held else "give more text"),
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
    for line in calibration_lines(file, WHOLE_TEXT_PASSAGE_TOKENS):
        if line.rendered is not None:
            yield line.rendered
            continue
        if line.text is not None and not tokenizer.chat_template:
            yield line.text
            continue
        turns = list(line.turns)
        if line.text is not None:
            turns = [{"role": "user", "content": line.text}]
        if line.answer is not None:
            turns.append({"role": "assistant", "content": line.answer})
        answering = turns[-1]["role"] != "assistant"
        yield render_conversation(tokenizer, turns, chat, where=line.where, answering=answering)


def _order(lines: Sequence[CalibrationLine], seed: int, tail_power: float) -> list[int]:
    """The order in which lines are drawn, without replacement.

    Unequal odds: each line waits for an exponential time of its own rate (Efraimidis & Spirakis
    2006, Information Processing Letters 97).
    """
    generator = np.random.default_rng(seed)
    if tail_power == 0.0:
        return [int(place) for place in generator.permutation(len(lines))]
    counts = Counter(name for line in lines for name in set(line.slices))
    rarest = [min((counts[n] for n in line.slices), default=len(lines)) for line in lines]
    odds = (np.array(rarest) / len(lines)) ** -tail_power
    waits = generator.exponential(size=len(lines)) / odds
    return [int(place) for place in np.argsort(waits, kind="stable")]


class _Packer:
    """Fills sequences of one length: a piece that fills one stands alone, shorter ones are joined.

    The end of a piece that does not fit is dropped, so that no sequence starts within one.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.rest = Piece([])  # what fills no sequence yet
        self.sequences: list[Piece] = []

    def add(self, piece: Piece) -> None:
        if len(piece.ids) < self._length:
            self.rest.add(piece)
            if len(self.rest.ids) < self._length:
                return
            piece, self.rest = self.rest.first(self._length), Piece([])
        self.sequences.append(piece)


@dataclass(frozen=True)
class _Reader:
    """Turns lines into ids, at most ``length`` at once."""

    tokenizer: Any
    chat: Chat
    length: int
    vocab_size: int
    reasoning: str | None

    def pieces(self, line: CalibrationLine) -> Iterator[Piece]:
        if line.text is not None:
            yield from self._passage(line.text, line.where)
        elif line.rendered is not None:
            yield Piece(self._ids(line.rendered)).first(self.length)
        elif line.recorded is not None:
            yield self._recorded(line).first(self.length)
        else:
            yield self._conversation(line).first(self.length)

    def _conversation(self, line: CalibrationLine) -> Piece:
        if line.answer is None or not line.answer.strip():  # an empty one teaches nothing
            return Piece(self._ids(self._asked(line)))
        answer = line.answer
        if self.reasoning is not None and line.reasoning is not None:
            answer = self.reasoning.format(reasoning=line.reasoning, answer=answer)
        turns = [*line.turns, {"role": "assistant", "content": answer}]
        text = render_conversation(
            self.tokenizer, turns, self.chat, where=line.where, answering=False
        )
        ids = self._ids(text)
        # Templates may trim an answer, but none can trim its middle.
        start = text.rfind(answer.strip())
        if start < 0:
            raise InputError(
                "the chat template does not write the answer as it is",
                where=line.where,
                hint="some take reasoning off: leave `reasoning` out",
            )
        before = common_prefix(self._ids(text[:start]), ids)
        through = common_prefix(self._ids(text[: start + len(answer.strip())]), ids)
        # Its last token, if text behind it is merged with it, and the one that ends it.
        return Piece(ids, [before <= place <= through for place in range(len(ids))])

    def _recorded(self, line: CalibrationLine) -> Piece:
        """The prompt's ids, and behind them those that the teacher wrote."""
        assert line.recorded is not None
        recorded = line.recorded
        named = [*recorded.ids, *(token for row in recorded.top_ids for token in row)]
        if not 0 <= min(named) <= max(named) < self.vocab_size:
            raise InputError(
                f"its tokens go from {min(named)} to {max(named)}, "
                f"the student knows {self.vocab_size}",
                where=line.where,
                hint="tokens are ids of the student's own tokenizer",
            )
        said = self.tokenizer.decode(list(recorded.ids), skip_special_tokens=True)
        if line.answer is not None and said != line.answer:
            raise InputError(
                f"its tokens say {said[:SHOWN]!r}, its answer {line.answer[:SHOWN]!r}",
                where=line.where,
                hint="tokens are ids of the student's own tokenizer; without them the answer's "
                "words are learned",
            )
        piece = Piece(self._ids(self._asked(line)))
        tops: list[Top | None] = list(
            zip(recorded.top_ids, recorded.top_log_probs, strict=True)
        ) or [None] * len(recorded.ids)
        piece.add(Piece(list(recorded.ids), [True] * len(recorded.ids), tops))
        return piece

    def _asked(self, line: CalibrationLine) -> str:
        return render_conversation(self.tokenizer, line.turns, self.chat, where=line.where)

    def _passage(self, text: str, where: str) -> Iterator[Piece]:
        used = read_as_used(self.tokenizer, text, self.chat, where=where)
        opening, body = used.ids[: used.opening], used.ids[used.opening :]
        room = self.length - len(opening)
        if room < self.length * LEAST_SHARE_OF_TEXT:
            raise InputError(
                f"the conversation around a text takes {len(opening)} of a sequence's "
                f"{self.length} tokens",
                where=where,
                hint="raise calibration.sequence_tokens, or shorten chat.system",
            )
        for start in range(0, len(body), room):
            yield Piece(opening + body[start : start + room])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids
