"""Which sequences a student in training continues itself, how much of each, and what that costs."""

from __future__ import annotations

import math

from edgedistill.decoder import DecoderFacts
from edgedistill.stage import StageCost

GIVEN_SHARE = 0.5  # of a sequence; the student writes the rest
AT_ONCE = 8  # sequences that are written together, whose keys and values lie in memory
# What a place takes that is written in up to 8 sequences at once, in tokens that go through all
# together: every weight is read for it.  In float32 on one thread of an AMD EPYC, a matrix of
# 49,152 x 576 takes 21 to 24 ms for 2 to 8 rows, and 1.1 ms a row for 256.
PLACE_TOKENS = 20


def is_drawn(number: int, share: float) -> bool:
    """Whether the ``number``-th sequence that is read is continued by the student.

    Of n sequences in a row it is ``share * n``, spread evenly; which text they are depends on the
    order of reading.
    """
    return math.floor((number + 1) * share) > math.floor(number * share)


def given_tokens(tokens: int) -> int:
    """How many tokens of a sequence stay as they are, at least one."""
    return max(1, int(tokens * GIVEN_SHARE))


def writing_cost(
    facts: DecoderFacts,
    share: float,
    *,
    tokens: int,
    batch_tokens: int,
    sequence_tokens: int,
) -> StageCost:
    """What the writing takes: prefixes go through at once, then each place reads every weight.

    Args:
        facts: of the student.
        share: of the sequences that it continues.
        tokens: of the whole training.
        batch_tokens: of a step.
        sequence_tokens: of a sequence.
    """
    batch = max(1, batch_tokens // sequence_tokens)
    steps = max(1, tokens // (batch * sequence_tokens))
    drawn = share * batch  # in a step, on average
    given = given_tokens(sequence_tokens)
    writings = steps * min(1.0, drawn) * math.ceil(drawn / AT_ONCE)
    places = writings * (sequence_tokens - given)
    past = 4 * 2 * facts.layers * facts.kv_heads * facts.head_dim * sequence_tokens
    return StageCost(
        steps * drawn * given + PLACE_TOKENS * places,
        min(math.ceil(drawn), AT_ONCE) * past,
    )
