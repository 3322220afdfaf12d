"""The reference on the tokens of a student that kept a part of its vocabulary.

The student's ids have their places in the reference's vocabulary, so the reference can read exactly
what an artifact reads, token by token, and both be asked for the same tokens: the reference's
probabilities of those that were kept, normalized.  What it gives to the others is told beside it.
How the same text fares as fewer, longer tokens is another question, which the suite answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.bpe_vocabulary import TOKENIZER_FILE
from edgedistill.chat import Chat
from edgedistill.content import sha256_file
from edgedistill.errors import StageError
from edgedistill.kept_vocabulary import read_kept
from edgedistill.reference_model import load_reference
from edgedistill.student import write_json
from edgedistill.verify.judge import (
    IDS_FILE,
    REMOVED_FILE,
    judge_log_probs,
    read_texts,
)


def write_kept_logits(
    reference: Path,
    student: Path,
    texts: Mapping[str, str],
    dst: Path,
    *,
    chat: Chat,
    threads: int,
) -> None:
    """Write what ``write_judge_logits`` writes of texts, as a smaller vocabulary has it.

    Args:
        reference: a student directory with the whole vocabulary.
        student: one with a part of it; its tokenizer cuts the texts.
        texts: name -> text.
        dst: receives ``ids.json`` with the student's ids, one float32 ``<text>.npy``
            [tokens, kept] each, and ``removed.json``: the mean probability, by text, that the
            reference gives to tokens that the student lacks.
        chat: the fixed part of the conversation that the texts are put into.
        threads: for torch.

    Raises:
        InputError: a text without tokens; a chat template that refuses it.
        StageError: the student's vocabulary is no part of the reference's.
    """
    kept = read_kept(student)
    if kept is None or sha256_file(reference / TOKENIZER_FILE) != kept.whole_tokenizer:
        raise StageError("its vocabulary is no part of the reference's", where=str(student))
    ids = read_texts(student, texts, chat)
    removed = {}
    model = load_reference(reference, threads=threads)
    for name, tokens in ids.items():
        whole = judge_log_probs(model, kept.ids[tokens].tolist(), (range(len(tokens)),))
        part, mass = restrict(whole, kept.ids)
        np.save(dst / f"{name}.npy", part)
        removed[name] = float(1.0 - mass.mean())
    write_json(dst / IDS_FILE, ids)
    write_json(dst / REMOVED_FILE, removed)


def restrict(
    log_probs: npt.NDArray[np.float32], kept: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """(float32 [n, kept] normalized, float64 [n] of the mass that they had) of [n, vocab]."""
    part = log_probs[:, kept].astype(np.float64)
    top = part.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(part - top).sum(axis=-1, keepdims=True))
    return (part - total).astype(np.float32), np.exp(total[:, 0])
