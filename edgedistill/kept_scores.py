"""Leave a build's scores in the exports, where the next release finds them.

<exports>/<recipe>/evaluation/<rung>/<format>/  scores.jsonl, cases.jsonl, and queue.jsonl with the
                                                cases below the router's threshold
<exports>/<recipe>/evaluation/_reference/       scores.jsonl and the compact baseline
"""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from edgedistill.disk import disk_error
from edgedistill.evaluate.baseline import PREFIX, SUFFIX
from edgedistill.evaluate.previous import CASES_FILE
from edgedistill.evaluate.router import QUEUE_FILE
from edgedistill.evaluate.score import SCORES_FILE
from edgedistill.pipeline import Pipeline, Step
from edgedistill.plan import BuildSteps
from edgedistill.publish import exports_lock, replaced
from edgedistill.release import EVALUATION

REFERENCE = "_reference"  # no rung can have this name


def keep_scores(steps: BuildSteps, pipeline: Pipeline, exports: Path) -> None:
    """Copy scores, cases, queues and the baseline out of the cache; what is there stays as it is.

    Args:
        steps: of the build; those that failed leave nothing, and nothing of theirs is removed.
        pipeline: that ran them.
        exports: the directory of the recipe.

    Raises:
        StageError: the disk is full or not writable; each directory is then as it was.
    """
    with exports_lock(exports):
        if steps.reference_quality is not None:
            scored = pipeline.output(steps.reference_quality.inputs["reference_scores"])
            if scored is not None:
                kept = [scored / SCORES_FILE, *sorted(scored.glob(f"{PREFIX}*{SUFFIX}"))]
                _keep(kept, exports / EVALUATION / REFERENCE)
        for artifact in steps.artifacts:
            scored = _output(pipeline, artifact.score)
            compared = _output(pipeline, artifact.compare)
            if scored is not None and compared is not None:
                kept = [scored / SCORES_FILE, compared / CASES_FILE]
                # Of a sample's queue nobody learns more than of the judge's.
                kept += [compared / QUEUE_FILE] if artifact.judges else []
                _keep(kept, exports / EVALUATION / artifact.rung / artifact.format)


def _output(pipeline: Pipeline, step: Step | None) -> Path | None:
    return pipeline.output(step) if step is not None else None


def _keep(files: list[Path], dst: Path) -> None:
    """Make ``dst`` hold copies of those files that exist, and nothing else."""
    files = [file for file in files if file.is_file()]
    try:
        if _holds(dst, files):
            return
        with replaced(dst) as new:
            for file in files:
                shutil.copyfile(file, new / file.name)
    except OSError as error:
        raise disk_error(error, dst) from error


def _holds(dst: Path, files: list[Path]) -> bool:
    if not dst.is_dir() or {p.name for p in dst.iterdir()} != {f.name for f in files}:
        return False
    return all(filecmp.cmp(file, dst / file.name, shallow=False) for file in files)
