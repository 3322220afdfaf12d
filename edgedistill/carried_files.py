"""The files that a task names, carried to a machine on which they do not lie.

They travel through the shared cache, under the hashes of their bytes, and are put down under their
own names: what a task makes of a file may depend on its name's ending, never on its directory.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgedistill.content import files_below, map_paths, sha256_json
from edgedistill.errors import UnavailableError
from edgedistill.pipeline import Step
from edgedistill.shared_cache import SharedCache, Store
from edgedistill.task import Task
from edgedistill.tasks import RunStage


@dataclass(frozen=True)
class Carried:
    """A file, or the files of a directory, in a store.

    Attributes:
        name: the last part of its path.
        files: path below it -> sha256; a single file's path is empty.
    """

    name: str
    files: Mapping[str, str]


def send_files(step: Step, store: Store) -> dict[Path, Carried]:
    """Put into the store what the step and those before it read, but for the student itself.

    A step without inputs runs where its files are.

    Raises:
        UnavailableError: the store cannot be reached.
    """
    sent: dict[Path, Carried] = {}

    def send(path: Path) -> Path:
        if path not in sent:
            files = files_below(path) if path.is_dir() else [path]
            hashes = {f: step.hashes.of(f) for f in files}
            for file, sha256 in hashes.items():
                store.put(file, sha256)
            names = {f.relative_to(path).as_posix() if f != path else "": hashes[f] for f in files}
            sent[path] = Carried(path.name, names)
        return path

    for before in step.lineage():
        if before.inputs:
            with_paths(before.task, send)
    return sent


def receive_files(step: Step, carried: Mapping[Path, Carried], cache: SharedCache) -> Step:
    """The same step, reading those files from this machine's disk; its key stays.

    Raises:
        UnavailableError: the store cannot be reached, or a file in it is missing or damaged.
    """
    here = {path: _receive(found, cache) for path, found in carried.items()}

    def move(step: Step) -> Step:
        task = (
            with_paths(step.task, lambda path: here.get(path, path)) if step.inputs else step.task
        )
        moved = replace(step, task=task, inputs={n: move(s) for n, s in step.inputs.items()})
        # What is known of it, so that nothing is hashed again.
        vars(moved).update(key=step.key, fields=step.fields, code=step.code)
        return moved

    return move(step)


def with_paths(task: Task, change: Callable[[Path], Path]) -> Task:
    """A copy of the task with every path in it changed."""
    if isinstance(task, RunStage):  # it holds its stage's fields as JSON
        stage = map_paths(task.stage_config(), change)
        fields = stage.model_dump(mode="json", exclude_unset=True)
        return task.model_copy(update={"fields": fields})
    changed: Task = map_paths(task, change)
    return changed


def _receive(carried: Carried, cache: SharedCache) -> Path:
    directory = cache.root / "inputs" / sha256_json([carried.name, dict(carried.files)])
    if not directory.exists():
        aside = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
        for name, sha256 in carried.files.items():
            if not cache.store.get(sha256, aside / carried.name / name):
                raise UnavailableError(
                    f"{carried.name} did not come as it was sent",
                    where=f"{cache.store.url}/files/{sha256}",
                    hint="remove that file, and build again",
                )
        try:
            aside.rename(directory)
        except OSError:  # another step's worker was faster
            shutil.rmtree(aside)
    return directory / carried.name
