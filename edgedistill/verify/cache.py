"""Does the cache hold what was read?  A prompt at once, in parts, rewound, and turn after turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgedistill.progress import track
from edgedistill.results import Check
from edgedistill.session import Agreement, Logits, Session
from edgedistill.verify.divergence import kl_divergence, log_softmax
from edgedistill.verify.judge import JudgedStretches, JudgedText

PROMPT_LENGTHS = (1, 2, 63, 64, 65)
CACHED_STEPS = 32
# A handful of positions scatter more than the mean over a thousand.
FEW_POSITIONS_SLACK = 10.0


def check_cache(
    session: Session, judged: JudgedText, turns: JudgedStretches | None, agreement: Agreement
) -> list[Check]:
    """Hold what a session computes through its cache against the judge, which read all at once.

    Args:
        session: of the artifact; what it held is forgotten.
        judged: a text of at least a few tokens.
        turns: a conversation of two turns: the judge's rows of the first answer, and of the second
            turn; None where the judge has none.
        agreement: of the runtime.
    """
    limit = agreement.kl_mean * FEW_POSITIONS_SLACK
    checks = _check_parts(session, judged, limit)
    if turns is not None and len(turns.ids) <= session.context_tokens:
        checks += _check_turns(session, turns, limit, agreement.kl_mean)
    return checks


def _check_parts(session: Session, judged: JudgedText, limit: float) -> list[Check]:
    """Prompts of odd lengths, then token by token, then from a rewound cache."""
    ids = judged.ids[: session.context_tokens]

    def distance(position: int, logits: Logits) -> float:
        return float(kl_divergence(judged.log_probs[position], log_softmax(logits)))

    lengths = [n for n in PROMPT_LENGTHS if n <= len(ids)]
    prompts = []
    for length in track(lengths, label="verifying the cache"):
        session.reset()
        prompts.append(distance(length - 1, session.prefill(ids[:length])))
    last = min(lengths[-1] + CACHED_STEPS, len(ids))
    steps = [distance(p, session.step(ids[p])) for p in range(lengths[-1], last)]
    session.rewind(last // 2)
    rewound = [distance(last - 1, session.prefill(ids[last // 2 : last]))]
    return [
        _few("cache: prompt lengths", prompts, limit, f"prompts of {lengths} tokens"),
        _few("cache: token by token", steps, limit, f"tokens {lengths[-1]} to {last - 1}"),
        _few("cache: rewind", rewound, limit, f"back to {last // 2}, then on to {last}"),
    ]


def _check_turns(
    session: Session, turns: JudgedStretches, limit: float, same_limit: float
) -> list[Check]:
    """A second turn on the cache of the first, against the judge and against the whole anew."""
    answer, second = turns.stretches
    session.reset()
    session.prefill(turns.ids[: answer.start])
    for token in turns.ids[answer.start : answer.stop]:
        session.step(token)
    continued = _log_probs(session, turns.ids[second.start :])
    session.reset()
    anew = _log_probs(session, turns.ids)[second.start :]
    judged = kl_divergence(turns.of(1), continued).tolist()
    same = kl_divergence(anew.astype(np.float32), continued).tolist()
    detail = f"tokens {second.start} to {second.stop - 1} after {len(answer)} decoded ones"
    return [
        _few("cache: second turn", judged, limit, detail),
        _few("cache: second turn as from nothing", same, same_limit, detail),
    ]


def _log_probs(session: Session, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """float64 [tokens, vocab]."""
    return np.concatenate([log_softmax(logits) for logits in session.stream_logits(ids)])


def _few(name: str, distances: Sequence[float], limit: float, detail: str) -> Check:
    mean = float(np.mean(distances)) if len(distances) else 0.0
    return Check(name=name, passed=mean <= limit, value=mean, limit=limit, detail=f"KL, {detail}")
