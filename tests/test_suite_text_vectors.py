from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from edgedistill.evaluate.text_vectors import (
    COLUMNS,
    distinctive_words,
    nearest,
    novelty_p_values,
    project,
    tfidf_vectors,
    usual_similarities,
    ward_clusters,
)
from tests.sentiment_logs import real_cases

TEXTS = ["the film was good", "the film was bad", "parcel 17 is late!", "", "Good FILM"]


def cosine_by_definition(one: int, other: int) -> float:
    """TF-IDF over the names themselves, in dictionaries."""

    def features(text: str) -> Counter[str]:
        found = Counter[str]()
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            found[" " + word] += 1
            found.update(f"<{word}>"[i : i + 3] for i in range(len(word)))
        return found

    everything = [features(text) for text in TEXTS]
    seen = Counter(name for found in everything for name in found)

    def weighted(found: Counter[str]) -> dict[str, float]:
        return {
            name: (1 + math.log(count)) * (math.log((1 + len(TEXTS)) / (1 + seen[name])) + 1)
            for name, count in found.items()
        }

    a, b = weighted(everything[one]), weighted(everything[other])
    lengths = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(a[name] * b.get(name, 0.0) for name in a) / lengths


def test_a_product_of_vectors_is_the_cosine_of_their_tfidf_weights() -> None:
    vectors = tfidf_vectors(TEXTS)
    assert vectors.shape == (5, COLUMNS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0, 1])
    for one in (0, 1, 2, 4):
        for other in (0, 1, 2, 4):
            expected = cosine_by_definition(one, other)
            assert vectors[one] @ vectors[other] == pytest.approx(expected, abs=1e-5)


def test_a_projection_keeps_the_cosines_it_has_dimensions_for() -> None:
    vectors = tfidf_vectors([case["messages"][0]["content"] for case in real_cases(40)])
    whole = project(vectors, 40)
    assert whole @ whole.T == pytest.approx(vectors @ vectors.T, abs=1e-5)
    few = project(vectors, 5)
    left, values, _ = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
    by_svd = left[:, :5] * values[:5]
    by_svd /= np.linalg.norm(by_svd, axis=1, keepdims=True)
    assert few @ few.T == pytest.approx(by_svd @ by_svd.T, abs=1e-6)


@pytest.mark.parametrize("clusters", [1, 3, 10, 60, 80])
def test_wards_clusters_are_those_of_scipy(clusters: int) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage

    points = np.random.default_rng(5).normal(size=(60, 4)) * [3, 1, 1, 0.5]
    labels = fcluster(linkage(points, "ward"), min(clusters, 60), "maxclust")
    expected = sorted(np.flatnonzero(labels == label).tolist() for label in set(labels))
    assert ward_clusters(points, clusters) == expected


def test_the_nearest_text_is_found_and_never_the_text_itself() -> None:
    vectors = tfidf_vectors(TEXTS)
    expected = {other: cosine_by_definition(0, other) for other in (1, 2, 4)}
    similarity, index = nearest(vectors[:1], vectors[1:])
    assert 1 + int(index[0]) == max(expected, key=lambda other: expected[other])
    assert similarity[0] == pytest.approx(max(expected.values()), abs=1e-5)
    usual = usual_similarities(vectors, np.array([0, 2]))
    assert usual[0] == pytest.approx(max(expected.values()), abs=1e-5)
    assert usual[1] < 0.2


def test_novelty_has_the_level_that_it_claims_and_finds_what_is_new() -> None:
    """Texts of the same source are novel in about 5%; other kinds of text mostly are."""
    texts = [case["messages"][0]["content"] for case in real_cases(900)]
    rng = np.random.default_rng(2)
    order = rng.permutation(len(texts))
    suite, same = [texts[i] for i in order[:600]], [texts[i] for i in order[600:]]
    other = [f"SELECT c{i}, t{i} FROM x_{i} JOIN y ON id = {i * 37} LIMIT 10;" for i in range(50)]
    vectors = tfidf_vectors([*suite, *same, *other])
    usual = usual_similarities(vectors[:600], np.arange(600))
    similarity, _ = nearest(vectors[600:], vectors[:600])
    novel = novelty_p_values(similarity, usual) <= 0.05
    assert novel[: len(same)].mean() <= 0.08
    assert novel[len(same) :].mean() >= 0.9


def test_p_values_of_exchangeable_scores_are_uniform_at_worst() -> None:
    scores = np.random.default_rng(0).normal(size=(400, 100))
    p_values = np.array([novelty_p_values(row[:1], row[1:])[0] for row in scores])
    for level in (0.05, 0.2, 0.5):
        assert (p_values <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 400)


def test_words_that_tell_a_cluster_are_those_that_only_it_has() -> None:
    inside = ["my parcel is late", "the parcel is lost", "where is my parcel"]
    outside = ["the film is late", "the plot is lost", "my view is clear"]
    assert distinctive_words(inside, outside, 2)[0] == "parcel"
    assert "is" not in distinctive_words(inside, outside, 9)
