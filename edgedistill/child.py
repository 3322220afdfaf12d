"""Run one task in a child process: its memory measured, its crashes turned into errors."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import edgedistill
from edgedistill import errors
from edgedistill.cache import FileRecord
from edgedistill.disk import FULL_TEXTS, disk_error, full_disk
from edgedistill.errors import EdgedistillError, StageError
from edgedistill.memory import MAXRSS_UNIT
from edgedistill.memory_watch import INTERVAL_SECONDS, MemoryWatch
from edgedistill.progress import PROGRESS_FD
from edgedistill.task import Task

LOG_TAIL_LINES = 15
LOG_BYTES = 1_000_000
CHUNK_BYTES = 65536
WAKE_SECONDS = 0.5  # an interrupt that comes as no signal (Ray's) waits until Python wakes up
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class ChildResult:
    """What a finished step wrote, and what it cost.

    Attributes:
        peak_rss_bytes: with pages of mapped files, as the kernel keeps count.
        peak_own_bytes: without, as it was seen from time to time.
    """

    files: list[FileRecord]
    seconds: float
    peak_rss_bytes: int
    peak_own_bytes: int


def run_in_child(
    task: Task,
    inputs: Mapping[str, Path],
    scratch: Path,
    *,
    lock: int,
    log: Path,
    peak_ram_bytes: int | None = None,
) -> ChildResult:
    """Run ``task`` with ``scratch/out`` as its destination, and wait for it.

    Args:
        task: what to do.
        inputs: name -> output directory of an earlier step.
        scratch: a directory with an empty ``out`` in it.
        lock: descriptor of the key's lock, which the child holds too: it is not free before both
            are gone.
        log: where the child's output is kept when it crashes.
        peak_ram_bytes: of its own that it may hold; a child that holds more is ended.

    Raises:
        EdgedistillError: the child's own error, or a StageError for a crash or too much memory.
    """
    job = scratch / "job.json"
    try:
        job.write_text(json.dumps(_job(task, inputs, scratch)), encoding="utf-8")
    except OSError as error:
        raise disk_error(error, scratch) from error
    started = time.monotonic()
    ended = _run(task, job, lock, peak_ram_bytes)
    seconds = time.monotonic() - started
    result = json.loads(ended.result) if ended.result else {}
    if ended.code == 0 and "files" in result:
        files = [FileRecord.model_validate(f) for f in result["files"]]
        return ChildResult(files, seconds, result["peak_rss_bytes"], ended.peak_own_bytes)
    raise _failure(ended, result.get("error"), scratch, log)


def _job(task: Task, inputs: Mapping[str, Path], scratch: Path) -> dict[str, object]:
    return {
        "module": type(task).__module__,
        "task": type(task).__name__,
        "fields": task.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "dst": str(scratch / "out"),
        "parent": os.getpid(),
    }


@dataclass(frozen=True)
class _Ended:
    code: int  # of the exit; negative for a signal
    peak_rss_bytes: int  # as the kernel tells a parent, its own share at the fork included
    peak_own_bytes: int
    result: bytes
    output: str


def _run(task: Task, job: Path, lock: int, peak_ram_bytes: int | None) -> _Ended:
    """Start the process and hear it out; whatever ends us ends it.

    Result and output come through pipes, because a full disk is one of the things it may report.
    """
    terminal = os.dup(2)
    result, result_end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgedistill.step_process", str(job), str(result_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(terminal, lock, result_end),
            env=_environment(task.threads, terminal),
            # Ctrl-C reaches us alone; we end the child and everything that it started.
            process_group=0,
        )
        try:
            os.close(result_end)
            watch = MemoryWatch(process.pid, peak_ram_bytes)
            answer, output = _listen(result, process, watch)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    finally:
        os.close(terminal)
        os.close(result)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * MAXRSS_UNIT
    return _Ended(process.returncode, peak, watch.peak_bytes, answer, output)


def _listen(result: int, process: subprocess.Popen[bytes], watch: MemoryWatch) -> tuple[bytes, str]:
    """Read until the child is gone: its result, and the end of what it said."""
    assert process.stdout is not None  # it is a pipe
    answer, said = bytearray(), bytearray()
    with process.stdout as output, selectors.DefaultSelector() as selector:
        os.set_blocking(output.fileno(), False)
        selector.register(result, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while selector.get_map().get(result):
            watch.look()
            for key, _ in selector.select(INTERVAL_SECONDS):
                chunk = os.read(key.fd, CHUNK_BYTES)
                (answer if key.fd == result else said).extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            del said[:-LOG_BYTES]
        # Only the child held the other end of ``result``; its children may hold on to ``output``.
        said.extend(output.read() or b"")
    return bytes(answer), said[-LOG_BYTES:].decode("utf-8", errors="replace")


def _environment(threads: int, terminal: int) -> dict[str, str]:
    root = str(Path(edgedistill.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join([root, *([inherited] if inherited else [])]),
        "PYTHONHASHSEED": "0",
        "PYTHONFAULTHANDLER": "1",  # a native crash then says where Python was
        "HF_HUB_OFFLINE": "1",  # a step is a function of its inputs, never of the network
        "TOKENIZERS_PARALLELISM": "false",
        PROGRESS_FD: str(terminal),
    }


def _failure(ended: _Ended, error: object, scratch: Path, log: Path) -> EdgedistillError:
    if isinstance(error, dict):
        kind = getattr(errors, error["kind"])
        known: EdgedistillError = kind(error["message"], where=error["where"], hint=error["hint"])
        return known
    if any(text in ended.output for text in FULL_TEXTS):
        return full_disk(scratch)
    hint = _keep(ended.output, log)
    if ended.code == -signal.SIGKILL:
        peak_gb = ended.peak_rss_bytes / 1e9
        hint = f"it held {peak_gb:.1f} GB: probably memory ran out; {hint}"
    elif ended.code == -signal.SIGBUS:
        hint = f"a mapped file could not be written: probably the disk is full; {hint}"
    how = "failed unexpectedly"
    if ended.code < 0:
        how = f"crashed with {signal.Signals(-ended.code).name}"
    tail = "\n".join(f"  | {line}" for line in ended.output.splitlines()[-LOG_TAIL_LINES:])
    return StageError(f"{how}; its last words:\n{tail}" if tail else how, hint=hint)


def _keep(output: str, log: Path) -> str:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output, encoding="utf-8")
    except OSError as error:
        return f"what it said could not be kept ({error.strerror})"
    return f"all that it said is in {log}"
