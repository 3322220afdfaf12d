from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import pytest

from edgedistill.cache import Cache
from edgedistill.content import ContentHashes
from edgedistill.errors import InputError, StageError, UnavailableError
from edgedistill.pipeline import Pipeline, Step
from edgedistill.task import Task
from tests.pipeline_driver import chain
from tests.pipeline_tasks import Copy, Fail, Fill, Hold, Write

ROOT = Path(__file__).parents[1]


def step(task: Task, label: str = "step", **inputs: Step) -> Step:
    return Step(label, task, inputs, ContentHashes())


def quiet(line: str) -> None:
    pass


def run(cache: Path, *steps: Step) -> Pipeline:
    pipeline = Pipeline(Cache(cache), quiet)
    pipeline.run(steps)
    return pipeline


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def driver(cache: Path, witness: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "tests.pipeline_driver",
        str(cache),
        str(witness),
        str(seconds),
    ]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def lines(witness: Path) -> list[str]:
    return witness.read_text().split() if witness.exists() else []


def test_a_step_reads_its_inputs_and_runs_once(tmp_path: Path) -> None:
    first = step(Write(text="a"))
    second = step(Write(text="b"), before=first)
    pipeline = run(tmp_path, second)
    output = pipeline.output(second)
    assert output is not None
    assert (output / "text").read_text() == "ab"
    again = Pipeline(Cache(tmp_path), quiet).run([second])
    assert [report.cached for report in again] == [True, True]


def test_the_key_follows_fields_inputs_and_file_contents_but_not_labels_or_paths(
    tmp_path: Path,
) -> None:
    one, same, other = tmp_path / "one", tmp_path / "same", tmp_path / "other"
    for path, text in ((one, "x"), (same, "x"), (other, "y")):
        path.write_text(text)
    assert step(Copy(source=one)).key == step(Copy(source=same), "another label").key
    assert step(Copy(source=one)).key != step(Copy(source=other)).key
    assert step(Write(text="a")).key != step(Write(text="b")).key
    assert step(Write(text="a")).key != step(Write(text="a", threads=2)).key
    inner = [step(Write(text=t)) for t in "ab"]
    assert step(Write(text="c"), x=inner[0]).key != step(Write(text="c"), x=inner[1]).key
    assert step(Write(text="c"), x=inner[0]).key != step(Write(text="c"), y=inner[0]).key


def test_a_failed_step_fails_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    bad = step(Fail(how="input"), "bad")
    child = step(Write(text="a"), "child", before=bad)
    grandchild = step(Write(text="b"), "grandchild", before=child)
    good = step(Write(text="c"), "good")
    pipeline = Pipeline(Cache(tmp_path), quiet)
    reports = pipeline.run([grandchild, good])
    assert [(r.label, r.error is None) for r in reports] == [("bad", False), ("good", True)]
    assert pipeline.output(grandchild) is None
    assert pipeline.output(good) is not None
    assert not list((tmp_path / "scratch").iterdir())


def test_an_error_keeps_its_class_place_and_hint_on_the_way_out_of_the_process(
    tmp_path: Path,
) -> None:
    bad, away = step(Fail(how="input")), step(Fail(how="unavailable"))
    pipeline = run(tmp_path, bad, away)
    error = pipeline.outcome(bad).error
    assert type(error) is InputError
    assert (error.message, error.where, error.hint) == (
        "the value 7 is wrong",
        "file.json: key",
        "make it 8",
    )
    assert type(pipeline.outcome(away).error) is UnavailableError


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "bug"])
def test_a_crash_is_a_stage_error_with_the_last_words(tmp_path: Path, how: str) -> None:
    bad = step(Fail(how=how))
    error = run(tmp_path, bad).outcome(bad).error
    assert type(error) is StageError
    assert ("ZeroDivisionError: a bug" if how == "bug" else "native code says goodbye") in str(
        error
    )
    assert how == "bug" or how in error.message
    assert Cache(tmp_path).log(bad.key).exists()
    assert ("memory" in str(error)) == (how == "SIGKILL")


def test_peak_memory_is_measured_for_each_step_alone(tmp_path: Path) -> None:
    large, small = step(Hold(size_bytes=400_000_000)), step(Hold(size_bytes=1000))
    pipeline = Pipeline(Cache(tmp_path), quiet)
    peaks = [report.peak_rss_bytes for report in pipeline.run([large, small])]
    assert 400e6 < peaks[0] < 600e6
    assert peaks[1] < 200e6


