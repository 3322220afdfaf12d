"""How figures and verdicts are written, the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from edgedistill.errors import ExitCode
from edgedistill.results import (
    ArtifactReport,
    BuildReport,
    Check,
    Evaluation,
    FloorCheck,
    Interval,
    Verdict,
)

Tone = Literal["good", "bad", "warn", "muted"]

NOT_MEASURED = "not measured"
SHOWN_CLAUSES = 3
MARKS: dict[Tone, str] = {"good": "✓", "bad": "✗", "warn": "?", "muted": "–"}
VERDICT_TONES: dict[Verdict, Tone] = {
    "pass": "good",
    "fail": "bad",
    "underpowered": "warn",
    "unjudged": "muted",
    "not measured": "muted",
}
OUTCOMES: dict[int, str] = {
    ExitCode.OK: "Every target has a rung to ship.",
    ExitCode.STAGE_FAILED: "A step failed.",
    ExitCode.USAGE: "The recipe or the command cannot be carried out.",
    ExitCode.FLOOR_NOT_MET: "The quality floor is not met.",
    ExitCode.BUDGET_NOT_MET: "A target's budget is not met.",
    ExitCode.VERIFICATION_FAILED: "A verification failed.",
    ExitCode.UNDERPOWERED: "The suite is too small to decide.",
    ExitCode.UNAVAILABLE: "A device or the network was not available.",
}


@dataclass(frozen=True)
class Standing:
    """Where an artifact stands: a few words, their tone, and one sentence why."""

    label: str
    tone: Tone
    reason: str

    @property
    def mark(self) -> str:
        """A sign that tells the tone without colour."""
        return MARKS[self.tone]


SIGNED_CLAUSES = ("max_log_score_loss", "max_bits_per_byte_loss", "unnamed loss in texts")


def standing(report: BuildReport, artifact: ArtifactReport) -> Standing:
    """The gates in their order: verification, floor, budget; then whether a target ships it."""
    targets = ship_targets(report, artifact)
    if artifact.shippable:
        label = "ship" if targets else "passes"
        also = [t for t in targets if t != artifact.format]
        return Standing(label, "good", f"for {', '.join(also)}" if also else "")
    label, tone = _failure(artifact)
    return Standing(label, tone, _missed(artifact) or artifact.why_not or "")


def _missed(artifact: ArtifactReport) -> str:
    """The clauses of the floor that a verified artifact misses, the first few in words."""
    verified = artifact.verification is not None and artifact.verification.passed
    if not verified or artifact.evaluation is None or artifact.evaluation.verdict != "fail":
        return ""
    failed = [check for check in artifact.evaluation.floor if check.verdict == "fail"]
    parts = [
        floor_check(check) if check.slice == "all" else f"{check.slice}: {floor_check(check)}"
        for check in failed[:SHOWN_CLAUSES]
    ]
    if len(failed) > SHOWN_CLAUSES:
        parts.append(f"and {len(failed) - SHOWN_CLAUSES} more")
    return "; ".join(parts)


def ship_targets(report: BuildReport, artifact: ArtifactReport) -> list[str]:
    """The targets that this artifact is the answer for."""
    return [
        judgement.target
        for judgement in report.judgements
        if (judgement.format, judgement.rung) == (artifact.format, artifact.rung)
    ]


def _failure(artifact: ArtifactReport) -> tuple[str, Tone]:
    if artifact.verification is None:
        return "unverified", "warn"
    if not artifact.verification.passed:
        return "not verified", "bad"
    quality = artifact.evaluation.verdict if artifact.evaluation else "unjudged"
    labels: dict[Verdict, str] = {"fail": "below floor", "underpowered": "undecided"}
    if quality in labels:
        return labels[quality], VERDICT_TONES[quality]
    if any(check.verdict == "fail" for check in artifact.budget):
        return "over budget", "bad"
    return ("unjudged", "muted") if quality == "unjudged" else ("not shippable", "bad")


def outcome(report: BuildReport) -> str:
    """The build in a sentence or two."""
    ships = sum(judgement.rung is not None for judgement in report.judgements)
    code = OUTCOMES.get(report.exit_code, f"Exit code {report.exit_code}.")
    if not report.judgements or report.exit_code == ExitCode.OK:
        return code
    return f"{ships} of {len(report.judgements)} targets have a rung to ship. {code}"


def floor_limits(report: BuildReport) -> list[str]:
    """The clauses on all cases, as the evaluations state them."""
    found: dict[str, None] = {}
    for artifact in report.artifacts:
        for check in artifact.evaluation.floor if artifact.evaluation else ():
            if check.slice == "all":
                found[clause_limit(check.clause, check.limit)] = None
    return list(found)


def megabytes(size_bytes: float) -> str:
    """Decimal megabytes: ``79.2``, from 1000 on without a fraction."""
    size_mb = size_bytes / 1e6
    return f"{size_mb:,.0f}" if size_mb >= 999.5 else f"{size_mb:.1f}" if size_mb else "0"


def percent(share: float, digits: int = 1) -> str:
    """``98.3%``."""
    return f"{100 * share:.{digits}f}%" if math.isfinite(share) else number(share)


def percent_interval(interval: Interval) -> str:
    """``97.1–99.4%``."""
    return f"{100 * interval.low:.1f}–{percent(interval.high)}"


def signed_interval(interval: Interval, digits: int = 3) -> str:
    """``−0.002 to +0.011``."""
    return f"{signed(interval.low, digits)} to {signed(interval.high, digits)}"


def signed(value: float, digits: int = 3) -> str:
    """With its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def number(value: float, digits: int = 3) -> str:
    """Significant digits, without zeros at the end; a power of ten outside 0.001 ... 100,000."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(time_ms: float) -> str:
    """``66``, ``1,480``; under ten with one digit after the point."""
    return f"{time_ms:,.0f}" if time_ms >= 9.95 else f"{time_ms:.1f}"


def rate(tok_per_s: float) -> str:
    """Tokens per second, as :func:`milliseconds` has it."""
    return milliseconds(tok_per_s)


def duration(seconds: float) -> str:
    """``0.4 s``, ``21 s``, ``3 min 02 s``, ``1 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def check_limit(check: Check) -> str:
    """``≤ 0.01`` or ``≥ 0.98``: the side is read off the outcome, which knows it."""
    if check.limit is None or check.value is None:
        return ""
    if check.value == check.limit:
        return f"limit {number(check.limit)}"
    below = check.value < check.limit
    return f"{'≤' if below == check.passed else '≥'} {number(check.limit)}"


