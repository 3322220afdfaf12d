"""Tiny students with a part of their tokens, and the tokenizers that judge them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgedistill.calibration import Calibration
from edgedistill.stages.prune_vocabulary import PruneVocabulary
from tests.pruned import empty

SIZE = 448
# Needs some thirty of the tiny tokenizer's merges; words of code and digits are not among them.
DOMAIN = "I love this film! It was terrible, though; the quick brown fox jumps.\n"
OTHER = "def add(a: int, b: int) -> int:\n    return a + b naïve café 1234567890\n"


def stage(directory: Path, **fields: Any) -> PruneVocabulary:
    """The stage with a domain's text in ``directory``."""
    directory.mkdir(exist_ok=True)
    file = directory / "domain.txt"
    file.write_text(DOMAIN * 20, encoding="utf-8")
    stated: dict[str, Any] = {"vocab_size": SIZE, "calibration": Calibration(file=file)}
    return PruneVocabulary(**{**stated, **fields})


def pruned(student: Path, directory: Path, **fields: Any) -> Path:
    """A copy of a student with fewer tokens; returns its directory."""
    run = stage(directory, **fields)
    out = empty(directory / "pruned")
    run.run(student, out)
    return out


def library_tokenizer(student: Path) -> Any:
    """The tokenizer as the library behind ``transformers`` opens the file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(student / "tokenizer.json"))


def kept_by_name(whole: Path, part: Path) -> list[int]:
    """Of each id of ``part`` the id in ``whole``, found by the token's spelling."""
    old, new = library_tokenizer(whole), library_tokenizer(part)
    return [int(old.token_to_id(new.id_to_token(i))) for i in range(new.get_vocab_size())]


def edit_tokenizer(student: Path, **changes: Any) -> None:
    """Change fields of ``tokenizer.json``."""
    path = student / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))
