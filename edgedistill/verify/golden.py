"""Golden vectors: what an artifact says when it is asked, so that a device can prove what it runs.

A vector is a prompt as token ids, the tokens that greedy decoding gives after it in the artifact's
own runtime, and by how much each led the second best.  Rounding differs between kernels, so a step
counts only if it led clearly; a vector ends before the first that did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.progress import track
from edgedistill.results import Check, GoldenVector
from edgedistill.session import Logits, Session

STEPS = 16
# A vector of fewer steps proves little.
LEAST_STEPS = 3
KEPT = 4
# In logits.  A step that leads by less is not stored; a lead that is off by more is another model.
# Kernels for other processors move logits of this size of model by a few hundredths.
CLEAR_LEAD = 0.5
# A question, and how its answer begins: patterns that a model of any size goes on with.
PROMPTS = (
    ("Count from one to thirty in words.", "one, two, three, four, five, six,"),
    ("Repeat the word echo.", "echo echo echo echo echo echo echo"),
    ("Name the days of the week.", "Monday, Tuesday, Wednesday,"),
    ("Write the alphabet.", "a b c d e f g h"),
    ("Name the months of the year.", "January, February, March,"),
    ("Count in steps of ten.", "10, 20, 30, 40,"),
    ("Say it twice.", "The quick brown fox jumps over the lazy dog. The quick brown"),
    ("Print the numbers below ten in Python.", "for i in range(10):\n    print("),
)


def make_golden(session: Session, student: Path) -> list[GoldenVector]:
    """The longest vectors that an artifact gives, at most ``KEPT``.

    Every step is taken twice, token by token and all at once, and counts only if it leads clearly
    in both.  A model that is never sure (coarse rounding does that) gives none.

    Args:
        session: the artifact in its runtime; it is reset.
        student: for tokenizer and chat template.

    Raises:
        InputError: the student has no tokenizer.
    """
    found: list[GoldenVector] = []
    for question, opening in track(PROMPTS, label="making golden vectors"):
        ids = _prompt_ids(student, question, opening)
        steps = min(STEPS, session.context_tokens // 2)
        ids = ids[: session.context_tokens - steps]
        vector = _clear(session, _greedy(session, ids, f"{question} {opening}", steps))
        if len(vector.steps) >= min(LEAST_STEPS, steps):
            found.append(vector)
        if sum(len(v.steps) == steps for v in found) >= KEPT:
            break
    session.reset()
    return sorted(found, key=lambda v: -len(v.steps))[:KEPT]


def replay_golden(session: Session, golden: Sequence[GoldenVector]) -> list[Check]:
    """Decode again and compare: the same tokens, with leads that are nearly the same.

    Args:
        session: the artifact in its runtime; it is reset.
        golden: from its manifest; at least one.
    """
    wrong: list[str] = []
    worst, steps = 0.0, 0
    for vector in track(golden, label="replaying golden vectors"):
        problem = _unfit(session, vector)
        if problem is None:
            off, problem = _replay(session, vector)
            worst = max(worst, off)
        steps += len(vector.steps)
        if problem is not None:
            wrong.append(f"{vector.prompt!r}: {problem}")
    session.reset()
    return [
        Check(
            name="golden: tokens",
            passed=not wrong,
            value=float(len(wrong)),
            limit=0.0,
            detail=wrong[0] if wrong else f"{steps} steps after {len(golden)} prompts, all equal",
        ),
        Check(
            name="golden: leads",
            passed=worst <= CLEAR_LEAD and not wrong,
            value=worst,
            limit=CLEAR_LEAD,
            detail="largest change of a stored lead, in logits, up to the first other token",
        ),
    ]


def _prompt_ids(student: Path, question: str, opening: str) -> list[int]:
    """A conversation whose answer has begun; plain text where there is no chat template."""
    tokenizer = load_tokenizer(student)
    before = tokenizer.bos_token or ""
    if tokenizer.chat_template:
        message = {"role": "user", "content": question}
        try:
            before = render_conversation(tokenizer, [message], Chat(), where=str(student))
        except InputError:  # a template that wants more than a user's message
            before = tokenizer.bos_token or ""
    ids: list[int] = tokenizer(before + opening, add_special_tokens=False).input_ids
    return ids


def _greedy(session: Session, ids: list[int], prompt: str, count: int) -> GoldenVector:
    """Steps up to the first that does not lead clearly."""
    session.reset()
    logits = session.prefill(ids)
    steps: list[int] = []
    leads: list[float] = []
    while len(steps) < count:
        token, lead = _best(logits)
        if not lead >= CLEAR_LEAD:  # also true of not-a-number
            break
        steps.append(token)
        leads.append(round(lead, 4))
        if len(steps) < count:
            logits = session.step(token)
    return GoldenVector(prompt=prompt, ids=ids, steps=steps, leads=leads)


def _clear(session: Session, vector: GoldenVector) -> GoldenVector:
    """The vector up to the first step that all at once is not the same, or leads by less."""
    if not vector.steps:
        return vector
    session.reset()
    session.prefill(vector.ids)
    session.rewind(len(vector.ids) - 1)
    again = [vector.ids[-1], *vector.steps[:-1]]
    rows = [row for chunk in session.stream_logits(again) for row in chunk]
    kept = 0
    for row, token in zip(rows, vector.steps, strict=True):
        best, lead = _best(row)
        if best != token or not lead >= CLEAR_LEAD:
            break
        kept += 1
    update = {"steps": vector.steps[:kept], "leads": vector.leads[:kept]}
    return vector.model_copy(update=update)


def _unfit(session: Session, vector: GoldenVector) -> str | None:
    """Why a vector cannot be replayed at all."""
    tokens = [*vector.ids, *vector.steps]
    if not vector.ids or len(vector.steps) != len(vector.leads):
        return "is not a whole vector"
    if min(tokens) < 0 or max(tokens) >= session.vocab_size:
        return f"has a token outside the vocabulary of {session.vocab_size}"
    if len(tokens) > session.context_tokens:
        return f"is longer than the context of {session.context_tokens}"
    return None


def _replay(session: Session, vector: GoldenVector) -> tuple[float, str | None]:
    """(largest change of a lead, what went wrong)."""
    session.reset()
    logits = session.prefill(vector.ids)
    worst = 0.0
    for number, (token, stored) in enumerate(zip(vector.steps, vector.leads, strict=True)):
        best, lead = _best(logits)
        if best != token:
            return worst, f"step {number} gives the token {best}, not {token}"
        change = abs(lead - stored)
        worst = max(worst, change if np.isfinite(change) else np.inf)
        if number + 1 < len(vector.steps):
            logits = session.step(token)
    return worst, None


def _best(logits: Logits) -> tuple[int, float]:
    """The most probable token, and by how much it leads the second; NaN where logits are."""
    if np.isnan(logits).any():
        return -1, float("nan")
    second, first = np.partition(logits, -2)[-2:]
    return int(logits.argmax()), float(first - second)
