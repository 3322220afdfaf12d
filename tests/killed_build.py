"""A build by the command line, in processes that are killed at any moment and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from edgedistill.manifest import MANIFEST_FILE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
KILLED = "crashed with SIGKILL"

Victims = Literal["all", "parent", "child"]


@dataclass
class KilledBuild:
    """Builds ``recipe.yaml`` of a directory with a cache and exports of its own.

    Attributes:
        directory: with the recipe.
        name: of the cache and the exports.
        kills: how often a process was killed.
        told: what the last process said.
    """

    directory: Path
    name: str
    kills: int = 0
    told: str = ""
    left: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.directory / f"cache-{self.name}"

    @property
    def exports(self) -> Path:
        return self.directory / f"exports-{self.name}"

    def run(self, watch: Callable[[psutil.Process], None] | None = None) -> int:
        """Start it and wait for its end; ``watch`` is called beside it, and may kill."""
        places = ["--cache", str(self.cache), "--exports", str(self.exports)]
        command = [sys.executable, "-m", "edgedistill", "build", "recipe.yaml", *places]
        log = self.directory / f"log-{self.name}"
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=ENVIRONMENT,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if watch is not None:
                watch(psutil.Process(process.pid))
            code = process.wait(timeout=600)
        self.told = log.read_text()
        return code

    def run_and_kill(self, draw: random.Random, victims: Victims, whole_seconds: float) -> int:
        """Start it, kill it at a random moment; the exit code, negative for the parent's death.

        Half of the moments lie anywhere, half behind state that a long step has just saved, if one
        does so in time.
        """

        def watch(parent: psutil.Process) -> None:
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0.0, 0.2 * whole_seconds))
            else:
                self._wait_for_state(parent, 0.2 * whole_seconds)
                time.sleep(draw.uniform(0.0, 0.02 * whole_seconds))
            while victims == "child" and _lives(parent) and not parent.children():
                time.sleep(0.01)
            if _lives(parent):
                self.left += [p.name for p in self.cache.glob("work/*/*")]
                self.kills += _kill(parent, victims)

        return self.run(watch)

    def _wait_for_state(self, parent: psutil.Process, most_seconds: float) -> None:
        begun = time.time()
        while _lives(parent) and time.time() < begun + most_seconds:
            if any(_changed(state) > begun for state in self.cache.glob("work/*/state.*")):
                return
            time.sleep(0.005)

    def written(self) -> dict[str, Any]:
        """All that steps wrote and all that was published, without what was timed."""
        steps: dict[str, Any] = {}
        for marker in self.cache.glob("steps/*/step.json"):
            record = json.loads(marker.read_text())
            if record["task"] != "BenchArtifact":
                steps |= _tree(marker.parent / "out", record["key"])
        published = _tree(self.exports, "")
        for name in [name for name in published if name.rpartition("/")[2].startswith("report.")]:
            del published[name]
        for name in [name for name in published if name.endswith(MANIFEST_FILE)]:
            manifest = json.loads(published[name])
            published[name] = {k: v for k, v in manifest.items() if k != "bench"}
        return steps | published


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # renamed just now
        return 0.0


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _kill(parent: psutil.Process, victims: Victims) -> int:
    """Kill, wait until all that has to be gone is, and say whether there was anything."""
    try:
        children = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    doomed = {"all": [parent, *children], "parent": [parent], "child": children}[victims]
    for process in doomed:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    # Whoever is killed, the children go: nothing may work on where the next build begins.
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    return bool(doomed)


def _tree(root: Path, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}/{p.relative_to(root).as_posix()}": p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != ".lock"
    }