def clause_limit(clause: str, limit: float) -> str:
    """A clause of the floor with its limit: ``retention ≥ 98.0%``, ``broken ≤ 3.0%``."""
    if clause == "max_log_score_loss":
        return f"log-score loss ≤ {number(limit)} nats"
    if clause == "max_bits_per_byte_loss":
        return f"bits-per-byte loss ≤ {number(limit)}"
    if clause.startswith("max_"):
        return f"{clause.removeprefix('max_')} ≤ {percent(limit)}"
    return f"{clause} ≥ {percent(limit)}"


def floor_check(check: FloorCheck) -> str:
    """One clause as a sentence: what is demanded, what was found, what is lacking to decide."""
    if check.clause in ("protected", "sacrificed", "unnamed loss"):
        text = _score_loss(check)
    elif check.clause == "unnamed loss in texts":
        text = f"{check.clause}: {_clause_value(check)} bits per byte, tolerated +{check.limit:.2f}"
    else:
        text = f"{clause_limit(check.clause, check.limit)}: {_clause_value(check)}"
    if check.cases_needed:
        text += f"; needs {check.cases_needed:,} more cases"
    return f"{text}; {check.note}" if check.note else text


def _score_loss(check: FloorCheck) -> str:
    if check.value is None:
        return f"{check.clause}: no case in the sample"
    text = f"{check.clause}: score {signed(-100 * check.value, 1)} points"
    tolerated = check.clause == "unnamed loss"
    return f"{text}, tolerated −{100 * check.limit:.1f}" if tolerated else text


def _clause_value(check: FloorCheck) -> str:
    if check.value is None or check.interval is None:
        return "no case in the sample"
    if check.clause in SIGNED_CLAUSES:
        return f"{signed(check.value)} ({signed_interval(check.interval)})"
    return f"{percent(check.value)} ({percent_interval(check.interval)})"


def is_sample(evaluation: Evaluation) -> bool:
    """Whether an artifact answered only a part of the suite."""
    return evaluation.cases < evaluation.cases_in_suite


def kl_to_reference(artifact: ArtifactReport) -> float | None:
    """Mean KL to the reference on the worst text, in nats a token."""
    if artifact.verification is None or not artifact.verification.against_reference:
        return None
    return max(text.kl_mean for text in artifact.verification.against_reference)


def visible(text: str) -> str:
    """Text of a model or a user with its control characters shown instead of obeyed.

    Line breaks and tabs stay; escape sequences and direction overrides lose their power.
    """
    return _UNSEEN.sub(lambda match: _escaped(match[0]), text)


# C0 and C1 controls, direction marks, overrides and isolates, lone surrogates.
_UNSEEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
