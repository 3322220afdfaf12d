"""Score every case: by the reference, ``transformers`` in float32, choices in batches.

What all prompts begin with is computed once.  Prompts of the same length form a batch, so there is
no padding to get wrong; the head runs on the last position alone.  The tokens of longer choices
follow from the batch's own cache.  Texts and answers in the model's own words go through a session
of the same model, one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.chat import Chat
from edgedistill.evaluate.baseline import BaselineRecorder
from edgedistill.evaluate.prompts import Prompt, render_prompts
from edgedistill.evaluate.score import (
    LogProbs,
    Score,
    check_finite,
    log_softmax,
    score_cases,
    write_scores,
)
from edgedistill.evaluate.suite import ChoiceCase, load_suite, sample_cases
from edgedistill.progress import progress_bar
from edgedistill.reference_model import load_reference
from edgedistill.runtimes.torch_reference import TorchSession, new_cache
from edgedistill.verify.prompts import common_prefix

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 3072  # with the shared beginning: bounds the cache's memory
BATCH_ROWS = 64


def score_reference(
    student: Path,
    suite: Sequence[Path],
    dst: Path,
    *,
    sample: int | None = None,
    chat: Chat,
    threads: int,
    context_tokens: int,
) -> None:
    """Score the suite with a student in float32; writes what ``score_artifact`` writes.

    Beside it goes ``baseline-<sha256>.safetensors``, for comparisons without the reference.

    Args:
        student: float or quantized (then dequantized to a temporary copy).
        suite: JSONL files.
        dst: an empty directory.
        sample: number of cases, the same that an artifact's sample has; None scores all.
        chat: the fixed part of the conversation.
        threads: of torch.
        context_tokens: what a case must fit into.

    Raises:
        InputError: a damaged suite or student; a case that does not fit the context.
        UnavailableError: torch is not installed.
        StageError: the logits are not finite.
    """
    cases = sample_cases(load_suite(suite), sample)
    prompts = render_prompts(student, cases, chat, context_tokens=context_tokens)
    started = time.monotonic()
    model = load_reference(student, threads=threads)
    choices = {case.id: case.answer for case in cases if isinstance(case, ChoiceCase)}
    recorder = BaselineRecorder(choices)
    asked = [prompt for prompt in prompts if prompt.id in choices]
    scores: dict[str, Score] = {**score_batched(model, asked, recorder)}
    if choices:
        recorder.write(dst)
    others = [case for case in cases if case.id not in choices]
    if others:
        session = TorchSession(model, student, context_tokens)
        rest = [prompt for prompt in prompts if prompt.id not in choices]
        scores |= score_cases(session, others, rest, student, chat)
    write_scores(dst, cases, scores, seconds=time.monotonic() - started)


def score_batched(
    model: Any, prompts: Sequence[Prompt], recorder: BaselineRecorder | None = None
) -> dict[str, LogProbs]:
    """Case id -> float64 [choices], summed log-probabilities in nats.

    ``recorder`` is given what the model says at the positions of the answers.
    """
    scores: dict[str, LogProbs] = {}
    if not prompts:
        return scores
    beginning = _compute_beginning(model, prompts)
    with progress_bar(len(prompts), "scoring the reference") as bar:
        for batch in equal_length_batches(prompts):
            found = _score_batch(model, beginning, batch, recorder)
            for prompt, values in zip(batch, found, strict=True):
                check_finite(prompt.id, values)
                scores[prompt.id] = values
            bar.advance(len(batch))
    return scores


def equal_length_batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Batches of prompts of one length, of at most ``BATCH_ROWS`` and about ``BATCH_TOKENS``."""
    ordered = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.ids))
    for length, group in groupby(ordered, key=lambda prompt: len(prompt.ids)):
        same = list(group)
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // length))
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def _compute_beginning(model: Any, prompts: Sequence[Prompt]) -> Any:
    """A cache of one row with the ids that all prompts begin with; empty where they share none."""
    import torch

    cache = new_cache()
    first = min(prompts, key=lambda prompt: prompt.ids).ids
    last = max(prompts, key=lambda prompt: prompt.ids).ids
    shortest = min(len(prompt.ids) for prompt in prompts)
    # What the first and the last of a sorted list share, all share; one token has to be left.
    shared = min(common_prefix(first, last), shortest - 1)
    if shared:
        with torch.inference_mode():
            ids = torch.tensor([first[:shared]])
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _score_batch(
    model: Any, beginning: Any, batch: Sequence[Prompt], recorder: BaselineRecorder | None
) -> list[LogProbs]:
    import torch

    with torch.inference_mode():
        cache = _select(beginning, torch.zeros(len(batch), dtype=torch.long))
        shared = cache.get_seq_length()
        ids = torch.tensor([prompt.ids[shared:] for prompt in batch])
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first = log_softmax(output.logits[:, 0].numpy())
        scores = [
            np.array([row[choice[0]] for choice in prompt.choices])
            for row, prompt in zip(first, batch, strict=True)
        ]
        if recorder:
            for row, prompt in zip(first, batch, strict=True):
                recorder.add_first(prompt, row)
        if any(len(choice) > 1 for prompt in batch for choice in prompt.choices):
            _add_later_tokens(model, cache, batch, scores, recorder)
    return scores


def _add_later_tokens(
    model: Any,
    cache: Any,
    batch: Sequence[Prompt],
    scores: list[LogProbs],
    recorder: BaselineRecorder | None,
) -> None:
    """Add the log-probabilities of the second and later tokens of the choices.

    Each (prompt, choice) is a row that continues from its prompt's cache.  Choices are padded on
    the right, where a causal model does not look.
    """
    import torch

    rows = [
        (i, j)
        for i, prompt in enumerate(batch)
        for j, choice in enumerate(prompt.choices)
        if len(choice) > 1
    ]
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        choices = [batch[i].choices[j] for i, j in part]
        width = max(len(choice) for choice in choices) - 1
        ids = torch.zeros((len(part), width), dtype=torch.long)
        for row, choice in enumerate(choices):
            ids[row, : len(choice) - 1] = torch.tensor(choice[:-1])
        cached = _select(cache, torch.tensor([i for i, _ in part]))
        logits = model(input_ids=ids, past_key_values=cached, use_cache=True).logits
        for row, (i, j) in enumerate(part):
            following = choices[row][1:]
            probabilities = log_softmax(logits[row, : len(following)].numpy())
            scores[i][j] += probabilities[np.arange(len(following)), following].sum()
            if recorder:
                recorder.add_later(batch[i], j, probabilities)


def _select(cache: Any, rows: torch.Tensor) -> Any:
    """A new cache that holds the given rows of another, in that order, repeats included."""
    selected = new_cache()
    for index, layer in enumerate(cache.layers):
        selected.update(layer.keys[rows], layer.values[rows], index)
    return selected
