"""Unlabelled traffic: where does an artifact leave the reference, and does any case measure that?

No answer is known to be right here.  What is known is where the two models disagree: prompts are
clustered by their texts, clusters ranked by their disagreement, and those that no case of the suite
resembles are marked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.chat import Chat, load_tokenizer, render_conversation
from edgedistill.errors import InputError
from edgedistill.evaluate.first_tokens import (
    POSITIONS,
    Answer,
    Disagreement,
    answer_prompts,
    disagreements,
)
from edgedistill.evaluate.log_sample import SampledRequest, sample_requests
from edgedistill.evaluate.logs import read_logs
from edgedistill.evaluate.personal_data import Redactor
from edgedistill.evaluate.suite import load_suite
from edgedistill.evaluate.traffic_clusters import TrafficPrompt, find_clusters, loudest
from edgedistill.evaluate.traffic_vocabulary import in_own_tokens
from edgedistill.plugins import load_plugin, load_runtime
from edgedistill.progress import track
from edgedistill.student import read_json, write_json
from edgedistill.traffic_results import TrafficFindings

PROMPTS_FILE = "prompts.jsonl"
ANSWERS_FILE = "answers.npz"
TALLY_FILE = "tally.json"
SEED = 0  # the sample is the same for every artifact and every build


def read_reference(
    student: Path,
    traffic: Path,
    dst: Path,
    *,
    sample: int,
    chat: Chat,
    threads: int,
    context_tokens: int,
) -> None:
    """Let the reference answer a sample of the traffic; artifacts are compared with that.

    Writes ``dst/prompts.jsonl`` (a line a prompt, personal data redacted in its text),
    ``dst/answers.npz`` and ``dst/tally.json``.

    Args:
        student: of the reference, a student directory.
        traffic: a log; answers in it are not used.
        dst: an empty directory.
        sample: at most so many distinct prompts, stratified as a draft of a suite is.
        chat: the fixed part of the conversation.
        threads: of torch.
        context_tokens: prompts that do not fit are counted and left out.

    Raises:
        InputError: the log or the student is damaged, or no prompt of the sample can be used.
        UsageError: the sample is smaller than the kinds of request in the log.
        UnavailableError: torch is not installed.
    """
    logs = read_logs(traffic)
    drawn = sample_requests(logs.requests, sample, seed=SEED)
    tokenizer = load_tokenizer(student)
    usable, left_out = _render(tokenizer, drawn.chosen, chat, context_tokens, str(traffic))
    prompts = [ids for _, ids in usable]
    runtime = load_plugin("runtimes", "torch_reference")()
    with runtime.open(student, context_tokens=context_tokens, threads=threads) as session:
        found = dict(
            track(
                answer_prompts(session, prompts, _ends(tokenizer)),
                total=len(prompts),
                label="reading the traffic",
            )
        )
    answers = [found[index] for index in range(len(prompts))]
    with (dst / PROMPTS_FILE).open("w", encoding="utf-8") as file:
        for case, ids in usable:
            file.write(json.dumps(_prompt_line(case, ids), ensure_ascii=False) + "\n")
    np.savez(
        dst / ANSWERS_FILE,
        lengths=np.array([len(a.tokens) for a in answers]),
        kept=np.concatenate([a.kept for a in answers]),
        log_probs=np.concatenate([a.log_probs for a in answers]),
    )
    tally = {
        "requests": len(logs.requests),
        "skipped": len(logs.problems),
        "distinct": drawn.distinct,
        "left_out": left_out,
    }
    write_json(dst / TALLY_FILE, tally)


def _render(
    tokenizer: Any, chosen: Sequence[SampledRequest], chat: Chat, context_tokens: int, where: str
) -> tuple[list[tuple[SampledRequest, list[int]]], int]:
    """The requests with their ids, and how many do not suit the template or the context."""
    usable: list[tuple[SampledRequest, list[int]]] = []
    refused: InputError | None = None
    for case in chosen:
        messages = [turn._asdict() for turn in case.request.turns]
        try:
            text = render_conversation(
                tokenizer, messages, chat, where=f"{where}:{case.request.line}"
            )
        except InputError as error:
            refused = error
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if 0 < len(ids) <= context_tokens - POSITIONS:
            usable.append((case, list(ids)))
    if not usable:
        raise refused or InputError(
            f"no prompt of the sample fits into context_tokens = {context_tokens}", where=where
        )
    return usable, len(chosen) - len(usable)


def _ends(tokenizer: Any) -> frozenset[int]:
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def _prompt_line(case: SampledRequest, ids: list[int]) -> dict[str, Any]:
    redactor = Redactor()
    return {
        "line": case.request.line,
        "text": redactor.redact(case.request.text),
        "question": redactor.redact(case.request.turns[-1].content),
        "weight": case.weight,
        "properties": list(case.properties),
        "ids": ids,
    }


def find_disagreements(
    artifact: Path,
    runtime: str,
    student: Path,
    reference: Path,
    suite: Sequence[Path],
    *,
    vocabulary: Path | None = None,
    threads: int,
    context_tokens: int,
    kv_cache_bits: int | None = None,
) -> TrafficFindings:
    """Where an artifact leaves the reference on the traffic, and what of it no case measures.

    Args:
        artifact: a directory that the runtime opens.
        runtime: file name of the runtime, without ``.py``.
        student: whose tokenizer spells out the reference's answers.
        reference: what :func:`read_reference` wrote.
        suite: JSONL files; none, and nothing is known to be measured.
        vocabulary: the student whose tokens the artifact has, where it kept a part of the
            reference's; see :mod:`edgedistill.evaluate.traffic_vocabulary`.
        threads: of the runtime.
        context_tokens: what the artifact claims.
        kv_cache_bits: in which keys and values are cached; None: the runtime's default.

    Raises:
        InputError: a damaged artifact or suite.
        UnavailableError: the runtime is not installed.
        StageError: the artifact's logits are not finite.
    """
    started = time.monotonic()
    lines = [json.loads(line) for line in _read_lines(reference / PROMPTS_FILE)]
    answers = _read_answers(reference / ANSWERS_FILE)
    asked, expected = [line["ids"] for line in lines], answers
    tally = read_json(reference / TALLY_FILE)
    if vocabulary is not None:
        most = context_tokens - POSITIONS
        before = len(lines)
        usable, asked, expected = in_own_tokens(student, vocabulary, asked, answers, most=most)
        lines, answers = [lines[i] for i in usable], [answers[i] for i in usable]
        tally["left_out"] += before - len(lines)
    program = load_runtime(runtime, kv_cache_bits)
    with program.open(artifact, context_tokens=context_tokens, threads=threads) as session:
        found = dict(
            track(
                disagreements(session, asked, expected),
                total=len(lines),
                label="reading the traffic",
            )
        )
    spell = load_tokenizer(student), load_tokenizer(vocabulary or student)
    prompts = [
        _prompt(line, answer, found[index], *spell)
        for index, (line, answer) in enumerate(zip(lines, answers, strict=True))
    ]
    cases = load_suite(suite) if suite else []
    kl = np.array([prompt.kl for prompt in prompts])
    weights = np.array([prompt.weight for prompt in prompts])
    changed = np.array([prompt.changed for prompt in prompts])
    return TrafficFindings(
        **tally,
        prompts=len(prompts),
        runtime=runtime,
        kl_mean=float(np.average(kl, weights=weights)),
        kl_max=float(kl.max()),
        changed_share=float(np.average(changed, weights=weights)),
        clusters=find_clusters(prompts, cases),
        loudest=loudest(prompts),
        seconds=time.monotonic() - started,
    )


def _read_lines(path: Path) -> list[str]:
    # Not splitlines(): a text may hold a line separator of Unicode, which JSON does not escape.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def _read_answers(path: Path) -> list[Answer]:
    with np.load(path) as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        kept, log_probs = np.split(stored["kept"], ends), np.split(stored["log_probs"], ends)
    return [Answer(k[:, 0], k, p) for k, p in zip(kept, log_probs, strict=True)]


def _prompt(
    line: dict[str, Any], answer: Answer, found: Disagreement, tokenizer: Any, own_tokenizer: Any
) -> TrafficPrompt:
    redact = Redactor().redact
    return TrafficPrompt(
        text=line["text"],
        question=line["question"],
        weight=line["weight"],
        properties=tuple(line["properties"]),
        kl=found.kl,
        changed=found.changed,
        reference_answer=redact(_spell(tokenizer, answer.tokens.tolist())),
        artifact_answer=redact(_spell(own_tokenizer, found.said)),
    )


def _spell(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
