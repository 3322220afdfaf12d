"""Which tokens stay: what cannot be done without, what the domain uses, then the most frequent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgedistill.bpe_vocabulary import BpeVocabulary
from edgedistill.errors import InputError

Ids = npt.NDArray[np.int64]


class Choice(NamedTuple):
    """The tokens that stay.

    Attributes:
        kept: int64, ascending: the new id of a token is its place here.
        used: how many different tokens the text uses, as often as asked.
        merged_from: how many more those are merged from.
        split: how many tokens that the text uses, more rarely, go.
    """

    kept: Ids
    used: int
    merged_from: int
    split: int


def choose_tokens(
    vocabulary: BpeVocabulary,
    counts: Ids,
    size: int,
    *,
    stated: Iterable[int] = (),
    least_count: int = 1,
) -> Choice:
    """Choose ``size`` tokens.

    What is free beyond the text's own tokens goes to those that it uses more rarely, by how often,
    then to the most frequent of the text that the tokenizer was made on: those of least rank.

    Args:
        vocabulary: of the student.
        counts: int64 [rows]: how often the domain's text uses each token.
        size: how many stay.
        stated: ids that the student's configs name.
        least_count: a token that the text uses more rarely has no right to stay.

    Raises:
        InputError: the text uses more tokens than that, or the tokenizer has fewer.
    """
    always = {i for i in (*vocabulary.always, *stated) if i in vocabulary.tokens}
    used = set(np.flatnonzero(counts >= least_count).tolist())
    kept = _closed(vocabulary, always | used)
    if len(kept) > size:
        raise _too_small(vocabulary, counts, size, always, len(kept))
    merged_from = len(kept) - len(always | used)
    free = [i for i in vocabulary.tokens if i not in kept]
    free.sort(key=lambda i: (not vocabulary.is_reachable(i), -int(counts[i]), i))
    for token in free:
        needed = vocabulary.needs(token) - kept
        if len(kept) + len(needed) <= size:
            kept |= needed
        if len(kept) == size:
            break
    if len(kept) < size:
        raise InputError(
            f"vocab_size: {size} is more than the {len(kept)} tokens of the student's tokenizer",
            hint=f"at most {len(kept)}",
        )
    chosen = np.array(sorted(kept), dtype=np.int64)
    split = int((counts > 0).sum() - (counts[chosen] > 0).sum())
    return Choice(chosen, len(used), merged_from, split)


def _closed(vocabulary: BpeVocabulary, wanted: Iterable[int]) -> set[int]:
    kept: set[int] = set()
    for token in wanted:
        if token not in kept:
            kept |= vocabulary.needs(token)
    return kept


def _too_small(
    vocabulary: BpeVocabulary, counts: Ids, size: int, always: set[int], needed: int
) -> InputError:
    """Says which size, or which least count, would do."""
    most = int(counts.max(initial=0))
    low, high = 1, most + 1  # the first is too little, the last leaves nothing of the text
    while high - low > 1:
        middle = (low + high) // 2
        used = set(np.flatnonzero(counts >= middle).tolist())
        fits = len(_closed(vocabulary, always | used)) <= size
        low, high = (low, middle) if fits else (middle, high)
    return InputError(
        f"vocab_size: {size} is too small: the text, bytes, special tokens and what they are "
        f"merged from take {needed}",
        hint=f"state at least {needed}, or `least_count: {high}`, which lets rarer tokens of the "
        "text be written in pieces"
        if high <= most
        else f"state at least {needed}; bytes and special tokens alone take {len(always)}",
    )
