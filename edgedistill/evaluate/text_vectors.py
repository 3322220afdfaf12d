"""Texts as vectors, groups of near ones, and texts that are unlike all others; numpy alone.

Vectors are TF-IDF over words and over runs of three characters within words, hashed to 4,096
columns (Weinberger et al., "Feature hashing for large scale multitask learning", 2009) and of
length one, so that a product is a cosine.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgedistill.evaluate.duplicates import normalize

COLUMNS = 4096
RUN_CHARACTERS = 3
TEXT_CHARACTERS = 2000  # what comes after says little of the kind of a request
LEAST_RATIO = 1e-12

Vectors = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_WORD = re.compile(r"[^\W_]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and marks, in lower case, of the beginning of a text."""
    return _WORD.findall(normalize(text[:TEXT_CHARACTERS]))


def tfidf_vectors(texts: Sequence[str]) -> Vectors:
    """float32 [texts, COLUMNS], each row of length one (or zero, for a text without words).

    A column's weight is 1 + ln(count) times ln((1 + texts) / (1 + texts with it)) + 1.
    """
    counts = np.zeros((len(texts), COLUMNS), dtype=np.float32)
    for row, text in enumerate(texts):
        for column, count in Counter(_columns(text)).items():
            counts[row, column] = 1 + np.log(count)
    seen = (counts > 0).sum(axis=0)
    counts *= (np.log((1 + len(texts)) / (1 + seen)) + 1).astype(np.float32)
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    vectors: Vectors = (counts / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)
    return vectors


def _columns(text: str) -> list[int]:
    names = []
    for word in words_of(text):
        framed = f"<{word}>"
        names.append(f" {word}")
        names += [framed[i : i + RUN_CHARACTERS] for i in range(len(framed) - RUN_CHARACTERS + 1)]
    return [zlib.crc32(name.encode("utf-8")) % COLUMNS for name in names]


def project(vectors: Vectors, dimensions: int) -> Doubles:
    """Latent coordinates, float64 [texts, <= dimensions], rows of length one.

    The leading left singular vectors times their values (Deerwester et al., "Indexing by latent
    semantic analysis", 1990), from the Gram matrix, so that it costs texts^3.
    """
    wide = vectors.astype(np.float64)
    values, axes = np.linalg.eigh(wide @ wide.T)
    kept = np.argsort(-values, kind="stable")[:dimensions]
    kept = kept[values[kept] > LEAST_RATIO * values.max(initial=0.0)]
    found = axes[:, kept] * np.sqrt(values[kept])
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    coordinates: Doubles = found / np.where(lengths > 0, lengths, 1)
    return coordinates


def ward_clusters(points: Doubles, clusters: int) -> list[list[int]]:
    """Clusters of rows by Ward's method, each sorted, in order of their first member.

    Agglomerative, the pair whose union adds least to the sum of squares first (Ward 1963; distances
    are updated by the formula of Lance and Williams 1967).  Nothing in it is random.

    Args:
        points: float64 [n, dimensions].
        clusters: at most so many; n if there are fewer points.
    """
    members = {i: [i] for i in range(len(points))}
    squares = (points**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    sizes = np.ones(len(points))
    while len(members) > clusters:
        one, other = divmod(int(distances.argmin()), len(points))
        one, other = min(one, other), max(one, other)
        joined = _joined_distances(distances, sizes, one, other)
        distances[one], distances[:, one] = joined, joined
        distances[other], distances[:, other] = np.inf, np.inf
        distances[one, one] = np.inf
        sizes[one] += sizes[other]
        members[one] += members.pop(other)
    return sorted(sorted(found) for found in members.values())


def _joined_distances(distances: Doubles, sizes: Doubles, one: int, other: int) -> Doubles:
    """Squared Ward distances of all clusters to the union of two: float64 [n]."""
    apart = distances[one, other]
    total = sizes + sizes[one] + sizes[other]
    joined: Doubles = (
        (sizes + sizes[one]) * distances[one]
        + (sizes + sizes[other]) * distances[other]
        - sizes * apart
    ) / total
    return joined


def nearest(vectors: Vectors, others: Vectors) -> tuple[Doubles, npt.NDArray[np.intp]]:
    """Cosine to the nearest of ``others``, float64 [n], and which that is."""
    cosines = vectors @ others.T
    index = cosines.argmax(axis=1)
    return cosines[np.arange(len(vectors)), index].astype(np.float64), index


def novelty_p_values(similarity: Doubles, usual: Doubles) -> Doubles:
    """How usual it is to be so unlike everything: conformal p-values, float64 [n].

    The share of ``usual`` similarities that are no larger.  If a text were drawn like the ones
    behind ``usual``, its p-value would be below any level with at most about that probability
    (Vovk, Gammerman, Shafer, "Algorithmic learning in a random world", 2005).

    Args:
        similarity: of each text to its nearest neighbour.
        usual: of each calibration text to its nearest neighbour other than itself.
    """
    ordered = np.sort(usual)
    smaller = np.searchsorted(ordered, similarity, side="right")
    p_values: Doubles = (1 + smaller) / (1 + len(ordered))
    return p_values


def usual_similarities(vectors: Vectors, calibration: npt.NDArray[np.intp]) -> Doubles:
    """Cosine of some rows to the nearest other row: float64 [calibration]."""
    cosines = vectors[calibration] @ vectors.T
    cosines[np.arange(len(calibration)), calibration] = -1
    usual: Doubles = cosines.max(axis=1).astype(np.float64)
    return usual


def distinctive_words(inside: Sequence[str], outside: Sequence[str], count: int) -> list[str]:
    """Words that more of the texts inside have than of those outside, the most telling first."""
    own = Counter(word for text in inside for word in set(words_of(text)) if word.isalnum())
    other = Counter(word for text in outside for word in set(words_of(text)))
    gain = {
        word: times / len(inside) - other[word] / max(1, len(outside))
        for word, times in own.items()
        if times > 1 or len(inside) == 1
    }
    ranked = sorted(gain, key=lambda word: (-gain[word], word))
    return [word for word in ranked[:count] if gain[word] > 0]
