"""What a pruning stage found and did, as a document: ``pruning.json`` beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from edgedistill.document import Document

ChosenBy = Literal["search", "block influence", "angular distance"]

PRUNING_FILE = "pruning.json"
# A second domain that loses so many times as much as the first was not what the choice was made on.
SECOND_DOMAIN_RATIO = 1.5
# A second domain whose texts become longer by so much more was not what tokens were chosen on.
SECOND_DOMAIN_GROWTH = 1.05


class TriedBlock(Document):
    """One candidate of a search over blocks.

    Attributes:
        dropped: the blocks that were left out already.
        block: that was left out beside them, by its number in the whole student.
        influence: its block influence where it was tried.
        kl: mean KL to the whole student on the text of the search, in nats.
    """

    dropped: list[int]
    block: int
    influence: float
    kl: float


class DroppedSet(Document):
    """Blocks that one way to choose would drop; mean KL in nats on the text of the search."""

    chosen_by: ChosenBy
    blocks: list[int]
    kl: float


class DomainLoss(Document):
    """Mean KL to the unpruned student, in nats a token, on the held-out text of a domain."""

    domain: Literal["calibration", "second"]
    tokens: int
    kl: float


class KeptImportance(Document):
    """Share of the summed importance of a kind of channel that stays, over the layers."""

    what: str
    mean: float
    least: float


class DomainFertility(Document):
    """What a domain's texts take, with the whole vocabulary and with the part that was kept.

    Attributes:
        tokens_before: of all its texts.
        per_character_before: tokens, and likewise after (the fertility).
    """

    domain: Literal["calibration", "second"]
    characters: int
    tokens_before: int
    tokens_after: int
    per_character_before: float
    per_character_after: float


class PrunedVocabulary(Document):
    """What a pruned vocabulary holds.

    Attributes:
        used: different tokens that the texts use as often as asked; all of them were kept.
        merged_from: tokens that were kept because those are merged from them.
        others: kept beyond both: special tokens, bytes, and what the stated size left room for.
        split: tokens that the texts use more rarely and that are written in pieces now.
        fertility: of the calibration domain, and of the second one if there is one.
        proven_on: texts on which the new tokenizer was held against the whole one.
    """

    used: int
    merged_from: int
    others: int
    split: int
    fertility: list[DomainFertility]
    proven_on: int


class Pruning(Document):
    """What was pruned and what it cost, before any healing.

    Attributes:
        before: sizes of the student that arrived, by the names of its config.
        after: those of the one that was written.
        losses: on the calibration domain, and on the second one if there is one; none of a pruned
            vocabulary, whose predictions are of other tokens.
        second_loses_more: a warning: the second domain loses over 1.5 times as much as the first,
            or its texts became longer by over 5% more.
        dropped_layers: by their numbers in the student that arrived.
        sets: of a depth pruning, what each way to choose would have dropped.
        tried: every candidate of its search.
        kept: of a width pruning, the importance that is left.
        vocabulary: of a vocabulary pruning, what it holds.
    """

    stage: Literal["prune_depth", "prune_width", "prune_vocabulary"]
    parameters_before: int
    parameters_after: int
    before: dict[str, int]
    after: dict[str, int]
    losses: list[DomainLoss]
    second_loses_more: bool
    dropped_layers: list[int] = Field(default=[])
    sets: list[DroppedSet] = Field(default=[])
    tried: list[TriedBlock] = Field(default=[])
    kept: list[KeptImportance] = Field(default=[])
    vocabulary: PrunedVocabulary | None = None

    def write(self, directory: Path) -> None:
        """Write the document into a student directory."""
        text = self.model_dump_json(indent=2) + "\n"
        (directory / PRUNING_FILE).write_text(text, encoding="utf-8")


def second_loses_more(losses: list[DomainLoss]) -> bool:
    """Whether there is a second domain, and it loses over 1.5 times as much as the first."""
    first, *others = losses
    return any(other.kl > SECOND_DOMAIN_RATIO * first.kl for other in others)


def second_grows_more(fertility: list[DomainFertility]) -> bool:
    """Whether there is a second domain, and its texts became longer by over 5% more."""
    growth = [f.tokens_after / f.tokens_before for f in fertility]
    return any(other > SECOND_DOMAIN_GROWTH * growth[0] for other in growth[1:])
