"""The judge: ``transformers`` in float32 reads the prompts, its log-probabilities are kept on disk.

The judge shares no code with exporters, runtimes or ``decoder.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import InputError
from edgedistill.reference_model import load_reference
from edgedistill.student import Student, read_json, write_json
from edgedistill.verify.prompts import read_as_used, read_long, read_two_turns
from edgedistill.verify.rounding import write_rounding_costs

TOKENS_PER_TEXT = 400
IDS_FILE = "ids.json"
REMOVED_FILE = "removed.json"
# Beside the texts, whose names a recipe chooses.
STRETCHES_FOLDER = "stretches"
TWO_TURNS, LONG = "two_turns", "long"
# A long prompt is read in parts, and judged on so many tokens that end at these shares of it.
CHUNK_TOKENS = 512
STRETCH_TOKENS = 64
STRETCH_ENDS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class JudgedText:
    """A text as the judge saw it.

    Attributes:
        name: of the text.
        ids: the student's own token ids.
        log_probs: float32 [tokens, vocab], memory-mapped; row i predicts token i + 1.
        removed_mass: mean probability that the judge gives to tokens that are not in ``vocab``,
            where it knows more of them; None where it does not.
    """

    name: str
    ids: list[int]
    log_probs: npt.NDArray[np.float32]
    removed_mass: float | None = None


@dataclass(frozen=True)
class JudgedStretches:
    """A prompt of which the judge kept some stretches of positions.

    Attributes:
        ids: the student's own token ids, all of them.
        stretches: positions, in order and apart from each other.
        log_probs: float32 [positions, vocab], memory-mapped: the stretches behind each other; the
            row of position i predicts token i + 1.
    """

    ids: list[int]
    stretches: tuple[range, ...]
    log_probs: npt.NDArray[np.float32]

    def of(self, number: int) -> npt.NDArray[np.float32]:
        """The log-probabilities of a stretch: float32 [positions, vocab]."""
        start = sum(len(stretch) for stretch in self.stretches[:number])
        return self.log_probs[start : start + len(self.stretches[number])]


def write_judge_logits(
    student: Path,
    texts: Mapping[str, str],
    dst: Path,
    *,
    chat: Chat,
    threads: int,
    context_tokens: int | None = None,
) -> None:
    """Write the judge's log-probabilities on the first tokens of each text, and what lies behind.

    Args:
        student: a student directory; a quantized one is dequantized for ``transformers``.
        texts: name -> text.
        dst: receives ``ids.json`` and one float32 ``<text>.npy`` [tokens, vocab] each, the same
            for stretches of a conversation of two turns and of one long prompt, and
            ``rounding.json``.
        chat: the fixed part of the conversation that the texts are put into.
        threads: for torch.
        context_tokens: how long the long prompt is; None leaves it out.

    Raises:
        InputError: a text without tokens; a chat template that refuses it.
    """
    tokenizer, where = load_tokenizer(student), str(student)
    longest = Student(student).facts.steady_tokens
    ids = read_texts(student, texts, chat)
    most = min(longest, context_tokens or longest)
    turns = read_two_turns(tokenizer, chat, most_tokens=most, where=where)
    model = load_reference(student, threads=threads)
    for name, tokens in ids.items():
        np.save(dst / f"{name}.npy", judge_log_probs(model, tokens, (range(len(tokens)),)))
    write_json(dst / IDS_FILE, ids)
    write_rounding_costs(model, ids, dst)
    folder = dst / STRETCHES_FOLDER
    folder.mkdir()
    split = (range(turns.first_prompt, turns.cached), range(turns.cached, len(turns.ids)))
    _write_stretches(model, folder, TWO_TURNS, turns.ids, split)
    if context_tokens is not None:
        long = read_long(tokenizer, texts.values(), chat, tokens=most, where=where)
        _write_stretches(model, folder, LONG, long, stretches_of(len(long)))


def read_texts(student: Path, texts: Mapping[str, str], chat: Chat) -> dict[str, list[int]]:
    """Name -> ids of the first tokens of each text, read as the student is used.

    Raises:
        InputError: a text without tokens; a chat template that refuses it.
    """
    tokenizer, where = load_tokenizer(student), str(student)
    longest = Student(student).facts.steady_tokens
    ids = {}
    for name, text in texts.items():
        read = read_as_used(tokenizer, text, chat, where=where)
        ids[name] = read.ids[: min(longest, read.opening + TOKENS_PER_TEXT)]
        if not ids[name]:
            raise InputError(f"the text {name!r} has no tokens", where=where)
    return ids


def stretches_of(tokens: int) -> tuple[range, ...]:
    """The positions of a long prompt that are judged: all of a short one, else some stretches."""
    if tokens * STRETCH_ENDS[0] < STRETCH_TOKENS:
        return (range(tokens),)
    ends = (int(tokens * share) for share in STRETCH_ENDS)
    return tuple(range(end - STRETCH_TOKENS, end) for end in ends)


def read_judge_logits(directory: Path) -> list[JudgedText]:
    """What :func:`write_judge_logits` wrote of the texts, log-probabilities memory-mapped."""
    ids = read_json(directory / IDS_FILE)
    removed_file = directory / REMOVED_FILE
    removed = read_json(removed_file) if removed_file.is_file() else {}
    return [
        JudgedText(
            name, tokens, np.load(directory / f"{name}.npy", mmap_mode="r"), removed.get(name)
        )
        for name, tokens in ids.items()
    ]


def read_judge_stretches(directory: Path, name: str) -> JudgedStretches | None:
    """What :func:`write_judge_logits` wrote of ``two_turns`` or ``long``; None if it did not."""
    path = directory / STRETCHES_FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    described = read_json(path)
    return JudgedStretches(
        ids=described["ids"],
        stretches=tuple(range(start, stop) for start, stop in described["stretches"]),
        log_probs=np.load(path.with_suffix(".npy"), mmap_mode="r"),
    )


def _write_stretches(
    model: Any, folder: Path, name: str, ids: list[int], stretches: tuple[range, ...]
) -> None:
    np.save(folder / f"{name}.npy", judge_log_probs(model, ids, stretches))
    described = {"ids": ids, "stretches": [[s.start, s.stop] for s in stretches]}
    write_json(folder / f"{name}.json", described)


def judge_log_probs(
    model: Any, ids: Sequence[int], stretches: tuple[range, ...]
) -> npt.NDArray[np.float32]:
    """float32 [positions of the stretches, vocab].

    The prompt goes through the model's cache in parts, and the head sees the wanted positions
    alone, so that memory grows with the cache and not with the square of the prompt.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()  # no config: it keeps every token, whatever windows the model has
    wanted = [position for stretch in stretches for position in stretch]
    rows = []
    with torch.inference_mode():
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = list(ids[start : start + CHUNK_TOKENS])
            kept = [p - start for p in wanted if start <= p < start + len(chunk)]
            logits = model(
                torch.tensor([chunk]),
                past_key_values=cache,
                use_cache=True,
                # One row at least: a head without any is not defined for every model.
                logits_to_keep=torch.tensor(kept or [len(chunk) - 1]),
            ).logits[0]
            if kept:
                rows.append(torch.log_softmax(logits.double(), dim=-1).float().numpy())
    return np.concatenate(rows)
