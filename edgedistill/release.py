"""Find the scores of the previous release, which ``kept_scores.py`` left in its exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgedistill.errors import InputError
from edgedistill.evaluate.score import SCORES_FILE
from edgedistill.manifest import MANIFEST_FILE

EVALUATION = "evaluation"
REPORT_FILE = "report.json"
HINT = "give a kept copy of exports/<recipe> of the last release, or of one artifact in it"


@dataclass(frozen=True)
class Released:
    """The scores of an artifact of the previous release, ``name`` its rung and format."""

    name: str
    scores: Path


def find_released(previous: Path, rung: str, format_name: str) -> Released | None:
    """What an artifact of this build is compared with.

    Args:
        previous: the exports of a recipe, or one artifact's directory in them, which then stands
            for the whole release.
        rung: of the new artifact; ``format_name`` likewise.

    Returns:
        The artifact that the previous release shipped in this format, of several the one with the
        same rung; or else, if nothing was shipped, the same rung.  None if it had none of these.

    Raises:
        InputError: there are no scores of a release.
    """
    if (previous / MANIFEST_FILE).is_file():
        artifact = previous.resolve()
        found = _scores(artifact.parents[1], artifact.parent.name, artifact.name)
        if found is None:
            raise InputError("no scores are kept beside it", where=str(previous), hint=HINT)
        return found
    if not (previous / EVALUATION).is_dir():
        raise InputError(f"holds no {EVALUATION}/", where=str(previous), hint=HINT)
    shipped = list(_shipped(previous / REPORT_FILE, format_name))
    shipped.sort(key=lambda name: name != rung)
    candidates = (_scores(previous, name, format_name) for name in shipped or [rung])
    return next((found for found in candidates if found is not None), None)


def _scores(exports: Path, rung: str, format_name: str) -> Released | None:
    directory = exports / EVALUATION / rung / format_name
    if not (directory / SCORES_FILE).is_file():
        return None
    return Released(f"{rung}/{format_name}", directory)


def _shipped(report: Path, format_name: str) -> Iterator[str]:
    """The rungs that a report names for a format; other versions may have written it."""
    try:
        judgements = json.loads(report.read_text(encoding="utf-8"))["judgements"]
        for entry in judgements:
            rung = entry["rung"]
            if entry["format"] == format_name and isinstance(rung, str) and Path(rung).name == rung:
                yield rung
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot be read as a report ({error})", where=str(report)) from error
