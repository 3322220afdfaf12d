"""Score every case: by an artifact in its runtime.

A choice's score is the sum of the log-probabilities (nats) of its tokens after the prompt; there
is no division by length.  A text is scored in the same way, an answer in the model's own words is
graded.  What neighbouring prompts have in common, such as a system prompt, is computed once; a
runtime that can compute several prompts in a batch does so.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.generate import Voice, generate_answers
from edgedistill.evaluate.grade import grade_answer
from edgedistill.evaluate.prompts import Prompt, render_prompts
from edgedistill.evaluate.suite import Case, GenerateCase, TextCase, load_suite, sample_cases
from edgedistill.plugins import load_runtime
from edgedistill.progress import progress_bar
from edgedistill.session import Logits, Session
from edgedistill.student import read_json, write_json
from edgedistill.verify.prompts import common_prefix

SCORES_FILE = "scores.jsonl"
TIMING_FILE = "timing.json"
# What a batch of its own costs, in tokens: about a decoded token of a small model.
SPLIT_TOKENS = 64
DECIMALS = 6  # of a log-probability: float32 logits carry no more
LONGEST_SECONDS = 1e9  # thirty years

LogProbs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and how right it is, in [0, 1]."""

    text: str
    grade: float


@dataclass(frozen=True)
class TextBits:
    """How well the model predicts a text: bits per byte (lower is better), and its bytes."""

    bits_per_byte: float
    size_bytes: int


# Of a choice (nats, one a choice), of an answer in words, of a text.
Score = LogProbs | Answer | TextBits


def score_artifact(
    artifact: Path,
    runtime: str,
    student: Path,
    suite: Sequence[Path],
    dst: Path,
    *,
    sample: int | None,
    chat: Chat,
    threads: int,
    context_tokens: int,
    kv_cache_bits: int | None = None,
) -> None:
    """Score the suite, or a paired sample of it, with an artifact.

    Writes ``dst/scores.jsonl``, a line a case in suite order (docs/suites.md shows one of each
    kind), and ``dst/timing.json``.

    Args:
        artifact: a directory that the runtime opens.
        runtime: file name of the runtime, without ``.py``.
        student: its tokenizer and chat template make the prompts, the same for every artifact.
        suite: JSONL files.
        dst: an empty directory.
        sample: number of cases of a deterministic stratified sample; None scores all.
        chat: the fixed part of the conversation.
        threads: of the runtime.
        context_tokens: what the artifact claims.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        InputError: a damaged suite, artifact or student; a case that does not fit the context.
        UsageError: there is no such runtime.
        UnavailableError: it is not installed.
        StageError: the artifact's logits are not finite.
    """
    cases = sample_cases(load_suite(suite), sample)
    prompts = render_prompts(student, cases, chat, context_tokens=context_tokens)
    program = load_runtime(runtime, kv_cache_bits)
    started = time.monotonic()
    with program.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        refuse_other_tokens(session, student)
        scores = score_cases(session, cases, prompts, student, chat)
    write_scores(dst, cases, scores, seconds=time.monotonic() - started)


def refuse_other_tokens(session: Session, student: Path) -> None:
    """Refuse an artifact that has fewer tokens than those who ask it.

    Raises:
        InputError: it has; the same ids would mean other texts to it.
    """
    known = len(load_tokenizer(student))
    if session.vocab_size < known:
        raise InputError(
            f"the artifact has {session.vocab_size} tokens, the tokenizer of what it is compared "
            f"with {known}: the same ids would mean other texts",
            where=str(student),
            hint="an artifact with a vocabulary of its own (prune_vocabulary) is evaluated by the "
            "build of its recipe",
        )


