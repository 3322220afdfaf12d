"""The HTML report: one file that needs no network, escaped throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from edgedistill.report import pictures, words
from edgedistill.report.confidence import reliability_picture, router_picture
from edgedistill.report.divergence import divergence_by_text
from edgedistill.report.smaller import allocation_rows, healing_picture, rung_sentences
from edgedistill.results import (
    ArtifactReport,
    BuildReport,
    Check,
    Flip,
    FloorCheck,
    SliceQuality,
)

if TYPE_CHECKING:
    from jinja2 import Template

WORST_FIRST: tuple[words.Tone, ...] = ("bad", "warn", "muted", "good")
SHOWN_FLIPS = 6
MAX_FLIPS = 300  # in the page; report.json has them all
WIDEST_RETENTION = (0.75, 1.25)
LINT = "lint: facts as in config.json"
MAX_PROMPT_CHARACTERS = 600


def render_page(report: BuildReport) -> str:
    """The report as a self-contained HTML document."""
    return _template().render(
        report=report,
        rungs=[RungView(report, rung) for rung in pictures.rungs(report)],
        check_names=check_names(report),
        find_check=find_check,
        standing=lambda artifact: words.standing(report, artifact),
        limitations=limitations(report),
        outcome=words.outcome(report),
        floor_limits=words.floor_limits(report),
        quality_picture=_picture(pictures.quality_against_size(report)),
        divergence_picture=_picture(divergence_by_text(report)),
        strip=_marked(pictures.strip),
        reliability_picture=_marked(reliability_picture),
        router_picture=_marked(router_picture),
        rung_sentences=lambda rung: rung_sentences(report, rung),
        allocation_rows=allocation_rows,
        healing_picture=_marked(healing_picture),
        find_artifact=lambda rung, form: _find_artifact(report, rung, form),
        tones=words.VERDICT_TONES,
        marks=words.MARKS,
        max_prompt=MAX_PROMPT_CHARACTERS,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        loader=PackageLoader("edgedistill", "report"),
    )
    for name in _FILTERS:
        environment.filters[name] = getattr(words, name)
    return environment.get_template("page.html")


_FILTERS = (
    *("megabytes", "percent", "percent_interval", "number", "milliseconds", "rate", "duration"),
    *("signed", "signed_interval", "check_limit", "floor_check", "kl_to_reference", "is_sample"),
)


def _finalize(value: Any) -> Any:
    """What every expression of the template passes through: control characters are shown."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return words.visible(value)
    return value


def _picture(svg: str | None) -> Markup | None:
    """Our own drawing, whose texts are escaped where they are drawn."""
    return None if svg is None else Markup(words.visible(svg))


