"""What a model is about to say: the distributions of the first tokens of its answers.

The reference answers greedily for a few tokens; every artifact is led along the same tokens, so
both speak of the same positions.  Of the reference's distribution the most probable tokens are kept
and the mass of all others together.  The divergence on that coarser distribution is a lower bound
of the whole one (the data processing inequality; Cover and Thomas, "Elements of information
theory", section 2.8), near to it because the kept tokens hold nearly all of the mass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgedistill.errors import StageError
from edgedistill.session import Logits, Session
from edgedistill.verify.prompts import common_prefix

POSITIONS = 4  # of an answer: the first token decides most, the next ones show what it became
KEPT_TOKENS = 256

Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]


class Answer(NamedTuple):
    """The reference's first tokens, and what it held probable at each of their positions.

    Attributes:
        tokens: int32 [positions], greedy; the last may be an end token.
        kept: int32 [positions, kept], ids in order of falling probability.
        log_probs: float64 [positions, kept + 1], in nats; the last column is all other tokens.
    """

    tokens: Ids
    kept: Ids
    log_probs: Doubles


class Disagreement(NamedTuple):
    """How far an artifact is from the reference on one prompt.

    Attributes:
        kl: KL(reference || artifact) in nats a token, mean over the positions, a lower bound.
        said: the artifact's own greedy tokens up to the first that is not the reference's, with
            it; the reference's where there is none.
        changed: whether there is one.  Tokens within 0.01 nats of each other are a tie.
    """

    kl: float
    said: list[int]
    changed: bool


TIE_NATS = 0.01

Choose = Callable[[int, int, Logits], int | None]


def answer_prompts(
    session: Session, prompts: Sequence[Sequence[int]], ends: frozenset[int]
) -> Iterator[tuple[int, Answer]]:
    """The index of a prompt and the session's answer to it, for all prompts in some order.

    Args:
        session: of the reference.
        prompts: ids, at least one each; with ``POSITIONS`` more they fit into the context.
        ends: tokens that end an answer.
    """

    def greedy(_: int, __: int, logits: Logits) -> int | None:
        token = int(logits.argmax())
        return None if token in ends else token

    for index, rows in _walk(session, prompts, greedy):
        log_probs = _log_softmax(rows)
        # Sorting is stable, so that equal probabilities keep the order of their ids.
        kept = np.argsort(-log_probs, axis=1, kind="stable")[:, :KEPT_TOKENS].astype(np.int32)
        yield index, Answer(kept[:, 0], kept, _coarse(log_probs, kept))


def disagreements(
    session: Session, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]
) -> Iterator[tuple[int, Disagreement]]:
    """The index of a prompt and how far the session is from its answer, in some order.

    Raises:
        StageError: the session's logits are not finite.
    """

    def forced(prompt: int, position: int, _: Logits) -> int | None:
        tokens = answers[prompt].tokens
        return int(tokens[position]) if position + 1 < len(tokens) else None

    for index, rows in _walk(session, prompts, forced):
        answer = answers[index]
        own = _log_softmax(rows)
        if np.isnan(own).any():
            raise StageError(
                f"the logits after prompt {index} of the traffic are not finite",
                hint="the artifact overflows or is damaged; verify shows where it departs",
            )
        yield index, _compare(answer, own)


def _compare(answer: Answer, own: Doubles) -> Disagreement:
    kl = coarse_kl(answer.log_probs, _coarse(own, answer.kept))
    places = np.arange(len(own))
    behind = own.max(axis=1) - own[places, answer.tokens]
    departs = np.flatnonzero(behind > TIE_NATS)
    said = [int(token) for token in answer.tokens]
    if len(departs):
        first = int(departs[0])
        said = [*said[:first], int(own[first].argmax())]
    return Disagreement(float(kl.mean()), said, len(departs) > 0)


def coarse_kl(reference: Doubles, artifact: Doubles) -> Doubles:
    """KL(reference || artifact) in nats of log-probabilities [n, outcomes]: float64 [n]."""
    probabilities = np.exp(reference)
    # An outcome without mass in the reference adds nothing, whatever the artifact thinks of it.
    gaps = np.zeros_like(reference)
    np.subtract(reference, artifact, out=gaps, where=probabilities > 0)
    found: Doubles = (probabilities * gaps).sum(axis=1)
    return np.maximum(found, 0.0)


def _walk(
    session: Session, prompts: Sequence[Sequence[int]], choose: Choose
) -> Iterator[tuple[int, Logits]]:
    """For each prompt the logits float32 [positions, vocab] along the tokens that are chosen.

    ``choose`` takes the prompt's index, the position in the answer and its logits; None ends.
    """
    session.reset()
    cached: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        ids = list(prompts[index])
        keep = min(common_prefix(cached, ids), len(ids) - 1)
        session.rewind(keep)
        rows = [np.array(session.prefill(ids[keep:]))]
        cached = ids
        while len(rows) < POSITIONS:
            token = choose(index, len(rows) - 1, rows[-1])
            if token is None:
                break
            cached = [*cached, token]
            rows.append(np.array(session.step(token)))
        yield index, np.stack(rows)


def _coarse(log_probs: Doubles, kept: Ids) -> Doubles:
    """Log-probabilities [n, vocab] -> [n, kept + 1]: of the kept tokens, and of all others."""
    named = np.take_along_axis(log_probs, kept.astype(np.int64), axis=1)
    others = np.exp(log_probs)
    np.put_along_axis(others, kept.astype(np.int64), 0.0, axis=1)
    with np.errstate(divide="ignore"):  # a vocabulary without other tokens has none of the mass
        rest = np.log(others.sum(axis=1, keepdims=True))
    return np.concatenate([named, rest], axis=1)


def _log_softmax(logits: Logits) -> Doubles:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits are reported by their prompt
        wide -= wide.max(axis=1, keepdims=True)
        found: Doubles = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found
