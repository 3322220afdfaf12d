"""The report as Markdown, for pull requests and model cards: the same figures in plain tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgedistill.report import words
from edgedistill.report.page import check_names, find_check, limitations
from edgedistill.report.smaller import rung_sentences
from edgedistill.results import ArtifactReport, BuildReport, Evaluation, Timing

SHOWN_FLIPS = 5
PROMPT_CHARACTERS = 160


def render_markdown(report: BuildReport) -> str:
    """A document in GitHub's Markdown; text of users and models cannot leave its table cell."""
    sections = [
        _head(report),
        _judgements(report),
        _ladder(report),
        *(_quality(artifact) for artifact in report.artifacts),
        *(
            _list(f"How {rung.rung} was made smaller", rung_sentences(report, rung))
            for rung in report.rungs
        ),
        _verification(report),
        _speed(report),
        _steps(report),
        _list("Machine", (f"{name}: {value}" for name, value in report.machine.items())),
        _list("What this report does not show", limitations(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def cell(text: str) -> str:
    """Text that stays text inside a table cell or a list: nothing in it is markup."""
    one_line = re.sub(r"\s+", " ", words.visible(text)).strip()
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", escaped)
    escaped = re.sub(r"^([#+=-])", r"\\\1", escaped)
    # GitHub would notify whoever has that name; the comment keeps the two apart.
    return escaped.replace("@", "@<!-- -->")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text, and the others numbers to the right."""
    marks = ["---" if i < text_columns else "---:" for i in range(len(headings))]
    lines = [" | ".join(headings), " | ".join(marks), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _head(report: BuildReport) -> str:
    facts = [
        f"student {cell(report.student)}",
        f"{report.parameters:,} parameters",
        f"context {report.context_tokens:,} tokens",
        f"licence {cell(report.license or 'not stated')}",
    ]
    if report.reference is not None:
        score, cases = words.percent(report.reference.score), report.reference.cases
        facts.append(f"reference {score} right of {cases:,} cases")
    limits = words.floor_limits(report)
    if limits:
        facts.append(f"floor {', '.join(limits)}")
    return f"# {cell(report.recipe)}\n\n{words.outcome(report)}\n\n{' · '.join(facts)}"


def _judgements(report: BuildReport) -> str:
    lines = []
    for judgement in report.judgements:
        answer = f"ship **{cell(judgement.rung)}**" if judgement.rung else "**nothing to ship**"
        mark = "✓" if judgement.rung else "✗"
        lines.append(f"- {mark} {cell(judgement.target)}: {answer} – {cell(judgement.reason)}")
    return "## What to ship\n\n" + "\n".join(lines) if lines else ""


def _ladder(report: BuildReport) -> str:
    rows = []
    for artifact in report.artifacts:
        state, kl = words.standing(report, artifact), words.kl_to_reference(artifact)
        reason = f" – {cell(state.reason)}" if state.reason else ""
        rows.append(
            [
                cell(artifact.rung),
                cell(artifact.format),
                f"{state.mark} {state.label}{reason}",
                words.megabytes(artifact.size_bytes),
                f"{artifact.bits_per_weight:.2f}",
                *_overall(artifact.evaluation),
                "–" if kl is None else words.number(kl),
                *_first_speed(artifact),
            ]
        )
    headings = ["rung", "format", "verdict", "size MB", "bits per weight", "score", "retention"]
    headings += ["KL to reference", "TTFT ms", "decode tok/s"]
    return "## The ladder\n\n" + table(headings, rows, text_columns=3)


def _overall(evaluation: Evaluation | None) -> tuple[str, str]:
    if evaluation is None:
        return "unjudged", "unjudged"
    overall = evaluation.overall
    if not overall.cases:
        return "texts only", "–"
    interval = words.percent_interval(overall.retention_interval)
    of = f" of {evaluation.cases:,} cases" if words.is_sample(evaluation) else ""
    return words.percent(overall.score) + of, f"{words.percent(overall.retention)} ({interval})"


def _first_speed(artifact: ArtifactReport) -> tuple[str, str]:
    bench = artifact.bench
    if bench is None:
        return words.NOT_MEASURED, words.NOT_MEASURED
    note = "" if bench.accepted else " (rejected)"
    length = min(bench.ttft_model_ms)
    ttft = words.milliseconds(bench.ttft_model_ms[length].p50)
    return ttft + note, words.rate(bench.decode_tok_per_s[length].p50) + note


def _quality(artifact: ArtifactReport) -> str:
    evaluation = artifact.evaluation
    if evaluation is None:
        return ""
    title = f"## Quality of {cell(artifact.rung)} in {cell(artifact.format)}: {evaluation.verdict}"
    cases = (
        f"{evaluation.cases:,} of {evaluation.cases_in_suite:,} cases in {cell(evaluation.runtime)}"
    )
    rows = [
        [
            cell(quality.slice),
            f"{quality.cases:,}",
            words.percent(quality.score),
            words.percent(quality.reference_score),
            f"{words.percent(quality.retention)} "
            f"({words.percent_interval(quality.retention_interval)})",
            words.signed(quality.log_score_loss),
            str(quality.broken_cases),
            str(quality.fixed_cases),
        ]
        for quality in evaluation.slices
        if quality.cases
    ]
    headings = ["slice", "cases", "score", "reference", "retention", "log-score loss"]
    headings += ["broken", "fixed"]
    clauses = [
        f"- {words.MARKS[words.VERDICT_TONES[check.verdict]]} {cell(check.slice)}: "
        f"{cell(words.floor_check(check))}"
        for check in evaluation.floor
    ]
    parts = [title, cases, "\n".join(clauses), table(headings, rows), _flips(evaluation)]
    return "\n\n".join(part for part in parts if part)


def _flips(evaluation: Evaluation) -> str:
    if words.is_sample(evaluation):
        return ""  # the judging format shows them
    broken = [flip for flip in evaluation.flips if flip.kind == "broken"]
    rows = [
        [
            cell(flip.id),
            cell(_shortened(flip.prompt)),
            cell(flip.expected),
            cell(flip.reference_answer),
            cell(flip.artifact_answer),
        ]
        for flip in broken[:SHOWN_FLIPS]
    ]
    headings = ["broken", "prompt", "expected", "reference", "artifact"]
    return table(headings, rows, text_columns=5) if rows else ""


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT_CHARACTERS else f"{prompt[:PROMPT_CHARACTERS]} …"


def _verification(report: BuildReport) -> str:
    names = check_names(report)
    if not names:
        return ""
    headings = ["check", *(cell(f"{a.rung}/{a.format}") for a in report.artifacts)]
    rows = [[cell(n), *(_check(a, n) for a in report.artifacts)] for n in names]
    failed = [
        f"- ✗ {cell(f'{a.rung}/{a.format}')}: {cell(check.name)}: {cell(check.detail)}"
        for a in report.artifacts
        for check in (a.verification.checks if a.verification is not None else ())
        if not check.passed
    ]
    parts = ["## Is it the same model?", table(headings, rows), "\n".join(failed)]
    return "\n\n".join(part for part in parts if part)


def _check(artifact: ArtifactReport, name: str) -> str:
    check = find_check(artifact, name)
    if check is None:
        return "–"
    value = "" if check.value is None else f" {words.number(check.value)}"
    limit = words.check_limit(check)
    return f"{'✓' if check.passed else '✗'}{value}{f' ({limit})' if limit else ''}"


def _speed(report: BuildReport) -> str:
    rows = []
    for artifact in report.artifacts:
        bench = artifact.bench
        for length in bench.ttft_model_ms if bench is not None else ():
            assert bench is not None
            rows.append(
                [
                    cell(f"{artifact.rung}/{artifact.format}"),
                    str(length),
                    _pair(bench.ttft_model_ms.get(length)),
                    _pair(bench.ttft_user_ms.get(length)),
                    _pair(bench.prefill_tok_per_s.get(length)),
                    _pair(bench.decode_tok_per_s.get(length)),
                    _pair(bench.ttft_cold_ms),
                    words.megabytes(bench.peak_rss_bytes),
                    words.percent(bench.decode_roofline_share, 0),
                    words.percent(bench.cpu_share, 0),
                ]
            )
    if not rows:
        return ""
    headings = ["p50 / p95", "after tokens", "TTFT ms", "text to text ms", "prefill tok/s"]
    headings += ["decode tok/s", "cold start ms", "peak memory MB", "of roofline", "CPU share"]
    return "## Speed\n\n" + table(headings, rows)


def _pair(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    return f"{words.milliseconds(timing.p50)} / {words.milliseconds(timing.p95)}"


def _steps(report: BuildReport) -> str:
    rows = [
        [
            cell(step.label),
            cell(step.error) if step.error else "cached" if step.cached else "ran",
            words.duration(step.seconds),
            f"{step.peak_own_bytes / 1e9:.2f}",
            f"{step.peak_rss_bytes / 1e9:.2f}",
        ]
        for step in report.steps
    ]
    headings = ["step", "state", "time", "peak GB", "with mapped files GB"]
    limit = report.peak_ram_limit_bytes
    allowed = f" of {limit / 1e9:.1f} GB allowed" if limit else ""
    title = (
        f"## Build\n\n{words.duration(report.seconds)} in all, at most "
        f"{report.peak_own_bytes / 1e9:.2f} GB of memory{allowed}."
    )
    return f"{title}\n\n{table(headings, rows, text_columns=2)}"


def _list(title: str, items: Iterable[str]) -> str:
    lines = [f"- {cell(item)}" for item in items]
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""
