"""What ``edgedistill init`` finds out: what a model is, what of it fits where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgedistill.device_facts import Device, find_devices
from edgedistill.document import Document
from edgedistill.errors import UsageError
from edgedistill.fit import FitRow, Load, fit_row
from edgedistill.offered_rungs import OfferedRung, able_formats, offer_rungs
from edgedistill.plugins import load_plugin
from edgedistill.student_profile import SeenStudent, StudentProfile, look_at_student

DEFAULT_CONTEXT_TOKENS, LEAST_CONTEXT_TOKENS = 4096, 8


class DeviceFacts(Document):
    """Nominal facts of a device, as of :class:`edgedistill.device_facts.Device`."""

    name: str
    memory: str
    ram_gb: int
    app_ram_mb: int
    bandwidth_gb_per_s: float
    formats: list[str]


class InitReport(Document):
    """What ``edgedistill init`` prints.

    Attributes:
        figures: what those of the rows are.
        rows: every rung in every format that a device runs.
        left_out: rung -> why this student cannot have it.
        refused_formats: format -> why it cannot carry this student.
        recipe: that was written; None where there is none.
    """

    schema_version: Literal[1] = 1
    figures: Literal["arithmetic, nothing was measured"] = "arithmetic, nothing was measured"
    student: StudentProfile
    context_tokens: int
    devices: list[DeviceFacts]
    rows: list[FitRow]
    left_out: dict[str, str]
    refused_formats: dict[str, str]
    warnings: list[str]
    recipe: str | None = None


@dataclass(frozen=True)
class Examined:
    """A report and what a recipe is made from.

    Attributes:
        student: that was looked at.
        devices: that were asked for, or all.
        load: beside the weights.
        formats: that rungs are exported to.
        rungs: that the student can have.
    """

    report: InitReport
    student: SeenStudent
    devices: tuple[Device, ...]
    load: Load
    formats: tuple[str, ...]
    rungs: tuple[OfferedRung, ...]


def examine(source: str, device_names: Sequence[str], context_tokens: int | None) -> Examined:
    """Look at a model and do the arithmetic; headers and configs are read, no tensor.

    Args:
        source: of the model, relative to the working directory.
        device_names: to look at; all that are known where there are none.
        context_tokens: that artifacts will claim; None: 4,096, or the model's own where that is
            less.

    Raises:
        EdgedistillError: as :func:`edgedistill.student_profile.look_at_student`.
        UsageError: a device that is not known, a context that the model does not have.
    """
    devices = find_devices(device_names)
    student = look_at_student(source, Path())
    facts = student.facts
    able, refused = able_formats(facts)
    limits = {name: load_plugin("exporters", name)().context_limit(facts) for name in able}
    most = max((tokens for tokens, _ in limits.values()), default=facts.max_context_tokens)
    context = _context(context_tokens, most)
    for name, (tokens, words) in limits.items():
        if tokens < context:
            able.remove(name)
            refused[name] = f"context_tokens {context} is more than {words}"
    formats = tuple(f for f in able if any(f in device.formats for device in devices))
    if not formats:
        raise UsageError(
            f"no format that runs on {', '.join(d.name for d in devices)} carries this student",
            hint="; ".join(refused.values()),
        )
    rungs, left_out = offer_rungs(facts, formats, context)
    load = Load(facts, context)
    report = InitReport(
        student=student.profile,
        context_tokens=context,
        devices=[_device_facts(device) for device in devices],
        rows=[fit_row(load, rung, name, devices) for rung in rungs for name in formats],
        left_out=left_out,
        refused_formats=refused,
        warnings=list(student.warnings),
    )
    return Examined(report, student, devices, load, formats, tuple(rungs))


def _context(asked: int | None, most: int) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT_TOKENS, most)
    if not LEAST_CONTEXT_TOKENS <= asked <= most:
        raise UsageError(
            f"--context {asked}: this model has room for {LEAST_CONTEXT_TOKENS} to {most} tokens",
            hint="ask for what the app needs: the cache grows with it",
        )
    return asked


def _device_facts(device: Device) -> DeviceFacts:
    return DeviceFacts(
        name=device.name,
        memory=device.memory,
        ram_gb=device.ram_gb,
        app_ram_mb=device.app_ram_mb,
        bandwidth_gb_per_s=device.bandwidth_gb_per_s,
        formats=list(device.formats),
    )
