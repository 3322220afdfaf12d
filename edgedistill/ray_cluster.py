"""A Ray cluster, as far as a build needs it: join it, hand it a step, hear how that ended."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.bench.machine import usable_cores
from edgedistill.cache_place import CachePlace
from edgedistill.carried_files import Carried
from edgedistill.errors import StageError, UnavailableError
from edgedistill.pipeline import Step
from edgedistill.ray_worker import Ran, run_on_worker
from edgedistill.tasks import RunStage

# Ray's own store holds what tasks return: here a record, never a weight. Its least is 75 MB.
OBJECT_STORE_BYTES = 100_000_000
CANCEL_SECONDS = 10.0  # for children to be ended and scratch directories removed
KNOCK_SECONDS = 10.0
LOCAL = "local"
# Nobody is told of a build; and a worker is no less than any other process, where Ray's default,
# a niceness of 15, all but stops it beside other work.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

Ref = Any  # of ray.ObjectRef, whose package may not be there


class Lost(Exception):  # noqa: N818  it is no error: the step is handed on again
    """The process or the machine that ran a step is gone."""


@dataclass(frozen=True)
class Asked:
    """What a build wants of a cluster.

    Attributes:
        address: of a running cluster; ``local`` starts one on this machine and ends it.
        threads: the most that a step may use.
        memory_bytes: that a step may hold, and that a cluster on this machine may give out; None
            sets no limit and leaves the latter to Ray.
    """

    address: str = LOCAL
    threads: int = 1
    memory_bytes: int | None = None


def need_ray() -> None:
    """Refuse before any work.

    Raises:
        UnavailableError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UnavailableError(
            "the executor ray needs the library ray, which is not installed",
            hint="pip install 'edgedistill[ray]', or leave out --executor ray",
        )


@contextmanager
def joined(asked: Asked) -> Iterator[Cluster]:
    """Be the driver of a job on the cluster; its tasks end with the job.

    Raises:
        UnavailableError: there is no cluster at that address, or none can be started.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        _init(asked)
    try:
        yield Cluster(asked.memory_bytes)
    finally:
        if ours:
            ray.shutdown()


def _init(asked: Asked) -> None:
    import ray

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    fields: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if asked.address == LOCAL:
        fields |= {
            "num_cpus": max(usable_cores(), asked.threads),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_memory": asked.memory_bytes,
        }
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(asked.address)
        ray.init(address=asked.address, **fields)
    except (OSError, RuntimeError, ValueError) as error:
        raise UnavailableError(
            f"no Ray cluster at {asked.address}: {_first_line(error)}",
            hint="start one with `ray start --head`, give its --ray-address, "
            "or leave that out for one on this machine",
        ) from error
    finally:
        if on_main:  # Ray sets one of its own, which exits
            signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """Fail at once where nobody listens: Ray goes on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), KNOCK_SECONDS):
            pass


class Cluster:
    """The cluster that this process has joined; ``step_bytes`` is what a step may hold."""

    def __init__(self, step_bytes: int | None) -> None:
        import ray

        self._task = ray.remote(run_on_worker)
        self._step_bytes = step_bytes
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.machines = len(nodes)
        self.cpus = int(sum(r.get("CPU", 0) for r in nodes))
        self.most_cpus = int(max((r.get("CPU", 0) for r in nodes), default=0))
        self._most_memory_bytes = int(max((r.get("memory", 0) for r in nodes), default=0))

    def hand(
        self, step: Step, place: CachePlace, carried: Mapping[Path, Carried], peak_bytes: int
    ) -> Ref:
        """Have a step run once there is room for it.

        Args:
            step: whose inputs are finished.
            place: of the cache.
            carried: the files that it names.
            peak_bytes: expected; an estimate beyond the largest machine asks for all of that.
        """
        step = _known(step)
        options = {
            "name": step.label,
            "num_cpus": step.task.threads,
            "num_gpus": gpus_of(step),
            "memory": min(peak_bytes, self._most_memory_bytes),
            "max_retries": 0,  # Ray would begin one that ran out of memory for ever
        }
        return self._task.options(**options).remote(step, place, carried, self._step_bytes)

    def wait(self, refs: Sequence[Ref]) -> Ref:
        """One of the tasks that have ended; waits for the first."""
        import ray

        (ended, *_), _ = ray.wait(list(refs), num_returns=1)
        return ended

    def result(self, ref: Ref) -> Ran:
        """How a task ended.

        Raises:
            Lost: it did not, because its worker or its machine is gone.
            StageError: it could not begin, or had to make room.
        """
        import ray
        from ray import exceptions

        try:
            ran: Ran = ray.get(ref)
        except exceptions.OutOfMemoryError as error:
            raise StageError(
                "its machine ran out of memory, and Ray ended it", hint=_last_line(error)
            ) from error
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        ) as error:
            raise Lost(_first_line(error)) from error
        except exceptions.RayError as error:
            raise StageError(
                f"its Ray task failed: {_last_line(error)}",
                hint="install the same versions of Python, Ray and edgedistill on every machine",
            ) from error
        return ran

    def cancel(self, refs: Sequence[Ref]) -> None:
        """End tasks: first as Ctrl-C does, so that they clear up; what is left then, by force."""
        import ray

        for ref in refs:
            ray.cancel(ref)
        if refs:
            _, left = ray.wait(list(refs), num_returns=len(refs), timeout=CANCEL_SECONDS)
            for ref in left:
                ray.cancel(ref, force=True)


def _known(step: Step) -> Step:
    """The step, with key, fields and code version of it and of all before it worked out."""
    for before in step.lineage():
        _ = before.key
    return step


def gpus_of(step: Step) -> int:
    """GPUs that a stage trains on: one a process."""
    from edgedistill.distilling_stage import DistillingStage

    stage = step.task.stage_config() if isinstance(step.task, RunStage) else None
    if isinstance(stage, DistillingStage) and stage.device == "gpu":
        return stage.processes
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
