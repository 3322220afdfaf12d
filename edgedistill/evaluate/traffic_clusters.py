"""Kinds of traffic: clusters of prompts, how far the models are apart, whether a case is near."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.evaluate.suite import Case, TextCase, sample_cases
from edgedistill.evaluate.text_vectors import (
    Doubles,
    distinctive_words,
    nearest,
    novelty_p_values,
    project,
    tfidf_vectors,
    usual_similarities,
    ward_clusters,
)
from edgedistill.traffic_results import TrafficCluster, TrafficExample

PROMPTS_PER_CLUSTER = 12
MOST_CLUSTERS = 24
LEAST_PROMPTS = 3  # fewer are single prompts, which the list of the loudest shows
DIMENSIONS = 32
NOVEL_LEVEL = 0.05
UNMEASURED_SHARE = 0.5
# A conformal p-value of 5% needs 19 cases to exist.
LEAST_CASES = 19
MOST_CASES = 5000  # of the suite, which are compared with
CALIBRATION_CASES = 1000
SHOWN_EXAMPLES = 3
SHOWN_LOUDEST = 10
SHOWN_WORDS = 6
SHOWN_CHARACTERS = 300
TYPICAL_SHARE, TYPICAL_RATIO = 0.5, 1.5


@dataclass(frozen=True)
class TrafficPrompt:
    """One prompt of the sample; its texts are redacted.

    Attributes:
        text: of the whole conversation; ``question`` of the last message.
        weight: how many requests of the traffic it stands for.
        kl: KL(reference || artifact) in nats a token.
        changed: whether the artifact's first tokens are others than the reference's.
    """

    text: str
    question: str
    weight: float
    properties: tuple[str, ...]
    kl: float
    changed: bool
    reference_answer: str
    artifact_answer: str


@dataclass(frozen=True)
class _Nearness:
    """For each prompt, which case of the suite is nearest and whether even that one is far."""

    case: list[str]
    novel: npt.NDArray[np.bool_]


def find_clusters(prompts: Sequence[TrafficPrompt], cases: Sequence[Case]) -> list[TrafficCluster]:
    """Clusters of at least three prompts, the one with the largest mean disagreement first.

    A cluster counts as unmeasured when at least half of its traffic is novel: less like its nearest
    case than 95% of the suite's cases are like theirs.

    Args:
        prompts: at least one.
        cases: of the suite; with fewer than 19 of them ``measured`` is None (False with none).
    """
    vectors = tfidf_vectors([prompt.text for prompt in prompts])
    count = max(1, min(MOST_CLUSTERS, len(prompts) // PROMPTS_PER_CLUSTER))
    groups = ward_clusters(project(vectors, DIMENSIONS), count)
    nearness = _nearness(prompts, cases) if len(cases) >= LEAST_CASES else None
    clusters = [
        _cluster(prompts, group, nearness, anything=bool(cases))
        for group in groups
        if len(group) >= LEAST_PROMPTS
    ]
    return sorted(clusters, key=lambda cluster: -cluster.kl_mean)


def loudest(prompts: Sequence[TrafficPrompt]) -> list[TrafficExample]:
    """The prompts with the largest disagreement."""
    return _examples(prompts, SHOWN_LOUDEST)


def _nearness(prompts: Sequence[TrafficPrompt], cases: Sequence[Case]) -> _Nearness:
    kept = sample_cases(cases, MOST_CASES)
    # One vocabulary for both, or their vectors could not be compared.
    texts = [*(_case_text(case) for case in kept), *(prompt.text for prompt in prompts)]
    vectors = tfidf_vectors(texts)
    of_cases, of_prompts = vectors[: len(kept)], vectors[len(kept) :]
    step = max(1, -(-len(kept) // CALIBRATION_CASES))
    usual: Doubles = usual_similarities(of_cases, np.arange(0, len(kept), step))
    similarity, index = nearest(of_prompts, of_cases)
    novel = novelty_p_values(similarity, usual) <= NOVEL_LEVEL
    return _Nearness([kept[i].id for i in index], novel)


def _case_text(case: Case) -> str:
    said = [message.content for message in case.messages if message.role != "system"]
    return "\n".join([*said, case.text] if isinstance(case, TextCase) else said)


def _cluster(
    prompts: Sequence[TrafficPrompt],
    group: Sequence[int],
    nearness: _Nearness | None,
    *,
    anything: bool,
) -> TrafficCluster:
    inside = [prompts[i] for i in group]
    chosen = set(group)
    outside = [prompt for i, prompt in enumerate(prompts) if i not in chosen]
    weights = np.array([prompt.weight for prompt in inside])
    novel_share = nearest_case = None
    measured = None if anything else False
    if nearness is not None:
        novel_share = float(np.average(nearness.novel[list(group)], weights=weights))
        measured = novel_share < UNMEASURED_SHARE
        nearest_case = Counter(nearness.case[i] for i in group).most_common(1)[0][0]
    return TrafficCluster(
        words=distinctive_words([p.text for p in inside], [p.text for p in outside], SHOWN_WORDS),
        properties=_typical(inside, prompts),
        prompts=len(inside),
        traffic_share=float(weights.sum() / sum(prompt.weight for prompt in prompts)),
        kl_mean=float(np.average([prompt.kl for prompt in inside], weights=weights)),
        changed_share=float(np.average([prompt.changed for prompt in inside], weights=weights)),
        novel_share=novel_share,
        measured=measured,
        nearest_case=nearest_case,
        examples=_examples(inside, SHOWN_EXAMPLES),
    )


def _typical(inside: Sequence[TrafficPrompt], everything: Sequence[TrafficPrompt]) -> list[str]:
    """Properties of at least half of the prompts, and of clearly fewer elsewhere."""
    own = Counter(name for prompt in inside for name in prompt.properties)
    overall = Counter(name for prompt in everything for name in prompt.properties)
    return sorted(
        name
        for name, count in own.items()
        if count >= TYPICAL_SHARE * len(inside)
        and count / len(inside) >= TYPICAL_RATIO * overall[name] / len(everything)
    )


def _examples(prompts: Sequence[TrafficPrompt], count: int) -> list[TrafficExample]:
    ranked = sorted(range(len(prompts)), key=lambda i: (-prompts[i].kl, i))
    return [
        TrafficExample(
            prompt=_cut(prompts[i].question),
            kl=prompts[i].kl,
            reference_answer=prompts[i].reference_answer,
            artifact_answer=prompts[i].artifact_answer,
            changed=prompts[i].changed,
        )
        for i in ranked[:count]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
