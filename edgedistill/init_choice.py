"""What of the arithmetic goes into the recipe: rungs, targets with budgets, text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.calibration_lines import CalibrationLine, calibration_lines
from edgedistill.device_facts import Device
from edgedistill.errors import ExitCode, InputError, UsageError
from edgedistill.fit import FitRow
from edgedistill.init_report import Examined

# No tokenizer is opened: few texts have more characters in a token, so this many are there.
MOST_CHARACTERS_PER_TOKEN = 6
SEQUENCE_TOKENS = 512
LEAST_SEQUENCES = 4
# Sequences at most that GPTQ reads, that are held out, and that recovery learns from.
MOST_CALIBRATED, MOST_HELD_OUT, MOST_LEARNED = 32, 8, 64

NEEDS_TEXT = "trains on text of the app: name it with `calibration`, then take the marks away"


class DoesNotFitError(UsageError):
    """Nothing that could be built of the student fits on a device that was asked for."""

    exit_code = ExitCode.BUDGET_NOT_MET


@dataclass(frozen=True)
class ChosenTarget:
    """A format on a device.

    Attributes:
        name: of the target.
        format: of its exporter.
        rungs: that fit there.
        file_mb: what is left for the files, in 10^6 bytes.
        app_ram_mb: that an app may take on the device.
    """

    name: str
    format: str
    rungs: tuple[str, ...]
    file_mb: int
    app_ram_mb: int


@dataclass(frozen=True)
class TextBudget:
    """Tokens of the calibration text, by an estimate from below, in whole sequences."""

    file: Path
    calibrated: int
    held_out: int
    learned: int


@dataclass(frozen=True)
class Choice:
    """What the recipe builds.

    Attributes:
        rungs: that are built.
        aside: rung -> why it stands in the recipe as a comment.
        targets: of the devices that were asked for; empty: the formats alone are named.
        text: to calibrate on; None for the built-in one.
        suites: of cases; empty for none.
    """

    rungs: tuple[str, ...]
    aside: dict[str, str]
    targets: tuple[ChosenTarget, ...]
    text: TextBudget | None
    suites: tuple[Path, ...]


def choose(
    examined: Examined, *, asked_devices: bool, text: Path | None, suites: Sequence[Path]
) -> Choice:
    """Decide what goes into the recipe.

    Args:
        examined: the student.
        asked_devices: whether its devices were named, so that the recipe has their budgets.
        text: to calibrate on.
        suites: to judge on.

    Raises:
        DoesNotFitError: nothing fits on a device that was named.
        InputError: the text or a suite cannot be read, or the text is too short; no rung is left.
    """
    if suites:
        from edgedistill.evaluate.suite import load_suite

        load_suite(suites)
    budget = None if text is None else text_budget(text)
    aside = {r.name: NEEDS_TEXT for r in examined.rungs if r.reads_text and budget is None}
    rungs = [rung.name for rung in examined.rungs if rung.name not in aside]
    if not rungs:
        reasons = [f"{n}: {why}" for n, why in (examined.report.left_out | aside).items()]
        raise InputError("no rung can be built of this model", hint="; ".join(reasons))
    targets: tuple[ChosenTarget, ...] = ()
    if asked_devices:
        targets = tuple(t for d in examined.devices for t in _targets(examined, d, rungs))
        for rung in list(rungs):
            if not any(rung in target.rungs for target in targets):
                rungs.remove(rung)
                aside[rung] = "does not fit"
    return Choice(tuple(rungs), aside, targets, budget, tuple(suites))


def text_budget(file: Path) -> TextBudget:
    """How the text of a file is shared out: GPTQ, what is held out of recovery, and recovery.

    Raises:
        InputError: the file cannot be read, or holds too little.
    """
    if not file.is_file():
        raise InputError("there is no such file", where=str(file))
    characters = sum(map(_characters, calibration_lines(file, SEQUENCE_TOKENS)))
    sequences = characters // MOST_CHARACTERS_PER_TOKEN // SEQUENCE_TOKENS
    if sequences < LEAST_SEQUENCES:
        needed = LEAST_SEQUENCES * SEQUENCE_TOKENS * MOST_CHARACTERS_PER_TOKEN
        raise InputError(
            f"holds {characters:,} characters of text, too few to calibrate and to train on",
            where=str(file),
            hint=f"give {needed:,} or more, or write some with `edgedistill write-text`",
        )
    calibrated = min(MOST_CALIBRATED, max(1, 3 * sequences // 8))
    held_out = min(MOST_HELD_OUT, max(1, sequences // 8))
    learned = min(MOST_LEARNED, sequences - calibrated - held_out)
    return TextBudget(file, *(SEQUENCE_TOKENS * n for n in (calibrated, held_out, learned)))


def _characters(line: CalibrationLine) -> int:
    parts = [line.text, line.rendered, line.answer, *(turn["content"] for turn in line.turns)]
    return sum(len(part) for part in parts if part)


def _targets(examined: Examined, device: Device, rungs: Sequence[str]) -> list[ChosenTarget]:
    """One for each format in which something fits, the first under the device's own name."""
    rows = [row for row in examined.report.rows if device.name in row.on]
    found: list[ChosenTarget] = []
    for name in (f for f in device.formats if f in examined.formats):
        fitting = [r.rung for r in rows if r.format == name and r.on[device.name].fits]
        fitting = [rung for rung in fitting if rung in rungs]
        if fitting:
            left = device.app_ram_mb - examined.load.beside_weights(name) / 1e6
            title = f"{device.name}-{name}" if found else device.name
            found.append(
                ChosenTarget(title, name, tuple(fitting), math.ceil(left), device.app_ram_mb)
            )
    if not found:
        raise _does_not_fit(device, rows, rungs)
    return found


def _does_not_fit(device: Device, rows: Sequence[FitRow], rungs: Sequence[str]) -> DoesNotFitError:
    if not rows:
        return DoesNotFitError(f"no format that runs on {device.name} carries this student")
    least = min((r for r in rows if r.rung in rungs), key=lambda row: row.peak_ram_bytes)
    hint = "a shorter --context, another --device, or a smaller student"
    with_text = [r.rung for r in rows if r.rung not in rungs and r.on[device.name].fits]
    if with_text:
        names = " and ".join(dict.fromkeys(with_text))
        hint = f"{names} would fit, and train on text: give it with --calibration; or {hint}"
    return DoesNotFitError(
        f"nothing fits on {device.name}: the smallest, {least.rung} in {least.format}, takes about "
        f"{least.peak_ram_bytes / 1e6:,.0f} MB, an app may take {device.app_ram_mb:,}",
        hint=hint,
    )
