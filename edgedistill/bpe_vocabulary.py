"""A BPE tokenizer as data: its tokens, and which other tokens each of them is merged from.

Merging (Sennrich et al., arXiv 1508.07909) joins the pair of least rank until none is left.  A
token comes out of a text only if the merges within its own characters make it: pairs across its
border were passed over.  So what has to stay beside a token are the tokens that appear while its
own characters are merged, and no others.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgedistill.errors import InputError
from edgedistill.student import read_json

TOKENIZER_FILE = "tokenizer.json"
BYTES = 256


class BpeVocabulary:
    """The tokens of a student's ``tokenizer.json``.

    Attributes:
        tokenizer: the file as it is.
        named: token -> id, of the model and of what was added to it.
        added: the ids of the tokens that were added, special ones among them.

    Raises:
        InputError: there is none, or it is of a kind whose tokens cannot be taken away safely.
    """

    def __init__(self, student: Path) -> None:
        where = str(student / TOKENIZER_FILE)
        self.tokenizer = read_json(student / TOKENIZER_FILE)
        _refuse_other_kinds(self.tokenizer, where)
        model = self.tokenizer["model"]
        added = self.tokenizer.get("added_tokens") or []
        self._model: dict[str, int] = {str(k): int(i) for k, i in model["vocab"].items()}
        self.added = frozenset(int(entry["id"]) for entry in added)
        self.named = self._model | {str(e["content"]): int(e["id"]) for e in added}
        self.merges = [_pair(merge, where) for merge in model["merges"]]
        for left, right in self.merges:
            if left + right not in self._model:
                raise InputError(f"merges {left!r} and {right!r} to no token", where=where)
        self._ranks = {pair: rank for rank, pair in reversed([*enumerate(self.merges)])}
        self._needed: dict[int, frozenset[int]] = {}
        self._whole_words = bool(model.get("ignore_merges"))

    @cached_property
    def always(self) -> frozenset[int]:
        """What stays whatever a text uses: added tokens, bytes, the one for what is unknown."""
        from tokenizers import pre_tokenizers

        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if self.tokenizer["model"].get("byte_fallback"):
            alphabet = [f"<0x{byte:02X}>" for byte in range(BYTES)]
        unknown = self.tokenizer["model"].get("unk_token")
        wanted = [*alphabet, *([unknown] if isinstance(unknown, str) else [])]
        return self.added | {self.named[token] for token in wanted if token in self.named}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token."""
        return {i: token for token, i in self.named.items()}

    def needs(self, token: int) -> frozenset[int]:
        """The ids that appear while the characters of a token are merged, its own among them."""
        if token not in self._needed:
            merged = [] if token in self.added else self._merged(self.tokens[token])[0]
            self._needed[token] = frozenset([*merged, token])
        return self._needed[token]

    def is_reachable(self, token: int) -> bool:
        """Whether a text can be cut into this token at all."""
        if token in self.added or self._whole_words:
            return True
        return self._merged(self.tokens[token])[1]

    def _merged(self, text: str) -> tuple[list[int], bool]:
        """The ids of characters and of what they are merged to, and whether it ends in one."""
        parts = list(text)
        seen = [self._model[part] for part in parts if part in self._model]
        while len(parts) > 1:
            ranked = [
                (rank, place)
                for place, pair in enumerate(pairwise(parts))
                if (rank := self._ranks.get(pair)) is not None
            ]
            if not ranked:
                return seen, False
            _, place = min(ranked)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            seen.append(self._model[parts[place]])
        return seen, True

    def kept_merges(self, kept: Iterable[int]) -> list[Any]:
        """The merges, as the file spells them, of which both parts and the result stay."""
        stays = {self.tokens[i] for i in kept}
        written = self.tokenizer["model"]["merges"]
        return [
            merge
            for merge, (left, right) in zip(written, self.merges, strict=True)
            if left in stays and right in stays and left + right in stays
        ]


def _pair(merge: Any, where: str) -> tuple[str, str]:
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise InputError(f"the merge {merge!r} is not of two tokens", where=where)
    return str(parts[0]), str(parts[1])


def _refuse_other_kinds(tokenizer: dict[str, Any], where: str) -> None:
    model = tokenizer.get("model") or {}
    problem = None
    if model.get("type") != "BPE":
        problem = f"is a {model.get('type')} model"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "is BPE with prefixes or suffixes"
    elif not model.get("byte_fallback") and not _is_byte_level(tokenizer.get("pre_tokenizer")):
        problem = "has no tokens for bytes, so a text could lose what the domain lacks"
    if problem:
        raise InputError(
            f"{problem}; the vocabulary of byte-level BPE, or BPE with byte fallback, alone can be "
            "pruned",
            where=where,
            hint="take prune_vocabulary out of the rung",
        )


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(part.get("type") == "ByteLevel" for part in parts)
