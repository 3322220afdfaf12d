"""One step on a Ray worker: with the cache of its machine, in a process of its own as anywhere."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.carried_files import Carried, receive_files
from edgedistill.errors import EdgedistillError, StageError
from edgedistill.pipeline import Outcome, Pipeline, Step, report_of
from edgedistill.shared_cache import SharedCache


@dataclass(frozen=True)
class Ran:
    """How a step ended on a worker.

    Attributes:
        said: warnings, for the user.
        host: the machine's name; ``node`` is Ray's id of it, 56 hex digits.
    """

    outcome: Outcome
    said: list[str]
    host: str
    node: str


def run_on_worker(
    step: Step,
    place: CachePlace,
    carried: Mapping[Path, Carried],
    peak_ram_bytes: int | None = None,
) -> Ran:
    """Run a step whose inputs are finished; what it wrote is in the cache before this returns.

    Args:
        step: with its key and code version, as the machine that asks knows them.
        place: of the cache, as this machine reaches it.
        carried: files that the tasks name, and that lie in the shared cache.
        peak_ram_bytes: that the step may hold.
    """
    import ray

    said: list[str] = []
    try:
        outcome = _run(step, place, carried, peak_ram_bytes, said)
    except EdgedistillError as error:
        outcome = Outcome(error=error, report=report_of(step, error=str(error)))
    warnings = [line for line in said if line.startswith("warning: ")]
    return Ran(outcome, warnings, socket.gethostname(), ray.get_runtime_context().get_node_id())


def _run(
    step: Step,
    place: CachePlace,
    carried: Mapping[Path, Carried],
    peak_ram_bytes: int | None,
    said: list[str],
) -> Outcome:
    _refuse_other_code(step)
    cache = open_cache(place)
    if isinstance(cache, SharedCache):
        step = receive_files(step, carried, cache)
    pipeline = Pipeline(cache, said.append, peak_ram_bytes=peak_ram_bytes)
    pipeline.run([step])
    return pipeline.outcome(step)


def _refuse_other_code(step: Step) -> None:
    """Bytes under a key are those that its code writes, on any machine."""
    own, asked = step.task.code(), step.code
    if own.sha256 == asked.sha256:
        return
    names = {*own.libraries, *asked.libraries}
    other = [n for n in sorted(names) if own.libraries.get(n) != asked.libraries.get(n)]
    differ = [f"{n} {own.libraries.get(n)} instead of {asked.libraries.get(n)}" for n in other]
    raise StageError(
        f"{socket.gethostname()} has other code: {', '.join(differ) or 'of edgedistill or Python'}",
        hint="install the same versions on every machine of the cluster",
    )
