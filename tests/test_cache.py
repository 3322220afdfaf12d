from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from edgedistill.cache import Cache, StepRecord, record_files

KEY = "0" * 64


def commit(cache: Cache, text: str = "text") -> None:
    with cache.lock(KEY, lambda: None), cache.scratch(KEY) as scratch:
        (scratch / "out" / "inner").mkdir()
        (scratch / "out" / "inner" / "file").write_text(text)
        (scratch / "job.json").write_text("{}")
        record = StepRecord(
            key=KEY,
            label="step",
            task="Task",
            fields={"a": 1},
            code="c",
            libraries={},
            inputs={},
            seconds=1.0,
            peak_rss_bytes=1,
            files=record_files(scratch / "out"),
        )
        cache.commit(scratch, record)


def test_what_is_committed_is_found_and_holds_the_outputs_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.find(KEY) is None
    commit(cache)
    record = cache.find(KEY)
    assert record is not None
    assert [(f.path, f.size_bytes) for f in record.files] == [("inner/file", 4)]
    assert sorted(p.name for p in (tmp_path / "steps" / KEY).iterdir()) == ["out", "step.json"]
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("damage", ["delete", "truncate", "rewrite", "marker", "half marker"])
def test_a_damaged_entry_is_none(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    commit(cache)
    file, marker = cache.out(KEY) / "inner" / "file", tmp_path / "steps" / KEY / "step.json"
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_text("te")
    elif damage == "rewrite":
        time.sleep(0.02)
        file.write_text("tixt")
    elif damage == "marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text()[:50])
    assert cache.find(KEY) is None
    commit(cache, "new")
    assert cache.find(KEY) is not None
    assert file.read_text() == "new"


def test_scratch_is_removed_when_work_fails(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail() -> None:
        with cache.scratch(KEY) as scratch:
            (scratch / "out" / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list((tmp_path / "scratch").iterdir())
    assert cache.find(KEY) is None


def test_sweeping_spares_a_step_at_work_and_removes_what_a_dead_build_left(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.lock(KEY, lambda: None), cache.scratch(KEY) as scratch:
        cache.sweep()
        assert scratch.exists()
    left = tmp_path / "scratch" / KEY
    (left / "out").mkdir(parents=True)
    cache.sweep()
    assert not left.exists()


def test_a_second_holder_waits_and_is_told_so(tmp_path: Path) -> None:
    cache, told = Cache(tmp_path), threading.Event()
    order = []

    def second() -> None:
        with cache.lock(KEY, told.set):
            order.append("second")

    with cache.lock(KEY, lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_what_a_step_can_go_on_from_outlives_it_for_two_weeks(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in ("new", "old", "busy"):
        with cache.lock(key, lambda: None), cache.scratch(key):
            (cache.work(key) / "state").write_text(key)
    weeks_ago = time.time() - 15 * 24 * 3600
    for key in ("old", "busy"):
        os.utime(cache.work(key), (weeks_ago, weeks_ago))
    with cache.lock("busy", lambda: None):
        cache.sweep()
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"new", "busy"}
    assert (cache.work("new") / "state").read_text() == "new"
    cache.end_work("new")
    assert not (tmp_path / "work" / "new").exists()


def test_what_a_step_went_on_from_goes_when_a_kill_came_between_its_end_and_the_removal(
    tmp_path: Path,
) -> None:
    cache = Cache(tmp_path)
    (cache.work(KEY) / "state").write_text("state")
    commit(cache)
    cache.sweep()
    assert not list((tmp_path / "work").iterdir())
    assert cache.find(KEY) is not None
