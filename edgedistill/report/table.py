"""The build's result on the terminal: rung x format, the rung to ship, the page to open."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgedistill.report import words
from edgedistill.results import ArtifactReport, BuildReport, Judgement

STYLES: dict[words.Tone, str] = {
    "good": "green",
    "bad": "bold red",
    "warn": "yellow",
    "muted": "dim",
}
HEADINGS = (
    "size\nMB",
    "bits/\nweight",
    "score\n%",
    "retention\n% ±95%",
    "KL\nnats",
    "TTFT\nms",
    "tok/s",
)


def render_table(report: BuildReport, page: Path | None = None) -> Group:
    """A table of all artifacts and what follows from it, to be printed by a rich console.

    Args:
        report: of the build.
        page: where the HTML report lies; the last line names it.
    """
    parts: list[RenderableType] = [_heading(report), _artifacts(report)]
    parts += [Text(f"\n{_legend(report)}\n", style="dim")]
    parts += _reasons(report)
    parts += [_failed_step(step.label, step.error) for step in report.steps if step.error]
    parts += [_judgement(report, judgement) for judgement in report.judgements]
    if not report.judgements:
        parts.append(Text(words.outcome(report)))
    if page is not None:
        parts += [Text(""), Text.assemble("report: ", (words.visible(str(page)), "cyan"))]
    return Group(*parts)


def _heading(report: BuildReport) -> Text:
    text = Text.assemble((words.visible(report.recipe), "bold"), ": ")
    if report.reference is None:
        return text.append("no suite, so quality is unjudged")
    score, cases = words.percent(report.reference.score), f"{report.reference.cases:,}"
    text.append(f"reference {score} right of {cases} cases")
    limits = words.floor_limits(report)
    return text.append(f"; floor: {', '.join(limits)}" if limits else "; no floor")


def _artifacts(report: BuildReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="dim")
    table.add_column("rung", no_wrap=True)
    table.add_column("format", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(" verdict", no_wrap=True)
    previous = None
    for artifact in report.artifacts:
        if previous not in (None, artifact.rung):
            table.add_row()
        previous = artifact.rung
        table.add_row(*_row(report, artifact))
    return table


def _row(report: BuildReport, artifact: ArtifactReport) -> list[RenderableType]:
    standing = words.standing(report, artifact)
    kl = words.kl_to_reference(artifact)
    return [
        Text(words.visible(artifact.rung)),
        Text(words.visible(artifact.format)),
        words.megabytes(artifact.size_bytes),
        f"{artifact.bits_per_weight:.2f}",
        *_quality(artifact),
        words.number(kl, 2) if kl is not None else "–",
        *_speed(artifact),
        Text(f" {standing.mark} {standing.label}", style=STYLES[standing.tone]),
    ]


def _quality(artifact: ArtifactReport) -> tuple[str, str]:
    if artifact.evaluation is None:
        return "–", "–"
    overall = artifact.evaluation.overall
    if not overall.cases:
        return "–", "–"
    interval = overall.retention_interval
    half = words.percent((interval.high - interval.low) / 2).rstrip("%")
    retention = f"{words.percent(overall.retention).rstrip('%')} ±{half}"
    mark = "°" if words.is_sample(artifact.evaluation) else ""
    return words.percent(overall.score).rstrip("%") + mark, retention


def _speed(artifact: ArtifactReport) -> tuple[str, str]:
    bench = artifact.bench
    if bench is None:
        return "–", "–"
    mark = "" if bench.accepted else "*"
    shortest = min(bench.ttft_model_ms)
    ttft = words.milliseconds(bench.ttft_model_ms[shortest].p50)
    return ttft + mark, words.rate(bench.decode_tok_per_s[shortest].p50) + mark


def _legend(report: BuildReport) -> str:
    benches = [a.bench for a in report.artifacts if a.bench is not None]
    depth = f" after {min(benches[0].ttft_model_ms)} tokens, p50" if benches else ""
    lines = [f"KL to the reference on the worst text; TTFT and tok/s{depth}; – not measured"]
    samples = {
        f"{a.rung}/{a.format}": a.evaluation.cases
        for a in report.artifacts
        if a.evaluation is not None and words.is_sample(a.evaluation)
    }
    if samples:
        of = words.visible(", ".join(f"{count:,} ({name})" for name, count in samples.items()))
        lines.append(f"° of a sample of cases, {of}: compare its retention instead")
    if any(not bench.accepted for bench in benches):
        lines.append("* the machine was busy or its times varied: do not trust this figure")
    return "\n".join(lines)


def _failed_step(label: str, error: str | None) -> Text:
    text = Text("✗ ", style=STYLES["bad"])
    return text.append(words.visible(f"{label}: {error}"))


def _reasons(report: BuildReport) -> list[RenderableType]:
    """Why artifacts are not shippable, each reason once."""
    artifacts: dict[str, list[str]] = {}
    for artifact in report.artifacts:
        if artifact.why_not:
            name = f"{artifact.rung}/{artifact.format}"
            artifacts.setdefault(words.standing(report, artifact).reason, []).append(name)
    lines: list[RenderableType] = [
        Text.assemble((words.visible(", ".join(names)), "bold"), words.visible(f": {why}"))
        for why, names in artifacts.items()
    ]
    return [*lines, Text("")] if lines else []


def _judgement(report: BuildReport, judgement: Judgement) -> Text:
    target, form, rung = judgement.target, judgement.format, judgement.rung
    name = words.visible(target if target == form else f"{target} ({form})")
    reason = words.visible(judgement.reason)
    if rung is None:
        mark = ("✗ ", STYLES["bad"])
        return Text.assemble(mark, f"{name}: ", ("no rung to ship", "bold"), f" – {reason}")
    sizes = [a.size_bytes for a in report.artifacts if (a.rung, a.format) == (rung, form)]
    size = f", {words.megabytes(sizes[0])} MB" if sizes else ""
    mark, ship = ("✓ ", STYLES["good"]), (words.visible(rung), "bold green")
    return Text.assemble(mark, f"{name}: ship ", ship, f"{size} – {reason}")
