"""BPE with byte fallback, as SentencePiece trains it: a token's score in GGUF is its merges' rank.

llama.cpp's ``llama`` vocabulary joins the two neighbours that make the token of highest score,
however that token is cut in two; a ``tokenizer.json`` lists pairs by rank.  They cut alike where
every pair that makes a token is listed, and those of one token behind each other, as a conversion
from SentencePiece writes them.  Source: llama.cpp's src/llama-vocab.cpp,
``llm_tokenizer_spm_session``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from edgedistill.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"  # U+2581, in the place of a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Of a token, beyond any that was trained; ways to cut it are tried one by one.
MOST_CHARACTERS = 4096
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}

Pair = tuple[str, str]


def has_byte_fallback(tokenizer: dict[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` is BPE whose unknown characters become bytes."""
    model = tokenizer.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def score_tokens(
    tokenizer: dict[str, Any], tokens: Sequence[str], merges: Sequence[Pair], where: str
) -> list[float]:
    """Of each token minus the rank of its merges; tokens that nothing makes come last.

    Args:
        tokenizer: a parsed ``tokenizer.json`` with byte fallback.
        tokens: of the vocabulary, by id, added ones among them.
        merges: its pairs, most important first.
        where: its path, for errors.

    Raises:
        InputError: llama.cpp would cut some text in another way.
    """
    _refuse_other_text(tokenizer, where)
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    refuse_pieces(vocab, where)
    added = {str(entry["content"]) for entry in tokenizer.get("added_tokens") or []}
    parts = {token: i for token, i in vocab.items() if token not in added}
    ranks: dict[str, int] = {}
    for made, pairs in groupby(merges, key="".join):
        if made in added:  # found in the text before anything is merged
            continue
        if made in ranks:
            raise InputError(
                f"merges to {made!r} at two ranks, a score of llama.cpp's has one",
                where=where,
                hint="only tokenizers that were converted from SentencePiece can be carried",
            )
        ranks[made] = len(ranks)
        missing = set(_cuts(made, parts)) - set(pairs)
        if missing:
            raise InputError(
                f"never merges {' and '.join(map(repr, min(missing)))}, which llama.cpp would",
                where=where,
                hint="only tokenizers that were converted from SentencePiece can be carried",
            )
    _refuse_unmade(parts, ranks, where)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def merge_pairs(tokens: Sequence[str], scores: Sequence[float], made: Sequence[bool]) -> list[Pair]:
    """All pairs that make a token, by its score, highest first.

    Args:
        tokens: by id.
        scores: of each.
        made: of each whether it is made by merging; special tokens are found before.
    """
    parts = {token: i for i, token in enumerate(tokens) if made[i]}
    ranked = sorted(parts, key=lambda token: -scores[parts[token]])
    return [pair for token in ranked for pair in _cuts(token, parts)]


def sentencepiece_tokenizer(
    tokens: Sequence[str], merges: Sequence[Pair], unknown: str | None
) -> Tokenizer:
    """A tokenizer of these tokens, without special ones, in the library ``tokenizers``."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def refuse_pieces(tokens: Iterable[str], where: str) -> None:
    """Refuse a vocabulary of which some text could not be cut, or not in any time.

    Args:
        tokens: all of them.
        where: the path of their file.

    Raises:
        InputError: a byte has no token, or a token is beyond any length.
    """
    missing = len(_BYTES.difference(tokens))
    if missing:
        raise InputError(f"lacks {missing} of the 256 tokens of bytes", where=where)
    longest = max(map(len, tokens))
    if longest > MOST_CHARACTERS:
        raise InputError(f"has a token of {longest} characters", where=where)


def _cuts(token: str, parts: dict[str, int]) -> Iterator[Pair]:
    """The ways to make a token of two others."""
    for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in parts and right in parts:
            yield left, right


def _refuse_other_text(tokenizer: dict[str, Any], where: str) -> None:
    normalizer, before = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer")
    if normalizer.get("type") == "Sequence" and len(normalizer.get("normalizers", [])) == 1:
        normalizer = normalizer["normalizers"][0]
    problem = None
    if normalizer != _NORMALIZER:
        problem = f"the normalizer {normalizer.get('type')} before its byte fallback"
    # Once spaces are replaced, a split at spaces splits nothing.
    elif before is not None and before.get("pattern") != {"String": " "}:
        problem = f"the pre-tokenizer {before.get('type')} before its byte fallback"
    elif tokenizer["model"].get("ignore_merges"):
        problem = "ignore_merges beside its byte fallback"
    if problem:
        raise InputError(
            f"has {problem}, which llama.cpp has not",
            where=where,
            hint="of BPE with byte fallback that which replaces spaces alone (Gemma's) is carried",
        )


def _refuse_unmade(parts: dict[str, int], ranks: dict[str, int], where: str) -> None:
    """Tokens that no listed pair makes, although two tokens would."""
    for token in parts:
        if token not in ranks and next(_cuts(token, parts), None) is not None:
            raise InputError(f"never merges to {token!r}, which llama.cpp would", where=where)