def test_peak_memory_does_not_start_at_what_the_parent_holds(tmp_path: Path) -> None:
    held = b"x" * 500_000_000
    (report,) = Pipeline(Cache(tmp_path), quiet).run([step(Hold(size_bytes=len(held) // 1000))])
    assert report.peak_rss_bytes < 200e6


@pytest.mark.parametrize("where", ["own", "child"])
def test_a_step_that_holds_more_than_is_allowed_is_stopped_and_the_others_go_on(
    tmp_path: Path, where: Literal["own", "child"]
) -> None:
    large = step(Hold(size_bytes=400_000_000, seconds=60.0, where=where), "large")
    small = step(Hold(size_bytes=1000), "small")
    pipeline = Pipeline(Cache(tmp_path), quiet, peak_ram_bytes=250_000_000)
    started = time.monotonic()
    reports = pipeline.run([large, small])
    assert time.monotonic() - started < 50
    error = pipeline.outcome(large).error
    assert type(error) is StageError
    assert "the recipe allows 0.25 GB" in error.message
    assert "peak_ram_gb" in (error.where or "")
    held_gb = float(error.message.split("held ")[1].split(" GB")[0])
    # A look may fall into the time in which it is filled.
    assert 0.25 < held_gb < 0.5
    assert [report.error is None for report in reports] == [False, True]
    assert not psutil.Process().children(recursive=True)
    assert not list((tmp_path / "scratch").iterdir())


def test_pages_of_mapped_files_are_not_what_a_step_holds(tmp_path: Path) -> None:
    """On a disk: those of a tmpfs are memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:
        mapped = step(Hold(size_bytes=400_000_000, seconds=1.0, where="mapped"))
        pipeline = Pipeline(Cache(Path(disk)), quiet, peak_ram_bytes=250_000_000)
        (report,) = pipeline.run([mapped])
    assert report.error is None
    assert report.peak_rss_bytes > 400e6
    assert 5e6 < report.peak_own_bytes < 150e6


def test_a_changed_file_in_the_cache_is_noticed_and_made_again(tmp_path: Path) -> None:
    once = step(Write(text="a"))
    output = run(tmp_path, once).output(once)
    assert output is not None
    (output / "text").write_text("b")
    assert [r.cached for r in Pipeline(Cache(tmp_path), quiet).run([once])] == [False]
    assert (output / "text").read_text() == "a"


def test_an_output_that_is_taken_away_in_mid_build_is_missed_and_made_again(
    tmp_path: Path,
) -> None:
    first = step(Write(text="a"), "first")
    second = step(Write(text="b"), "second", before=first)

    def take_away(line: str) -> None:
        if line.endswith("second"):
            shutil.rmtree(tmp_path / "steps")

    pipeline = Pipeline(Cache(tmp_path), take_away)
    pipeline.run([second])
    error = pipeline.outcome(second).error
    assert type(error) is StageError
    assert "'first'" in error.message
    assert first.key in (error.where or "")
    output = run(tmp_path, second).output(second)
    assert output is not None
    assert (output / "text").read_text() == "ab"


def test_a_fresh_step_runs_although_the_cache_has_it(tmp_path: Path) -> None:
    task = Write(text="a", witness=str(tmp_path / "witness"))
    run(tmp_path / "cache", step(task))
    run(tmp_path / "cache", Step("again", task, {}, ContentHashes(), fresh=True))
    assert lines(tmp_path / "witness") == ["a", "a"]


@pytest.mark.slow
def test_a_killed_build_resumes_after_its_last_finished_step_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    cache, witness = tmp_path / "cache", tmp_path / "witness"
    first = driver(cache, witness, 1.5)
    wait_for(lambda: lines(witness) == ["one", "two"])
    children = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    wait_for(lambda: not any(child.is_running() for child in children), 10)
    assert list((cache / "scratch").iterdir()), "the kill came too late to leave anything"
    assert driver(cache, witness, 1.5).wait() == 0
    assert lines(witness) == ["one", "two", "two", "three"]
    assert not list((cache / "scratch").iterdir())
    run(tmp_path / "whole", *chain(str(witness), 1.5))
    outputs = [
        {k: v for k, v in tree(root / "steps").items() if not k.endswith("step.json")}
        for root in (cache, tmp_path / "whole")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 3


@pytest.mark.slow
def test_two_builds_at_once_share_one_cache_and_run_each_step_once(tmp_path: Path) -> None:
    cache, witness = tmp_path / "cache", tmp_path / "witness"
    both = [driver(cache, witness, 1.0) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert sorted(lines(witness)) == ["one", "three", "two"]


@pytest.mark.slow
def test_a_second_build_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    cache, witness = tmp_path / "cache", tmp_path / "witness"
    first = driver(cache, witness, 3.0)
    wait_for(lambda: lines(witness) == ["one", "two"])
    second = driver(cache, witness, 3.0)
    time.sleep(1.0)
    first.kill()
    first.wait()
    assert second.wait(timeout=60) == 0
    assert lines(witness) == ["one", "two", "two", "three"]


def test_an_interrupt_ends_the_child_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    cache, witness = tmp_path / "cache", tmp_path / "witness"
    process = driver(cache, witness, 30.0)
    wait_for(lambda: lines(witness) == ["one", "two"])
    children = psutil.Process(process.pid).children()
    assert children
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    wait_for(lambda: not any(child.is_running() for child in children), 5)
    assert not list((cache / "scratch").iterdir())
    assert len(list((cache / "steps").iterdir())) == 1


def test_a_file_size_limit_is_a_clear_error_and_nothing_is_kept(tmp_path: Path) -> None:
    import resource

    full = step(Fill(size_bytes=40_000_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    try:
        error = run(tmp_path, full).outcome(full).error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert type(error) is StageError
    assert "the disk is full" in error.message
    assert error.hint is not None
    assert "--cache" in error.hint
    assert not (tmp_path / "steps").exists()
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_clear_error_and_the_rest_of_the_build_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount")
    try:
        full, small = step(Fill(size_bytes=8_000_000), "full"), step(Write(text="a"), "small")
        pipeline = run(disk, full, small)
        error = pipeline.outcome(full).error
        assert type(error) is StageError
        assert "the disk is full" in error.message
        assert str(disk) in (error.where or "")
        assert pipeline.output(small) is not None
        assert not list((disk / "scratch").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