def score_cases(
    session: Session, cases: Sequence[Case], prompts: Sequence[Prompt], student: Path, chat: Chat
) -> dict[str, Score]:
    """Case id -> score, of cases of any kind.

    Args:
        session: of the model that is scored.
        cases: any number; ``prompts`` are theirs.
        student: whose tokenizer and template say where an answer ends.
        chat: the fixed part of the conversation.
    """
    asked = {case.id: case for case in cases if isinstance(case, GenerateCase)}
    read = {case.id: case for case in cases if isinstance(case, TextCase)}
    scores: dict[str, Score] = {}
    for case_id, values in score_prompts(session, [p for p in prompts if p.choices]).items():
        scores[case_id] = _text_bits(read[case_id], values) if case_id in read else values
    if asked:
        questions = [prompt for prompt in prompts if prompt.id in asked]
        answers = generate_answers(session, asked, questions, Voice.of(student, chat))
        for case_id, text in answers.items():
            scores[case_id] = Answer(text, grade_answer(asked[case_id], text))
    return scores


def _text_bits(case: TextCase, log_probs: LogProbs) -> TextBits:
    bits = -float(log_probs[0]) / math.log(2.0)
    return TextBits(bits / case.size_bytes, case.size_bytes)


def score_prompts(session: Session, prompts: Sequence[Prompt]) -> dict[str, LogProbs]:
    """Case id -> float64 [choices], summed log-probabilities in nats."""
    scores: dict[str, LogProbs] = {}
    # Sorted ids put prompts with the longest common beginnings next to each other.
    ordered = sorted(prompts, key=lambda prompt: prompt.ids)
    with progress_bar(len(ordered), "scoring") as bar:
        for group in read_beginnings(session, ordered):
            for prompt, values in zip(group, _score_group(session, group), strict=True):
                check_finite(prompt.id, values)
                scores[prompt.id] = values
                bar.advance()
    return scores


