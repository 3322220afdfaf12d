"""``--executor ray``: steps that do not wait for one another run at the same time, on a cluster.

A step is a function of directories, so a machine that reaches the cache can run it.  What measures
this machine runs here when all else has ended, and what has no inputs (the student is taken in)
runs here too, since its files lie here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.carried_files import send_files
from edgedistill.errors import EdgedistillError, StageError, UnavailableError
from edgedistill.pipeline import Outcome, Pipeline, Say, Step, report_of, say
from edgedistill.ray_cluster import Asked, Cluster, Lost, Ref, joined, need_ray
from edgedistill.ray_worker import Ran
from edgedistill.shared_cache import SharedCache

RETRIES = 2  # of a step whose machine was lost


class RayPipeline(Pipeline):
    """Runs steps as Ray tasks, each in its own process there.

    Args:
        place: of the cache; a directory has to be the same one on all machines.
        tell: says a line to the user.
        asked: the cluster.
        peak_bytes: key -> expected peak memory of the step.

    Attributes:
        nodes: key -> Ray's id of the node that ran the step; of those that were run there.

    Raises:
        UnavailableError: Ray is not installed.
    """

    def __init__(
        self, place: CachePlace, tell: Say = say, *, asked: Asked, peak_bytes: Mapping[str, int]
    ) -> None:
        need_ray()
        super().__init__(open_cache(place), tell)
        self.nodes: dict[str, str] = {}
        self._place = place
        self._asked = asked
        self._peak_bytes = peak_bytes
        self._numbers: dict[str, str] = {}
        self._losses: Counter[str] = Counter()

    def _settle_all(self, ordered: Sequence[tuple[Step, str]]) -> None:
        self._numbers = {step.key: number for step, number in ordered}
        alone = [step for step, _ in ordered if any(s.alone for s in step.lineage())]
        later = {step.key for step in alone}
        waiting = [s for s, _ in ordered if s.key not in later and not self._settled_here(s)]
        if waiting:
            with joined(self._asked) as cluster:
                self._say_where(waiting, cluster)
                self._fan_out(waiting, cluster)
        for step in alone:
            self._outcomes[step.key] = self._settle(step, self._numbers[step.key])

    def _settled_here(self, step: Step) -> bool:
        """Whether the step is finished, or has no inputs and was run."""
        try:
            known = not step.fresh and self.cache.look_up(step.key) is not None
        except UnavailableError:
            known = True  # so that settling says it
        if known or not step.inputs:
            self._outcomes[step.key] = self._settle(step, self._numbers[step.key])
            return True
        return False

    def _say_where(self, waiting: Sequence[Step], cluster: Cluster) -> None:
        machines = "one machine" if cluster.machines == 1 else f"{cluster.machines} machines"
        self._tell(f"Ray: {len(waiting)} steps on {machines} with {cluster.cpus} CPUs")
        threads = max(step.task.threads for step in waiting)
        if threads > cluster.most_cpus:
            self._tell(
                f"warning: no machine has {threads} CPUs, which the recipe's build.threads asks "
                "for; waiting for one"
            )

    def _fan_out(self, waiting: list[Step], cluster: Cluster) -> None:
        running: dict[Ref, Step] = {}
        try:
            while waiting or running:
                waiting = [s for s in waiting if not self._begun(s, running, cluster)]
                if running:
                    ref = cluster.wait(list(running))
                    step = running.pop(ref)
                    if not self._ended(step, ref, cluster):
                        waiting.append(step)
        except BaseException:
            cluster.cancel(list(running))
            raise

    def _begun(self, step: Step, running: dict[Ref, Step], cluster: Cluster) -> bool:
        """Hand the step on, or give it up, once its inputs have settled."""
        if any(source.key not in self._outcomes for source in step.inputs.values()):
            return False
        error = self._failed_input(step)
        if error is not None:
            self._outcomes[step.key] = Outcome(error=error)
            return True
        try:
            cache = self.cache
            carried = send_files(step, cache.store) if isinstance(cache, SharedCache) else {}
        except EdgedistillError as unreachable:
            self._fail(step, unreachable)
            return True
        peak_bytes = self._peak_bytes.get(step.key, 0)
        running[cluster.hand(step, self._place, carried, peak_bytes)] = step
        self._tell(f"{self._numbers[step.key]} {step.label}")
        return True

    def _ended(self, step: Step, ref: Ref, cluster: Cluster) -> bool:
        """Keep how the step ended; False where it has to be handed on again."""
        try:
            ran = cluster.result(ref)
            self._keep(step, ran)
        except Lost as lost:
            self._losses[step.key] += 1
            if self._losses[step.key] <= RETRIES:
                self._tell(f"warning: {step.label}: lost, and begun again: {lost}")
                return False
            self._fail(step, StageError(f"lost {RETRIES + 1} times; the last time: {lost}"))
        except EdgedistillError as error:
            self._fail(step, error)
        return True

    def _keep(self, step: Step, ran: Ran) -> None:
        self.nodes[step.key] = ran.node
        for line in ran.said:
            self._tell(line)
        record = ran.outcome.record
        if record is None:
            raise ran.outcome.error or StageError("it ended without a result")
        if self.cache.look_up(step.key) is None:
            raise StageError(
                f"it finished on {ran.host}, whose cache this machine does not see",
                hint="name one that all reach: --cache s3://bucket/cache, or a shared disk",
            )
        self._outcomes[step.key] = ran.outcome
        took = f"{record.seconds:.1f} s, peak {record.peak_rss_bytes / 1e9:.2f} GB, on {ran.host}"
        self._tell(f"{self._numbers[step.key]} {step.label}: {took}")

    def _fail(self, step: Step, error: EdgedistillError) -> None:
        self._tell(f"{self._numbers[step.key]} {step.label}: failed\nerror: {error}")
        self._outcomes[step.key] = Outcome(error=error, report=report_of(step, error=str(error)))
