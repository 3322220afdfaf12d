"""What the sentiment suite is worth without a language model: three baselines.

    python benchmarks/sentiment_baselines.py    # writes benchmarks/results/sentiment_baselines.json

- majority: always the most frequent class of the training split;
- VADER: the rule-based scorer of the paper the data comes from, its compound score cut into five
  classes at points fitted on the training split (note that its lexicon and rules were tuned by
  the same authors on this very kind of text);
- TF-IDF of words and word pairs with logistic regression, its strength chosen by cross-validation.

All three learn from train.jsonl and are scored once on suite.jsonl. A baseline without
probabilities of its own gets the raters' mean distribution over the training cases to which it
gives the same answer, so the log-score is fair to it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from sentiment_data import CHOICES, fetch_sdist, score  # noqa: E402

Rows = Sequence[Sequence[float]]
Baseline = Callable[["Split", "Split"], Rows]


@dataclass(frozen=True)
class Split:
    """One of the two files, as columns."""

    texts: list[str]
    answers: list[int]
    soft_labels: list[list[float]]
    weights: list[float]
    slices: list[list[str]]


def read_split(path: Path) -> Split:
    """Read train.jsonl or suite.jsonl."""
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return Split(
        [case["messages"][0]["content"] for case in cases],
        [case["answer"] for case in cases],
        [case["soft_label"] for case in cases],
        [case.get("weight", 1.0) for case in cases],
        [case.get("slices", []) for case in cases],
    )


def as_distributions(guesses: Sequence[int], train_guesses: Sequence[int], train: Split) -> Rows:
    """Turn answers into distributions: the raters' mean among equally answered training cases.

    The answer keeps the largest share (score takes the argmax), even where raters lean elsewhere.
    """
    rows = {}
    for guess in set(guesses):
        same = [s for s, g in zip(train.soft_labels, train_guesses, strict=True) if g == guess]
        row = np.mean(same, axis=0) if same else np.full(len(CHOICES), 1 / len(CHOICES))
        row[guess] = max(row[guess], row.max() + 1e-6)
        rows[guess] = [float(p) for p in row / row.sum()]
    return [rows[guess] for guess in guesses]


def majority(train: Split, suite: Split) -> Rows:
    """Always the most frequent class."""
    top = Counter(train.answers).most_common(1)[0][0]
    return as_distributions([top] * len(suite.texts), [top] * len(train.texts), train)


def vader_analyzer() -> Any:
    """VADER as installed, or else out of the pinned source package that the data came in."""
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ModuleNotFoundError:
        with tempfile.TemporaryDirectory() as scratch:
            with tarfile.open(fileobj=io.BytesIO(fetch_sdist(None))) as sdist:
                sdist.extractall(scratch, filter="data")
            sys.path.insert(0, str(next(Path(scratch).iterdir())))
            try:
                module = importlib.import_module("vaderSentiment.vaderSentiment")
                return module.SentimentIntensityAnalyzer()  # reads its lexicon from the directory
            finally:
                sys.path.pop(0)
    return module.SentimentIntensityAnalyzer()


def fit_cuts(scores: np.ndarray, train: Split) -> list[float]:
    """Four cut points that maximise macro-F1 on the training split, by coordinate ascent."""
    answers = np.array(train.answers)

    def macro_f1(cuts: Sequence[float]) -> float:
        guesses = np.searchsorted(cuts, scores)
        table = np.zeros((len(CHOICES), len(CHOICES)))
        np.add.at(table, (answers, guesses), 1)
        return float(np.mean(2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1), 1)))

    cuts = [float(q) for q in np.quantile(scores, [0.2, 0.4, 0.6, 0.8])]
    grid = [float(g) for g in np.linspace(-0.995, 0.995, 200)]
    for _ in range(5):
        for i in range(len(cuts)):
            trials = [sorted([*cuts[:i], g, *cuts[i + 1 :]]) for g in [cuts[i], *grid]]
            cuts = max(trials, key=macro_f1)
    return cuts


def vader(train: Split, suite: Split) -> Rows:
    """VADER's compound score, cut where the training split says."""
    analyzer = vader_analyzer()

    def compound(split: Split) -> np.ndarray:
        return np.array([analyzer.polarity_scores(text)["compound"] for text in split.texts])

    train_scores = compound(train)
    cuts = fit_cuts(train_scores, train)
    guesses = [int(g) for g in np.searchsorted(cuts, compound(suite))]
    return as_distributions(guesses, [int(g) for g in np.searchsorted(cuts, train_scores)], train)


def tfidf_regression(train: Split, suite: Split) -> Rows:
    """TF-IDF of words and word pairs, then multinomial logistic regression."""
    # Marks stay tokens of their own: an emoticon or "!!!" says as much as a word.
    marks = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+(?:'\w+)?|[^\w\s]+"
    )
    regression = LogisticRegressionCV(
        Cs=[1.0, 3.0, 10.0],
        l1_ratios=(0.0,),
        cv=3,
        scoring="f1_macro",
        max_iter=300,
        use_legacy_attributes=False,
    )
    model = make_pipeline(marks, regression).fit(train.texts, train.answers)
    return [[float(p) for p in row] for row in model.predict_proba(suite.texts)]


def score_split(split: Split, rows: Rows) -> dict[str, dict[str, float]]:
    """Scores on the whole suite with and without weights, and by slice (weighted)."""

    def part(chosen: Sequence[int], weighted: bool = True) -> dict[str, float]:
        scores = score(
            [split.answers[i] for i in chosen],
            [split.soft_labels[i] for i in chosen],
            [rows[i] for i in chosen],
            [split.weights[i] if weighted else 1.0 for i in chosen],
        )
        return {name: round(value, 4) for name, value in scores.items()}

    everything = range(len(rows))
    names = sorted({name for slices in split.slices for name in slices})
    by_slice = {name: part([i for i in everything if name in split.slices[i]]) for name in names}
    return {"weighted": part(everything), "unweighted": part(everything, False), **by_slice}


def main() -> None:
    """Fit, score, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT / "recipes" / "data" / "sentiment")
    default = ROOT / "benchmarks" / "results" / "sentiment_baselines.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    train = read_split(arguments.data / "train.jsonl")
    suite = read_split(arguments.data / "suite.jsonl")
    baselines: dict[str, Baseline] = {
        "majority": majority,
        "vader": vader,
        "tfidf_logistic_regression": tfidf_regression,
    }
    results: dict[str, object] = {"train_cases": len(train.texts), "suite_cases": len(suite.texts)}
    for name, baseline in baselines.items():
        results[name] = scores = score_split(suite, baseline(train, suite))
        print(f"{name}: {scores['weighted']}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