def read_beginnings(session: Session, ordered: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """The groups of a sorted list, each with what it shares in the session's cache.

    The cache has to be left as it was found.
    """
    cached: tuple[int, ...] = ()
    session.reset()
    for shared, group in group_by_beginning(ordered):
        beginning = group[0].ids[:shared]
        keep = common_prefix(cached, beginning)
        session.rewind(keep)
        if keep < shared:
            session.prefill(beginning[keep:])
        cached = beginning
        yield group


def group_by_beginning(ordered: Sequence[Prompt]) -> Iterator[tuple[int, list[Prompt]]]:
    """Neighbours in a sorted list, and how many leading ids all of them share.

    The shared ids are computed once a group, the others once a prompt; every prompt keeps at least
    one id of its own, whose logits are what is asked for.  A prompt that would shorten what the
    group shares, so that more than ``SPLIT_TOKENS`` tokens were computed again, begins the next.
    """
    group: list[Prompt] = []
    shared = 0
    for prompt in ordered:
        own = len(prompt.ids) - 1
        now = min(own, shared, common_prefix(group[0].ids, prompt.ids)) if group else own
        if group and (len(group) - 1) * (shared - now) > SPLIT_TOKENS:
            yield shared, group
            group, now = [], own
        group.append(prompt)
        shared = now
    if group:
        yield shared, group


def _score_group(session: Session, group: Sequence[Prompt]) -> Iterator[LogProbs]:
    """float64 [choices] of each prompt; the session's cache holds what the group shares."""
    shared = session.position
    if all(len(choice) == 1 for prompt in group for choice in prompt.choices):
        logits_of_each = session.prefill_each([prompt.ids[shared:] for prompt in group])
        for prompt, logits in zip(group, logits_of_each, strict=True):
            first = log_softmax(logits)
            yield np.array([first[choice[0]] for choice in prompt.choices])
        return
    for prompt in group:
        yield _score_choices(session, prompt, session.prefill(prompt.ids[shared:]))
        session.rewind(shared)


def _score_choices(session: Session, prompt: Prompt, logits: Logits) -> LogProbs:
    """float64 [choices], given the logits after the prompt, which the session's cache ends with."""
    first = log_softmax(logits)
    scores = np.array([first[choice[0]] for choice in prompt.choices])
    for i, choice in enumerate(prompt.choices):
        if len(choice) == 1:
            continue
        session.rewind(len(prompt.ids))
        position = 1
        for chunk in session.stream_logits(choice[:-1]):
            for row in chunk:
                scores[i] += log_softmax(row)[choice[position]]
                position += 1
    return scores


def log_softmax(logits: npt.NDArray[np.floating]) -> LogProbs:
    """Log-probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits are reported by their case, as an error
        wide -= wide.max(axis=-1, keepdims=True)
        normalized: LogProbs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return normalized


def check_finite(case_id: str, scores: LogProbs) -> None:
    """Refuse log-probabilities that no verdict can be drawn from.

    Raises:
        StageError: one is infinite or not a number.
    """
    if not np.isfinite(scores).all():
        raise StageError(
            f"the log-probabilities of case {case_id} are not finite: {scores.tolist()}",
            hint="the artifact overflows or is damaged; verify shows where it departs",
        )


def write_scores(
    dst: Path, cases: Sequence[Case], scores: Mapping[str, Score], *, seconds: float
) -> None:
    """Write ``scores.jsonl`` in the order of ``cases``, and how long scoring took."""
    with (dst / SCORES_FILE).open("w", encoding="utf-8") as file:
        for case in cases:
            file.write(json.dumps({"id": case.id} | _entry(scores[case.id])) + "\n")
    write_json(dst / TIMING_FILE, {"seconds": round(seconds, 3), "cases": len(cases)})


def _entry(score: Score) -> dict[str, Any]:
    if isinstance(score, Answer):
        return {"kind": "generate", "answer": score.text, "grade": round(score.grade, DECIMALS)}
    if isinstance(score, TextBits):
        bits = round(score.bits_per_byte, DECIMALS)
        return {"kind": "text", "bits_per_byte": bits, "bytes": score.size_bytes}
    return {"kind": "choice", "log_probs": [round(float(value), DECIMALS) for value in score]}


def read_scores(directory: Path) -> dict[str, Score]:
    """Case id -> score, as :func:`write_scores` left them.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = directory / SCORES_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"no scores: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", where=str(path)) from error
    scores: dict[str, Score] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            case_id, score = str(entry["id"]), _parse_score(entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError("is not a line of scores", where=f"{path}:{number}") from error
        if case_id in scores or not _is_finite(score):
            raise InputError(f"case {case_id} is repeated or not finite", where=f"{path}:{number}")
        scores[case_id] = score
    return scores


def _parse_score(entry: Mapping[str, Any]) -> Score:
    kind = entry.get("kind", "choice")
    if kind == "generate":
        return Answer(str(entry["answer"]), float(entry["grade"]))
    if kind == "text":
        return TextBits(float(entry["bits_per_byte"]), int(entry["bytes"]))
    if kind != "choice":
        raise ValueError(f"unknown kind {kind!r}")
    return np.array([float(value) for value in entry["log_probs"]])


def _is_finite(score: Score) -> bool:
    if isinstance(score, Answer):
        return 0.0 <= score.grade <= 1.0
    if isinstance(score, TextBits):
        return math.isfinite(score.bits_per_byte) and score.size_bytes > 0
    return bool(np.isfinite(score).all())


def log_probs_of(scores: Mapping[str, Score]) -> dict[str, LogProbs]:
    """Case id -> float64 [choices], of the choices among the scores."""
    return {case_id: s for case_id, s in scores.items() if isinstance(s, np.ndarray)}


def read_seconds(directory: Path) -> float:
    """How long the scoring took, in seconds.

    Raises:
        InputError: the file is missing or damaged.
    """
    seconds = read_json(directory / TIMING_FILE).get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < LONGEST_SECONDS:
        raise InputError(f"seconds is {seconds!r}", where=str(directory / TIMING_FILE))
    return float(seconds)
