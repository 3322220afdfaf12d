"""Traffic for an artifact that kept a part of the reference's tokens.

The same text is asked in the artifact's own tokens.  Of what the reference answered, the positions
up to its first token that the artifact lacks are compared, over the tokens that both have: the
reference's probabilities of those, normalized, with all that it did not name as one outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgedistill.chat import load_tokenizer
from edgedistill.errors import InputError
from edgedistill.evaluate.first_tokens import Answer
from edgedistill.kept_vocabulary import Ids, read_kept


def in_own_tokens(
    reference: Path,
    student: Path,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    *,
    most: int,
) -> tuple[list[int], list[list[int]], list[Answer]]:
    """Which prompts can be asked, their ids, and what the reference answered, in other tokens.

    Args:
        reference: the student that answered.
        student: a student that kept a part of its tokens.
        prompts: ids of the reference.
        answers: of the reference.
        most: tokens of a prompt; one that is longer in fewer tokens is left out.

    Raises:
        InputError: the student has no map of its vocabulary, or no prompt can be asked.
    """
    kept = read_kept(student)
    if kept is None:
        raise InputError("has no map of its vocabulary", where=str(student))
    whole, own, new_ids = load_tokenizer(reference), load_tokenizer(student), kept.new_ids()
    usable: list[int] = []
    asked: list[list[int]] = []
    expected: list[Answer] = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = whole.decode(list(prompt), clean_up_tokenization_spaces=False)
        ids = own(text, add_special_tokens=False).input_ids
        mapped = mapped_answer(answer, new_ids)
        if mapped is not None and 0 < len(ids) <= most:
            usable.append(index)
            asked.append(list(ids))
            expected.append(mapped)
    if not usable:
        raise InputError("no prompt of the traffic fits in its tokens", where=str(student))
    return usable, asked, expected


def mapped_answer(answer: Answer, new_ids: Ids) -> Answer | None:
    """An answer in other tokens; None where none of those that began it probably is left.

    Args:
        answer: of the reference.
        new_ids: int64 [rows of the reference]: the new id of each token, or -1.
    """
    kept = new_ids[answer.kept]
    # A token that is not there cannot be read on from.
    led = np.flatnonzero(new_ids[answer.tokens] < 0)
    positions = int(led[0]) + 1 if len(led) else len(answer.tokens)
    stays = kept[:positions] >= 0
    none_left = np.flatnonzero(~stays.any(axis=1))
    positions = int(none_left[0]) if len(none_left) else positions
    if positions == 0:
        return None
    stays, kept = stays[:positions], kept[:positions]
    width = int(stays.sum(axis=1).min())
    first = np.argsort(~stays, axis=1, kind="stable")  # those that stay, in their order
    probabilities = np.exp(answer.log_probs[:positions])
    shares = np.take_along_axis(probabilities[:, :-1] * stays, first, axis=1)
    others = shares[:, width:].sum(axis=1, keepdims=True) + probabilities[:, -1:]
    mass = np.concatenate([shares[:, :width], others], axis=1)
    with np.errstate(divide="ignore"):  # nothing may be left for the others
        log_probs = np.log(mass / mass.sum(axis=1, keepdims=True))
    tokens = np.take_along_axis(kept, first, axis=1)[:, :width].astype(np.int32)
    return Answer(tokens[:, 0], tokens, log_probs)
