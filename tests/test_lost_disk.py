"""A disk that fills or goes away in mid build: a clear error, and later the same bytes."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edgedistill.errors import ExitCode
from tests.killed_build import KilledBuild
from tests.recipes import write_recipe
from tests.tiny import write_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = """\
name: killed
student: {student}
context_tokens: 64
calibration: {{tokens: 4096, sequence_tokens: 128}}
rungs:
  int4: [quantize_gptq: {{bits: 4, group_size: 32}}]
export: [gguf]
build: {{threads: 1}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> KilledBuild:
    """A build to which nothing happened."""
    directory = tmp_path_factory.mktemp("disk")
    write_recipe(directory, write_student(directory / "student", "llama"), RECIPE)
    build = KilledBuild(directory, "whole")
    assert build.run() == ExitCode.OK, build.told
    return build


def refused(build: KilledBuild, watch: Callable[[psutil.Process], None] | None = None) -> str:
    """What a build says that fails."""
    assert build.run(watch) == ExitCode.STAGE_FAILED, build.told
    assert "Traceback" not in build.told
    assert "hint: " in build.told
    return build.told


def goes_on(build: KilledBuild, whole: KilledBuild) -> None:
    assert build.run() == ExitCode.OK, build.told
    assert build.written() == whole.written()


def wait_for_work(build: KilledBuild) -> None:
    """Until GPTQ has finished a part."""
    end = time.monotonic() + 120
    while not list(build.cache.glob("work/*/state.json")):
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("limit_bytes", [150_000, 800_000])
def test_files_that_may_not_grow_end_in_a_clear_error(whole: KilledBuild, limit_bytes: int) -> None:
    """A limit on files stands for a full disk, and needs no rights: weights, and hidden states."""
    build = KilledBuild(whole.directory, f"limit-{limit_bytes}")

    def limit(parent: psutil.Process) -> None:
        resource.prlimit(parent.pid, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    told = refused(build, limit)
    assert "the disk is full, or a limit on file sizes is reached" in told
    assert str(build.cache) in told
    assert not list(build.cache.glob("scratch/*"))
    goes_on(build, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a disk of so many kB."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("this container may not mount")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kilobytes", [2000])
def test_a_disk_that_is_full_ends_in_a_clear_error_and_room_in_the_same_bytes(
    whole: KilledBuild, small_disk: Callable[[int], Path], kilobytes: int
) -> None:
    build = KilledBuild(whole.directory, f"full-{kilobytes}")
    disk = small_disk(kilobytes)
    build.cache.symlink_to(disk)
    assert "the disk is full" in refused(build)
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    goes_on(build, whole)
    build.cache.unlink()


def test_a_cache_that_is_moved_away_is_missed_and_gone_on_with_once_it_is_back(
    whole: KilledBuild,
) -> None:
    build = KilledBuild(whole.directory, "moved")
    away = build.cache.with_name("away")

    def move(parent: psutil.Process) -> None:
        wait_for_work(build)
        build.cache.rename(away)

    told = refused(build, move)
    assert str(build.cache) in told
    assert list(away.glob("work/*/state.json"))
    shutil.rmtree(build.cache, ignore_errors=True)
    away.rename(build.cache)
    goes_on(build, whole)


def test_something_in_the_place_of_the_cache_is_named(whole: KilledBuild) -> None:
    build = KilledBuild(whole.directory, "replaced")
    away = build.cache.with_name("replaced-away")

    def replace(parent: psutil.Process) -> None:
        wait_for_work(build)
        build.cache.rename(away)
        build.cache.write_text("in the way")

    assert str(build.cache) in refused(build, replace)
    build.cache.unlink()
    away.rename(build.cache)
    goes_on(build, whole)


def test_exports_that_cannot_be_written_cost_no_step(whole: KilledBuild) -> None:
    build = KilledBuild(whole.directory, "exports")

    def block(parent: psutil.Process) -> None:
        build.exports.write_text("in the way")

    assert str(build.exports) in refused(build, block)
    build.exports.unlink()
    steps = {p: p.stat().st_mtime_ns for p in build.cache.glob("steps/*/step.json")}
    goes_on(build, whole)
    assert steps == {p: p.stat().st_mtime_ns for p in build.cache.glob("steps/*/step.json")}
