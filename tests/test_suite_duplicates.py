from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest

from edgedistill.evaluate import duplicates
from edgedistill.evaluate.duplicates import group_duplicates
from tests.sentiment_logs import real_cases


@cache
def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = text.casefold().split()
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def jaccard(one: str, other: str) -> float:
    """The definition, on tuples of words."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def leaders_by_brute_force(texts: Sequence[str]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, text in enumerate(texts):
        near = (g for g in groups if jaccard(texts[g[0]], text) >= duplicates.SIMILARITY)
        group = next(near, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def edited(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(rng.randrange(3)):
        words[rng.randrange(len(words))] = rng.choice(["really", "not", "perhaps"])
    return " ".join(words).upper() if rng.random() < 0.2 else " ".join(words)


def test_groups_are_those_of_a_comparison_of_all_with_all() -> None:
    rng = random.Random(3)
    texts = [case["messages"][0]["content"] for case in real_cases(250)]
    texts += [edited(rng.choice(texts), rng) for _ in range(250)]
    rng.shuffle(texts)
    groups = group_duplicates(texts)
    assert groups == leaders_by_brute_force(texts)
    assert sorted(i for group in groups for i in group) == list(range(500))
    assert 5 < sum(len(group) - 1 for group in groups) < 250  # or this test shows nothing


def test_case_blanks_and_width_make_no_difference_and_one_word_does() -> None:
    texts = ["Cancel my ORDER", "cancel  my\norder", "ｃancel my order", "cancel my orders"]
    assert group_duplicates(texts) == [[0, 1, 2], [3]]


def test_similarity_does_not_drift_along_a_chain() -> None:
    words = [f"word{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 40]) for i in range(0, 20, 2)]
    groups = group_duplicates(chain)
    assert len(groups) > 1
    for group in groups:
        assert all(jaccard(chain[group[0]], chain[i]) >= duplicates.SIMILARITY for i in group)


def test_a_boilerplate_that_all_texts_share_does_not_make_the_work_grow_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: Counter[str] = Counter()
    real = duplicates._jaccard

    def counted(one: frozenset[bytes], other: frozenset[bytes]) -> float:
        calls["jaccard"] += 1
        return real(one, other)

    monkeypatch.setattr(duplicates, "_jaccard", counted)
    boilerplate = " ".join(f"term{i}" for i in range(30))
    texts = [f"{boilerplate} " + " ".join(f"x{i}y{j}" for j in range(6)) for i in range(400)]
    assert len(group_duplicates(texts)) == 400
    unbounded = 50 * 400
    assert calls["jaccard"] > unbounded  # each with dozens of others
    calls.clear()
    monkeypatch.setattr(duplicates, "BUCKET_LEADERS", 2)
    assert len(group_duplicates(texts)) == 400
    assert calls["jaccard"] <= duplicates.BANDS * 2 * 400
    assert calls["jaccard"] < unbounded
