"""``edgedistill suite from-logs``: from production logs to the draft of a suite.

A draft is no suite: nobody has said yet what a right answer is.  Every line of it carries the key
``draft``, which the loader of suites refuses until a person has removed it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedistill.disk import disk_error
from edgedistill.errors import UsageError
from edgedistill.evaluate.duplicates import normalize
from edgedistill.evaluate.log_sample import LogSample, SampledRequest, sample_requests
from edgedistill.evaluate.logs import Logs, Request, read_logs
from edgedistill.evaluate.personal_data import Redactor, find_personal_data
from edgedistill.results import Document

# Logged answers are choices when a few of them are nearly all that was ever answered.
MOST_CHOICES = 20
CHOICES_COVER = 0.95
CHOICE_SHARE = 0.005  # of the answers, below which one is a slip
ANSWERS_PER_CHOICE = 5


class StratumSummary(Document):
    """A kind of request: its requests in the log, the distinct ones, its cases.

    Attributes:
        weight: requests / cases; what a case stands for on average.
    """

    name: str
    requests: int
    distinct: int
    cases: int
    weight: float


class DraftSummary(Document):
    """What ``edgedistill suite from-logs`` did.

    Attributes:
        requests: lines that could be understood; ``skipped`` the others, ``problems`` the first of
            them in words.
        distinct: what is left of the requests without exact and near duplicates.
        period: first and last time in the log, ISO 8601 in UTC; None where it has none.
        choices: the logged answers, where they are a closed set; else the draft is of the kind
            ``generate``.
        personal_data, clarify: kind or reason -> cases of the draft.
        ignored_tags: keys whose values name users or sessions.
    """

    out: str
    requests: int
    skipped: int
    problems: list[str]
    distinct: int
    exact_duplicates: int
    near_duplicates: int
    period: tuple[str, str] | None
    cases: int
    choices: list[str] | None
    strata: list[StratumSummary]
    personal_data: dict[str, int]
    redacted: bool
    clarify: dict[str, int]
    ignored_tags: list[str]


def draft_suite(
    logs: Path, out: Path, *, cases: int, seed: int = 0, redact: bool = False
) -> DraftSummary:
    """Write the draft of a suite; the same log, number and seed give the same bytes.

    Args:
        logs: JSON lines, as :func:`edgedistill.evaluate.logs.read_logs` reads them.
        out: a new file.
        cases: at most so many.
        seed: of the sample.
        redact: replace personal data by typed placeholders instead of flagging it alone.

    Raises:
        InputError: the log cannot be understood.
        UsageError: ``out`` exists, or ``cases`` is fewer than the kinds of request.
        StageError: ``out`` cannot be written.
    """
    if out.exists():
        hint = "somebody may have worked on it; choose another name"
        raise UsageError("exists already", where=str(out), hint=hint)
    read = read_logs(logs)
    choices = closed_answers([r.answer for r in read.requests if r.answer is not None])
    sample = sample_requests(read.requests, cases, seed=seed)
    lines = [_draft(case, logs.name, choices, redact=redact) for case in sample.chosen]
    _write(out, lines)
    return _summarize(read, sample, lines, out, choices, redacted=redact)


def closed_answers(answers: Sequence[str]) -> list[str] | None:
    """The answers of a model that chooses, sorted; None where they are no closed set.

    They are when 2 to 20 answers, each in at least 0.5% of the lines, make up 95% of all, and there
    are five lines or more for each.
    """
    counts = Counter(answer.strip() for answer in answers)
    counts.pop("", None)
    total = counts.total()
    common = sorted(a for a, count in counts.items() if count >= max(2, CHOICE_SHARE * total))
    covered = sum(counts[answer] for answer in common)
    closed = (
        2 <= len(common) <= MOST_CHOICES
        and covered >= CHOICES_COVER * total
        and total >= ANSWERS_PER_CHOICE * len(common)
    )
    return common if closed else None


def _draft(
    case: SampledRequest, source: str, choices: list[str] | None, *, redact: bool
) -> dict[str, Any]:
    """One line; ``draft`` first, because it is what has to be looked at."""
    request, redactor = case.request, Redactor()
    change = redactor.redact if redact else str
    answer = None if request.answer is None else request.answer.strip()
    notes: dict[str, Any] = {"source": f"{source}:{request.line}", "seen": case.seen}
    kinds = _personal_data(request)
    if kinds:
        notes["personal_data"] = kinds
        notes["redacted"] = redact
    if case.clarify:
        notes["clarify"] = list(case.clarify)
    messages = [{"role": turn.role, "content": change(turn.content)} for turn in request.turns]
    line: dict[str, Any] = {"draft": notes, "id": _id(request)}
    if choices is None:
        line |= {"kind": "generate", "messages": messages}
        if answer is not None:
            notes["logged_answer"] = change(answer)
    else:
        line |= {"kind": "choice", "messages": messages, "choices": choices}
        if answer in choices:
            line["answer"] = choices.index(answer)
    slices = sorted({change(name) for name in case.properties})
    return line | {"slices": slices, "weight": float(f"{case.weight:.6g}")}


def _id(request: Request) -> str:
    """From what was said, so that drafts from other days of the log never collide in meaning."""
    digest = hashlib.sha256(normalize(request.text).encode("utf-8")).hexdigest()
    return f"log-{digest[:12]}"


def _personal_data(request: Request) -> list[str]:
    texts = [turn.content for turn in request.turns]
    if request.answer is not None:
        texts.append(request.answer)
    return sorted({finding.kind for text in texts for finding in find_personal_data(text)})


def _write(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    aside = out.with_name(f".new-{out.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, out) from error


def _summarize(
    logs: Logs,
    sample: LogSample,
    lines: Sequence[dict[str, Any]],
    out: Path,
    choices: list[str] | None,
    *,
    redacted: bool,
) -> DraftSummary:
    times = [request.time_s for request in logs.requests if request.time_s is not None]
    notes = [line["draft"] for line in lines]
    return DraftSummary(
        out=str(out),
        requests=len(logs.requests),
        skipped=len(logs.problems),
        problems=[str(problem) for problem in logs.problems[:3]],
        distinct=sample.distinct,
        exact_duplicates=sample.exact_duplicates,
        near_duplicates=sample.near_duplicates,
        period=(_iso(min(times)), _iso(max(times))) if times else None,
        cases=len(lines),
        choices=choices,
        strata=[
            StratumSummary(
                name=s.name,
                requests=s.traffic,
                distinct=s.distinct,
                cases=s.cases,
                weight=s.traffic / s.cases,
            )
            for s in sorted(sample.strata, key=lambda s: (-s.traffic, s.name))
        ],
        personal_data=_count(kind for note in notes for kind in note.get("personal_data", ())),
        redacted=redacted,
        clarify=_count(reason for note in notes for reason in note.get("clarify", ())),
        ignored_tags=sample.ignored_tags,
    )


def _count(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def describe(summary: DraftSummary) -> Iterator[str]:
    """The summary as lines of text."""
    yield (
        f"{summary.requests} requests, {summary.distinct} of them distinct "
        f"({summary.exact_duplicates} exact and {summary.near_duplicates} near duplicates)"
    )
    if summary.skipped:
        yield f"{summary.skipped} lines were skipped, such as"
        yield from (f"  {problem}" for problem in summary.problems)
    if summary.period:
        yield f"from {summary.period[0]} to {summary.period[1]}"
    yield ""
    width = max(len("kind of request"), *(len(s.name) for s in summary.strata))
    columns = f"{'requests':>9} {'distinct':>9} {'cases':>6} {'weight':>8}"
    yield f"  {'kind of request':<{width}} {columns}"
    for s in summary.strata:
        yield f"  {s.name:<{width}} {s.requests:>9} {s.distinct:>9} {s.cases:>6} {s.weight:>8.4g}"
    yield ""
    if summary.ignored_tags:
        yield f"tags that name no kind of request: {', '.join(summary.ignored_tags)}"
    if summary.personal_data:
        found = ", ".join(f"{kind} {count}" for kind, count in summary.personal_data.items())
        what = "replaced by placeholders" if summary.redacted else "left in; --redact replaces it"
        yield f"personal data, in cases: {found} ({what})"
    if summary.clarify:
        found = ", ".join(f"{reason} {count}" for reason, count in summary.clarify.items())
        yield f"candidates for a clarifying question: {found}"
    yield f"{summary.cases} drafts in {summary.out}"
    missing = "check the answers" if summary.choices else "say how an answer is graded"
    yield f"next: read them, {missing}, and remove each case's `draft` key"
