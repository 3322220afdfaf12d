"""The process that a step runs in: ``python -m edgedistill.step_process JOB.json FD``.

A process of its own gives each step its own peak memory, its own thread settings, and a crash of
native code that is an error message instead of the end of the build.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from edgedistill.cache import record_files
from edgedistill.disk import FULL_TEXTS, disk_error, full_disk
from edgedistill.errors import EdgedistillError, StageError
from edgedistill.memory import peak_rss_bytes
from edgedistill.parent_death import die_with
from edgedistill.task import Task


def main(job_path: Path, result_end: int) -> int:
    """Run the task that the job file names and write the result, as JSON, to a pipe.

    The result holds ``files`` (what the step wrote) and ``peak_rss_bytes``, or ``error`` ({kind,
    message, where, hint}).  Any other exception leaves its traceback on stderr, the end of which
    the parent keeps.
    """
    job = json.loads(job_path.read_text(encoding="utf-8"))
    die_with(job["parent"])
    dst = Path(job["dst"])
    try:
        _load_task(job).run({name: Path(p) for name, p in job["inputs"].items()}, dst)
        files = [f.model_dump() for f in record_files(dst)]
        result: dict[str, Any] = {"files": files, "peak_rss_bytes": peak_rss_bytes()}
    except EdgedistillError as error:
        traceback.print_exc()
        result = {"error": _as_json(error)}
    except MemoryError:
        traceback.print_exc()
        result = {"error": _as_json(StageError("ran out of memory"))}
    except (OSError, RuntimeError) as error:
        traceback.print_exc()
        result = {"error": _as_json(_explain(error, dst))}
    with os.fdopen(result_end, "w", encoding="utf-8") as pipe:
        json.dump(result, pipe)
    return 1 if "error" in result else 0


def _load_task(job: dict[str, Any]) -> Task:
    cls = getattr(importlib.import_module(job["module"]), job["task"])
    task: Task = cls.model_validate(job["fields"])
    return task


def _explain(error: OSError | RuntimeError, dst: Path) -> EdgedistillError:
    if any(text in str(error) for text in FULL_TEXTS):
        return full_disk(dst)
    if isinstance(error, OSError):
        return disk_error(error, dst)
    raise error


def _as_json(error: EdgedistillError) -> dict[str, str | None]:
    kind = type(error).__name__
    return {"kind": kind, "message": error.message, "where": error.where, "hint": error.hint}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
