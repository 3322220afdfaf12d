"""Start the processes that train together, and end together: the first is the one that asks.

``accelerate`` finds the devices and joins the processes (NCCL between GPUs, gloo on CPUs).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from edgedistill.errors import UnavailableError
from edgedistill.parent_death import die_with
from edgedistill.team import Team

Device = Literal["cpu", "gpu"]
Work = Callable[[Team], None]

# How long the first process may take to find out by itself that another one is gone.
GRACE_SECONDS = 30.0


def run_in_team(work: Work, device: Device, size: int) -> None:
    """Run ``work`` in this process and ``size - 1`` others, each on a device of its own.

    Args:
        work: what each does with its place in the team; it is pickled.
        device: ``gpu`` for what accelerate finds, one for each process.
        size: how many processes.

    Raises:
        UnavailableError: there are fewer GPUs.
        RuntimeError: another process ended before its time; what it said is on stderr.
    """
    if device == "gpu":
        _refuse_few_gpus(size)
    if size == 1:
        work(Team(device=_join(device)))
        return
    with TemporaryDirectory() as directory:
        store = Path(directory) / "members"
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(
                target=_be_member, args=(work, device, rank, size, store, os.getpid()), daemon=True
            )
            for rank in range(1, size)
        ]
        for other in others:
            other.start()
        done = threading.Event()
        threading.Thread(target=_watch, args=(others, done), daemon=True).start()
        try:
            _take_part(work, device, 0, size, store)
        finally:
            done.set()
            for other in others:
                other.join(timeout=GRACE_SECONDS)


def _be_member(work: Work, device: Device, rank: int, size: int, store: Path, parent: int) -> None:
    die_with(parent)
    _take_part(work, device, rank, size, store)


def _take_part(work: Work, device: Device, rank: int, size: int, store: Path) -> None:
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(max(1, threads // size))
    # They are all on this machine; by default gloo goes by what the host's name stands for.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    sizes = {"world_size": size, "local_world_size": size}
    with patch_environment(rank=rank, local_rank=rank, **sizes, gloo_socket_ifname=loopback):
        try:
            found = _join(device, init_method=f"file://{store}", rank=rank, world_size=size)
            work(Team(rank, size, found))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            PartialState._reset_state()  # it would take the next team for this one
            torch.set_num_threads(threads)


def _join(device: Device, **group: str | int) -> torch.device:
    """Become a member, if there is a group; the device of this process."""
    if device == "cpu" and not group:
        return torch.device("cpu")
    from accelerate import PartialState
    from accelerate.utils import check_cuda_p2p_ib_support

    if device == "gpu" and not check_cuda_p2p_ib_support():
        # Some consumer GPUs cannot read each other's memory; accelerate refuses them otherwise.
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    found: torch.device = PartialState(cpu=device == "cpu", **group).device
    return found


def _refuse_few_gpus(size: int) -> None:
    count = torch.accelerator.device_count()
    if count < size:
        raise UnavailableError(
            f"{size} GPU{'s are' if size > 1 else ' is'} asked for, and torch finds {count} here",
            hint="state `device: cpu`, or fewer `processes`; or install torch for your GPU",
        )


def _watch(others: Sequence[SpawnProcess], done: threading.Event) -> None:
    """End this process, too, when another one failed and nothing else tells it."""
    running = list(others)
    while running:
        wait([other.sentinel for other in running])
        for other in [other for other in running if not other.is_alive()]:
            running.remove(other)
            if other.exitcode:
                sys.stderr.write(f"a process that trained along ended with {other.exitcode}\n")
                sys.stderr.flush()
                if not done.wait(GRACE_SECONDS):
                    os._exit(1)
