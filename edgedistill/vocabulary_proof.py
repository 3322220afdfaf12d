"""Does a tokenizer with fewer tokens read and write what the whole one does?

Both are run as ``transformers`` opens them, on the texts that the tokens were chosen on and on hard
ones.  A word is what the tokenizer cuts a text into before it merges, and merges on its own: one
whose tokens all stayed has to become just those, one that lost some has to spell the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.calibration import rendered_texts
from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import StageError
from edgedistill.kept_vocabulary import Ids
from edgedistill.progress import track
from edgedistill.student import Student
from edgedistill.verify.strings import HARD_STRINGS, special_strings
from edgedistill.verify.texts import load_texts

BATCH_TEXTS = 256


class TextCount:
    """How a tokenizer cuts texts: characters and tokens so far, and how often each token came."""

    def __init__(self, rows: int) -> None:
        self.characters = 0
        self.counts: Ids = np.zeros(rows, dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return int(self.counts.sum())

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Take in a text."""
        self.characters += len(text)
        np.add.at(self.counts, np.array(ids, dtype=np.int64), 1)


def count_tokens(student: Path, files: Iterable[Path], chat: Chat, rows: int) -> TextCount:
    """How a student's tokenizer cuts the texts of some files, as the model reads them.

    Raises:
        InputError: a file is unreadable or not of its format; there is no tokenizer.
    """
    tokenizer = load_tokenizer(student)
    count = TextCount(rows)
    for file in files:
        texts = rendered_texts(tokenizer, file, chat)
        for batch in _batches(track(texts, label="counting tokens")):
            for text, encoded in zip(batch, encode(tokenizer, batch), strict=True):
                count.add(text, encoded.ids)
    return count


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, BATCH_TEXTS)):
        yield batch


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Encodings by the library behind a tokenizer of ``transformers``; nothing is added."""
    encoded: list[Any] = tokenizer.backend_tokenizer.encode_batch(
        list(texts), add_special_tokens=False
    )
    return encoded


def prove_tokenizer(whole: Path, pruned: Path, kept: Ids, files: Iterable[Path], chat: Chat) -> int:
    """Hold the tokenizer of ``pruned`` against that of ``whole``; returns how many texts were read.

    Args:
        whole: the student before.
        pruned: the student after.
        kept: of each new id the old one.
        files: texts of the domain.
        chat: the fixed part of every conversation.

    Raises:
        StageError: they differ, with the first text and place where they do.
        InputError: one has no tokenizer that can be opened.
    """
    old, new = load_tokenizer(whole), load_tokenizer(pruned)
    names = (old.convert_ids_to_tokens(kept.tolist()), new.convert_ids_to_tokens(range(len(kept))))
    for new_id, (expected, found) in enumerate(zip(*names, strict=True)):
        if expected != found:
            raise StageError(f"the pruned tokenizer calls {new_id} {found!r}, not {expected!r}")
    if len(new) != len(kept):
        raise StageError(f"the pruned tokenizer has {len(new)} tokens, not {len(kept)}")
    stays = frozenset(kept.tolist())
    count = 0
    texts = track(_texts(old, files, chat), label="proving the tokenizer")
    for batch in _batches(texts):
        both = (encode(tokenizer, batch) for tokenizer in (old, new))
        for text, expected, found in zip(batch, *both, strict=True):
            found_ids = kept[np.array(found.ids, dtype=np.int64)].tolist()
            problem = _difference(old, expected, found, found_ids, stays)
            if problem is None and old.decode(expected.ids) != new.decode(found.ids):
                problem = f"it is written as {new.decode(found.ids)!r}"
            if problem is not None:
                raise StageError(
                    f"the pruned tokenizer reads {text[:200]!r} differently: {problem}",
                    hint="this is a fault of edgedistill, or of a tokenizer of an unknown kind",
                )
            count += 1
    return count


def prove_rows(whole: Student, pruned: Student, kept: Ids) -> None:
    """Read back what was written: each token's row of the embedding and of the head.

    Raises:
        StageError: a token has another row than before.
    """
    facts = whole.facts
    for name in dict.fromkeys((facts.embedding, facts.head)):
        before, after = whole.read(name)[kept], pruned.read(name)
        same = before.shape == after.shape and (before == after).all(axis=1)
        if not np.all(same):
            place = int(np.argmin(same)) if before.shape == after.shape else 0
            raise StageError(f"the row of token {place} in {name} is not that of {kept[place]}")


def _texts(tokenizer: Any, files: Iterable[Path], chat: Chat) -> Iterator[str]:
    yield from HARD_STRINGS
    yield from special_strings(tokenizer.all_special_tokens)
    yield from load_texts({}).values()
    for file in files:
        yield from rendered_texts(tokenizer, file, chat)


def _difference(
    old: Any, expected: Any, found: Any, found_ids: list[int], stays: frozenset[int]
) -> str | None:
    """What is wrong with one text's words; None where nothing is."""
    own, other = _words(expected.ids, expected.word_ids), _words(found_ids, found.word_ids)
    if len(own) != len(other):
        return f"it is cut into {len(other)} words, not {len(own)}"
    for before, after in zip(own, other, strict=True):
        if before == after:
            continue
        if stays.issuperset(before):
            return f"{after} instead of {before}, all of which stayed"
        if old.decode(before) != old.decode(after):
            return f"{after} spell {old.decode(after)!r}, not {old.decode(before)!r}"
    return None


def _words(ids: Sequence[int], places: Sequence[int | None]) -> list[list[int]]:
    """The ids of each word; a token of none, such as a special one, stands alone."""
    words: list[list[int]] = []
    last: int | None = None
    for token, place in zip(ids, places, strict=True):
        if place is None or place != last or not words:
            words.append([])
        words[-1].append(token)
        last = place
    return words
