"""What unlabelled traffic shows of an artifact, as documents."""

from __future__ import annotations

from edgedistill.document import Document


class TrafficExample(Document):
    """A prompt of the traffic, personal data replaced, and the beginnings of two answers to it.

    ``kl`` is KL(reference || artifact) in nats a token over the first tokens of the answer.
    """

    prompt: str
    kl: float
    reference_answer: str
    artifact_answer: str
    changed: bool


class TrafficCluster(Document):
    """Prompts of one kind; shares and means are weighted by what each prompt stands for.

    Attributes:
        words: that tell it from the others; ``properties`` that most of its prompts have.
        kl_mean: mean disagreement, in nats a token.
        changed_share: of prompts whose first tokens become others.
        novel_share: of prompts that are unlike every case of the suite.
        measured: whether cases of the suite lie near; None where the suite is too small to tell.
    """

    words: list[str]
    properties: list[str]
    prompts: int
    traffic_share: float
    kl_mean: float
    changed_share: float
    novel_share: float | None
    measured: bool | None
    nearest_case: str | None
    examples: list[TrafficExample]


class TrafficFindings(Document):
    """Where an artifact leaves the reference on unlabelled traffic, and whether a case measures it.

    Attributes:
        requests: in the file; ``skipped`` lines could not be understood.
        distinct: without duplicates; ``prompts`` of them were sampled and read.
        left_out: of the sample, too long for the context or refused by the chat template.
        kl_mean: over the traffic, in nats a token; ``changed_share`` of it with other first tokens.
        clusters: the largest mean disagreement first.
        loudest: single prompts, the largest disagreement first.
    """

    requests: int
    skipped: int
    distinct: int
    prompts: int
    left_out: int
    runtime: str
    kl_mean: float
    kl_max: float
    changed_share: float
    clusters: list[TrafficCluster]
    loudest: list[TrafficExample]
    seconds: float

    @property
    def unmeasured(self) -> list[TrafficCluster]:
        """The clusters that no case of the suite lies near."""
        return [cluster for cluster in self.clusters if cluster.measured is False]
