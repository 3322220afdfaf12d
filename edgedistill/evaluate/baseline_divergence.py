"""How far an artifact is from a stored baseline: a lower bound of the KL, without the reference.

The vocabulary is cut into the stored tokens, one by one, and one bucket with all others.  The KL
over these parts is exact for the coarser distributions and, by the log-sum inequality (Cover and
Thomas, Elements of Information Theory, theorem 2.7.1), never above the KL over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.choice_results import BaselineDivergence
from edgedistill.errors import InputError
from edgedistill.evaluate.baseline import PREFIX, SUFFIX, BaselineCase, read_baseline
from edgedistill.evaluate.prompts import Prompt, common_prefix
from edgedistill.evaluate.score import LogProbs, group_by_beginning, log_softmax
from edgedistill.progress import progress_bar
from edgedistill.session import Session

TIE_NATS = 0.01  # tokens this near to the most probable one are as good


def compare_baseline(session: Session, baseline: Path) -> BaselineDivergence:
    """Run an artifact over a baseline's prompts and measure how far it is from the reference.

    Args:
        session: of the artifact; it is reset.
        baseline: the file.

    Raises:
        InputError: the file is damaged, or belongs to another student.
        UsageError: a prompt does not fit into the artifact's context.
    """
    cases = read_baseline(baseline)
    _check_vocabulary(cases, session.vocab_size, baseline)
    found: dict[str, tuple[LogProbs, npt.NDArray[np.bool_]]] = {}
    with progress_bar(len(cases), "comparing with the baseline") as bar:
        for case, log_probs in answer_log_probs(session, cases):
            found[case.id] = coarse_divergence(case, log_probs), _same_top(case, log_probs)
            bar.advance()
    kl = np.concatenate([found[case.id][0] for case in cases])
    owners = [case.id for case in cases for _ in case.tail]
    return BaselineDivergence(
        baseline=baseline.name.removeprefix(PREFIX).removesuffix(SUFFIX),
        cases=len(cases),
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99, method="higher")),
        kl_max=float(kl.max()),
        worst_case=owners[int(kl.argmax())],
        tail_mean=float(np.concatenate([case.tail for case in cases]).mean()),
        top1=float(np.concatenate([found[case.id][1] for case in cases]).mean()),
    )


def coarse_divergence(case: BaselineCase, log_probs: LogProbs) -> LogProbs:
    """KL(reference || artifact) in nats over the stored tokens and one bucket for the others.

    Args:
        case: the reference's; its tokens are in the artifact's vocabulary.
        log_probs: float64 [positions, vocab], the artifact's, normalized.

    Returns:
        float64 [positions]; infinite where the artifact gives NaN.
    """
    tokens = case.tokens.astype(np.intp)
    own = np.concatenate([np.exp(case.log_probs.astype(np.float64)), case.tail[:, None]], axis=1)
    own /= own.sum(axis=1, keepdims=True)  # it was rounded to float32
    rest = np.exp(log_probs)
    np.put_along_axis(rest, tokens, 0.0, axis=1)
    top = np.take_along_axis(log_probs, tokens, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.concatenate([top, np.log(rest.sum(axis=1, keepdims=True))], axis=1)
        terms = np.where(own > 0.0, own * (np.log(own) - other), 0.0)
    kl: LogProbs = terms.sum(axis=1)
    return np.where(np.isnan(kl), np.inf, np.maximum(kl, 0.0))


def answer_log_probs(
    session: Session, cases: Sequence[BaselineCase]
) -> Iterator[tuple[BaselineCase, LogProbs]]:
    """Each case, in an order of its own, with float64 [positions, vocab] of the session."""
    ordered = sorted(cases, key=lambda case: case.prompt)
    prompts = [Prompt(case.id, case.prompt, ()) for case in ordered]
    waiting = iter(ordered)
    cached: tuple[int, ...] = ()
    session.reset()
    for shared, group in group_by_beginning(prompts):
        beginning = group[0].ids[:shared]
        keep = common_prefix(cached, beginning)
        session.rewind(keep)
        if keep < shared:
            session.prefill(beginning[keep:])
        cached = beginning
        yield from _group_log_probs(session, [next(waiting) for _ in group])


def _group_log_probs(
    session: Session, group: Sequence[BaselineCase]
) -> Iterator[tuple[BaselineCase, LogProbs]]:
    """The session's cache holds what the group shares, before and after."""
    shared = session.position
    if all(len(case.tail) == 1 for case in group):
        tails = [case.ids[shared:] for case in group]
        for case, logits in zip(group, session.prefill_each(tails), strict=True):
            yield case, log_softmax(logits[None])
        return
    for case in group:
        rows = [log_softmax(session.prefill(case.prompt[shared:])[None])]
        answer = case.ids[len(case.prompt) :]
        if answer:
            rows += [log_softmax(chunk) for chunk in session.stream_logits(answer)]
        yield case, np.concatenate(rows)
        session.rewind(shared)


def _same_top(case: BaselineCase, log_probs: LogProbs) -> npt.NDArray[np.bool_]:
    """bool [positions]: the artifact's best token is the reference's, or ties with it there."""
    best = log_probs.argmax(axis=1)[:, None]
    near = case.log_probs >= case.log_probs[:, :1] - TIE_NATS
    same: npt.NDArray[np.bool_] = ((case.tokens == best) & near).any(axis=1)
    return same


def _check_vocabulary(cases: Sequence[BaselineCase], vocab_size: int, baseline: Path) -> None:
    for case in cases:
        largest = max(*case.ids, int(case.tokens.max()))
        if largest >= vocab_size or min(*case.ids, int(case.tokens.min())) < 0:
            raise InputError(
                f"token {largest} of case {case.id} is not among the artifact's {vocab_size}",
                where=str(baseline),
                hint="the baseline belongs to another student",
            )
