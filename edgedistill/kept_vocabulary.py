"""A student whose vocabulary is part of another one's: which tokens it kept, and the other so cut.

``vocabulary_map.json`` lies beside the weights and is carried through every later stage; the
checkpoint stays a plain one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.bpe_vocabulary import TOKENIZER_FILE
from edgedistill.content import sha256_file
from edgedistill.document import Document
from edgedistill.errors import InputError
from edgedistill.student import VOCABULARY_MAP_FILE, Student, read_json

Ids = npt.NDArray[np.int64]


class KeptVocabulary(Document):
    """Which tokens of the whole vocabulary a student has.

    Attributes:
        whole_size: rows of the whole vocabulary.
        whole_tokenizer: sha256 of its ``tokenizer.json``.
        kept: of each of the student's ids the whole vocabulary's.
    """

    whole_size: int
    whole_tokenizer: str
    kept: list[int]

    @property
    def ids(self) -> Ids:
        """``kept`` as int64 [rows]."""
        return np.array(self.kept, dtype=np.int64)

    def new_ids(self) -> Ids:
        """int64 [whole_size]: of each id of the whole vocabulary the student's, or -1."""
        new = np.full(self.whole_size, -1, dtype=np.int64)
        new[self.ids] = np.arange(len(self.kept))
        return new

    def write(self, directory: Path) -> None:
        """Write the map into a student directory."""
        text = json.dumps(self.model_dump()) + "\n"
        (directory / VOCABULARY_MAP_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def after(cls, src: Path, kept: Ids) -> KeptVocabulary:
        """The map of a student that keeps some tokens of the one in ``src``.

        Where that is a part of a vocabulary itself, the map tells of the whole one.
        """
        before = read_kept(src)
        if before is None:
            size = Student(src).facts.vocab_size
            sha256 = sha256_file(src / TOKENIZER_FILE)
            return cls(whole_size=size, whole_tokenizer=sha256, kept=kept.tolist())
        return before.model_copy(update={"kept": before.ids[kept].tolist()})


def read_kept(student: Path) -> KeptVocabulary | None:
    """The map of a student directory; None for one with a whole vocabulary."""
    path = student / VOCABULARY_MAP_FILE
    return KeptVocabulary(**read_json(path)) if path.is_file() else None


class NarrowedStudent(Student):
    """A student of which some rows of the embedding and the head are seen alone.

    Args:
        path: its directory.
        kept: int64, the ids that stay, in their new order.
    """

    def __init__(self, path: Path, kept: Ids) -> None:
        super().__init__(path)
        facts = self.facts
        self._kept, self._rows = kept, (facts.embedding, facts.head)
        self.config = {**self.config, "vocab_size": len(kept)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor, with the rows that stay."""
        shape = super().shape(name)
        return (len(self._kept), *shape[1:]) if name in self._rows else shape

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32, with the rows that stay."""
        values = super().read(name)
        return values[self._kept] if name in self._rows else values


def teacher_for(student: Path, teacher: Path) -> Student:
    """A teacher whose token ids mean what the student's mean.

    Of a student with a part of the teacher's vocabulary the teacher is seen with that part, so its
    probabilities are those of the tokens that both have.

    Raises:
        InputError: the same text would be other tokens to the teacher.
    """
    kept, own = read_kept(student), read_kept(teacher)
    if kept is not None and own is None:
        if sha256_file(teacher / TOKENIZER_FILE) == kept.whole_tokenizer:
            return NarrowedStudent(teacher, kept.ids)
    elif sha256_file(student / TOKENIZER_FILE) == sha256_file(teacher / TOKENIZER_FILE):
        return Student(teacher)
    raise InputError(
        "the teacher has another tokenizer than the student, so its logits mean other tokens",
        where=str(teacher),
        hint="distillation by logits needs a teacher of the same family",
    )


def map_token_ids(fields: dict[str, Any], new_id: Callable[[int], int]) -> dict[str, Any]:
    """Fields of a config or generation config, with every token id in them changed."""
    return {k: _mapped(v, new_id) if names_tokens(k) else v for k, v in fields.items()}


def names_tokens(key: str) -> bool:
    """Whether a field of a config holds token ids."""
    return key.endswith(("_token_id", "_token_ids")) or key in OTHER_TOKEN_FIELDS


OTHER_TOKEN_FIELDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


def _mapped(value: Any, new_id: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_mapped(item, new_id) for item in value]
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return new_id(value) if is_id else value