def _marked(draw: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *values: Markup(words.visible(draw(*values)))


class RungView:
    """One rung: the artifact that answered most of the suite, and the others beside it."""

    def __init__(self, report: BuildReport, rung: str) -> None:
        self.name = rung
        self.artifacts = [a for a in report.artifacts if a.rung == rung]
        judged = [a for a in self.artifacts if a.evaluation is not None]
        self.judge = max(judged, key=_cases, default=None)
        self.sampled = [a for a in judged if a is not self.judge]
        self._low, self._high = _retention_range(report)

    @property
    def slices(self) -> list[SliceQuality]:
        """Of the artifact that judges; all cases first."""
        return self.judge.evaluation.slices if self.judge and self.judge.evaluation else []

    def floor(self, name: str) -> list[FloorCheck]:
        """The clauses that hold on a slice."""
        evaluation = self.judge.evaluation if self.judge else None
        return [check for check in evaluation.floor if check.slice == name] if evaluation else []

    def whisker(self, quality: SliceQuality) -> Markup:
        """The retention of a slice with its interval and limit, on the scale of the report."""
        checks = self.floor(quality.slice)
        limit = next((c.limit for c in checks if c.clause == "retention"), None)
        values = (quality.retention, quality.retention_interval, self._low, self._high)
        return Markup(pictures.whisker(*values, limit, self.tone(quality)))

    def tone(self, quality: SliceQuality) -> words.Tone:
        """Of the worst clause on the slice; without one, a loss beyond chance is a warning."""
        tones = [words.VERDICT_TONES[check.verdict] for check in self.floor(quality.slice)]
        if tones:
            return min(tones, key=WORST_FIRST.index)
        return "warn" if quality.retention_interval.high < 1.0 else "muted"

    def flips(self, kind: str) -> list[Flip]:
        """Of one kind, broken or fixed."""
        evaluation = self.judge.evaluation if self.judge else None
        return [flip for flip in evaluation.flips if flip.kind == kind] if evaluation else []

    @property
    def shown_flips(self) -> list[Flip]:
        """A few examples, the broken ones first."""
        return [*self.flips("broken")[:SHOWN_FLIPS], *self.flips("fixed")[: SHOWN_FLIPS // 2]]

    @property
    def more_flips(self) -> list[Flip]:
        """The others, up to what a page can carry."""
        shown = {flip.id for flip in self.shown_flips}
        rest = [f for kind in ("broken", "fixed") for f in self.flips(kind) if f.id not in shown]
        return rest[:MAX_FLIPS]


def check_names(report: BuildReport) -> list[str]:
    """The union of all artifacts' checks as they appeared; lint that passed everywhere is one."""
    found = [a.verification.checks for a in report.artifacts if a.verification is not None]
    failed = {check.name for checks in found for check in checks if not check.passed}
    names = dict.fromkeys(check.name for checks in found for check in checks)
    folded = (LINT if n.startswith("lint:") and n not in failed else n for n in names)
    return list(dict.fromkeys(folded))


def find_check(artifact: ArtifactReport, name: str) -> Check | None:
    """An artifact's check of that name, or its passed lint in one."""
    checks = artifact.verification.checks if artifact.verification is not None else []
    if name != LINT:
        return next((check for check in checks if check.name == name), None)
    passed = [c for c in checks if c.name.startswith("lint:") and c.passed]
    found = ", ".join(check.name.removeprefix("lint: ") for check in passed)
    return Check(name=LINT, passed=True, value=float(len(passed)), detail=found) if passed else None


def limitations(report: BuildReport) -> list[str]:
    """What this build does not show, in sentences."""
    found = [
        f"Whatever stands behind the step {step.label}, which failed, is not here."
        for step in report.steps
        if step.error
    ]
    found += [
        f"{name}: {verification.limitation}."
        for name, verification in _verifications(report)
        if verification.limitation
    ]
    if report.reference is None:
        found.append("There is no suite: nothing here says that the model still does its job.")
    for artifact in report.artifacts:
        evaluation, name = artifact.evaluation, f"{artifact.rung}/{artifact.format}"
        if evaluation is not None and words.is_sample(evaluation):
            found.append(
                f"{name} answered a sample of {evaluation.cases:,} of the suite's "
                f"{evaluation.cases_in_suite:,} cases."
            )
        if artifact.bench is not None and not artifact.bench.accepted:
            found.append(f"{name}: its speed is not to be trusted: {artifact.bench.reason}.")
    found += [
        f"{name}: its KL to the reference is over the tokens that it kept; the reference gives up "
        f"to {words.percent(max(removed), 2)} to others."
        for name, verification in _verifications(report)
        if (removed := [m for t in verification.against_reference if (m := t.removed_mass)])
    ]
    silent = [f"{a.rung}/{a.format}" for a in report.artifacts if a.bench is None]
    if silent:
        found.append(f"The speed of {_list(silent)} was not measured.")
    devices = dict.fromkeys(a.bench.device for a in report.artifacts if a.bench is not None)
    if devices:
        found.append(f"All speed was measured on {_list(devices)}, which is not a phone.")
    return list(dict.fromkeys(found))


def _verifications(report: BuildReport) -> list[tuple[str, Any]]:
    return [(a.format, a.verification) for a in report.artifacts if a.verification is not None]


def _list(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def _find_artifact(report: BuildReport, rung: str | None, form: str) -> ArtifactReport | None:
    return next((a for a in report.artifacts if (a.rung, a.format) == (rung, form)), None)


def _cases(artifact: ArtifactReport) -> int:
    return artifact.evaluation.cases if artifact.evaluation is not None else 0


def _retention_range(report: BuildReport) -> tuple[float, float]:
    """One scale for all slices of all rungs, so that they can be compared by eye.

    Intervals of few cases may reach beyond it, or all others would be dots.
    """
    ends = [1.0]
    for name in pictures.rungs(report):
        judged = [a for a in report.artifacts if a.rung == name and a.evaluation is not None]
        judge = max(judged, key=_cases, default=None)
        for quality in judge.evaluation.slices if judge and judge.evaluation else ():
            ends += [quality.retention_interval.low, quality.retention_interval.high]
    low, high = WIDEST_RETENTION
    return max(low, min(ends) - 0.01), min(high, max(ends) + 0.01)
