from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.cache import Cache
from edgedistill.cache_place import find_place, open_cache
from edgedistill.content import ContentHashes
from edgedistill.errors import UnavailableError, UsageError
from edgedistill.pipeline import Pipeline, Step
from edgedistill.shared_cache import SharedCache, Store
from tests.pipeline_tasks import Write


def chain(witness: Path) -> list[Step]:
    hashes = ContentHashes()
    first = Step("first", Write(text="one ", witness=str(witness)), {}, hashes)
    second = Step("second", Write(text="two ", witness=str(witness)), {"a": first}, hashes)
    return [first, second]


def build(cache: Cache, steps: list[Step]) -> tuple[Pipeline, list[str], list[bool]]:
    said: list[str] = []
    pipeline = Pipeline(cache, said.append)
    return pipeline, said, [report.cached for report in pipeline.run(steps)]


def lines(witness: Path) -> list[str]:
    return witness.read_text().split() if witness.exists() else []


def read(pipeline: Pipeline, step: Step) -> str:
    output = pipeline.output(step)
    assert output is not None
    return (output / "text").read_text()


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A shared directory that nobody has made yet."""
    place = tmp_path / "shared" / "cache"
    return f"file://{place}" if request.param == "file" else f"memory:/{place}"


def test_another_machine_runs_nothing_that_is_finished(url: str, tmp_path: Path) -> None:
    steps, witness = chain(tmp_path / "witness"), tmp_path / "witness"
    build(SharedCache(tmp_path / "one", url), steps)
    pipeline, _, cached = build(SharedCache(tmp_path / "two", url), steps)
    assert cached == [True, True]
    assert read(pipeline, steps[1]) == "one two "
    assert lines(witness) == ["one", "two"]


def test_only_what_is_read_is_fetched(url: str, tmp_path: Path) -> None:
    steps = chain(tmp_path / "witness")
    build(SharedCache(tmp_path / "one", url), steps)
    here = SharedCache(tmp_path / "two", url)
    pipeline, _, _ = build(here, steps)
    assert not (tmp_path / "two" / "steps").exists()
    pipeline.output(steps[1])
    assert [here.find(step.key) is not None for step in steps] == [False, True]
    assert not list((tmp_path / "two" / "scratch").iterdir())


def test_what_one_machine_began_another_goes_on_with(url: str, tmp_path: Path) -> None:
    steps, witness = chain(tmp_path / "witness"), tmp_path / "witness"
    build(SharedCache(tmp_path / "one", url), steps[:1])
    pipeline, _, cached = build(SharedCache(tmp_path / "two", url), steps)
    assert cached == [True, False]
    assert read(pipeline, steps[1]) == "one two "
    assert lines(witness) == ["one", "two"]


def test_a_step_of_which_only_this_machine_knows_is_pushed(url: str, tmp_path: Path) -> None:
    steps, witness = chain(tmp_path / "witness"), tmp_path / "witness"
    build(Cache(tmp_path / "one"), steps)
    build(SharedCache(tmp_path / "one", url), steps)
    assert build(SharedCache(tmp_path / "two", url), steps)[2] == [True, True]
    assert lines(witness) == ["one", "two"]


@pytest.mark.parametrize("damage", ["rewrite", "truncate", "delete"])
def test_a_damaged_shared_file_is_noticed_made_again_and_mended(
    tmp_path: Path, damage: str
) -> None:
    shared, steps = tmp_path / "shared", chain(tmp_path / "witness")
    url = f"file://{shared}"
    build(SharedCache(tmp_path / "one", url), steps)
    (record,) = [Cache(tmp_path / "one").find(steps[0].key)]
    assert record is not None
    file = shared / "files" / record.files[0].sha256
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes({"rewrite": b"uno ", "truncate": b"on"}[damage])
    later = Step("third", Write(text="three "), {"a": steps[0]}, ContentHashes())
    pipeline, said, cached = build(SharedCache(tmp_path / "two", url), [later])
    assert cached == [True, False]
    assert read(pipeline, later) == "one three "
    assert [line for line in said if "first: its output is damaged" in line]
    assert lines(tmp_path / "witness") == ["one", "two", "one"]
    assert file.read_bytes() == b"one "
    pipeline, _, _ = build(SharedCache(tmp_path / "three", url), steps[:1])
    assert read(pipeline, steps[0]) == "one "
    assert lines(tmp_path / "witness") == ["one", "two", "one"]


@pytest.mark.parametrize("damage", ["half", "other place"])
def test_a_damaged_marker_is_none(tmp_path: Path, damage: str) -> None:
    shared, steps = tmp_path / "shared", chain(tmp_path / "witness")[:1]
    url = f"file://{shared}"
    build(SharedCache(tmp_path / "one", url), steps)
    marker = shared / "steps" / f"{steps[0].key}.json"
    text = marker.read_text()
    half = text[: len(text) // 2]
    marker.write_text(half if damage == "half" else text.replace('"text"', '"../../text"'))
    pipeline, _, _ = build(SharedCache(tmp_path / "two", url), steps)
    assert read(pipeline, steps[0]) == "one "
    assert lines(tmp_path / "witness") == ["one", "one"]
    assert not (tmp_path / "two" / "scratch" / "text").exists()


def test_a_marker_comes_after_all_files_and_nothing_is_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, steps = tmp_path / "shared", chain(tmp_path / "witness")[:1]
    order: list[tuple[str, int]] = []
    whole: Callable[..., None] = Store._write

    def write(store: Store, name: str, put: Callable[[str], object]) -> None:
        whole(store, name, put)
        order.append(
            (name.rpartition("/")[0].rpartition("/")[2], len(list(shared.rglob("*.part"))))
        )

    monkeypatch.setattr(Store, "_write", write)
    build(SharedCache(tmp_path / "one", f"file://{shared}"), steps)
    assert order == [("files", 0), ("steps", 0)]


def test_what_cannot_be_written_to_is_unavailable_and_the_step_is_kept(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "files").write_text("a file, where a directory should be")
    steps = chain(tmp_path / "witness")[:1]
    cache = SharedCache(tmp_path / "one", f"file://{tmp_path}/shared")
    pipeline, _, _ = build(cache, steps)
    error = pipeline.outcome(steps[0]).error
    assert type(error) is UnavailableError
    assert str(tmp_path) in str(error.where)
    (tmp_path / "shared" / "files").unlink()
    assert build(cache, steps)[2] == [True]
    assert lines(tmp_path / "witness") == ["one"]
    shutil.rmtree(tmp_path / "one")
    assert build(SharedCache(tmp_path / "one", cache.store.url), steps)[2] == [True]


def test_a_place_is_a_url_a_directory_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_place(None) == tmp_path / "edgedistill"
    assert find_place("here") == Path.cwd() / "here"
    assert find_place("s3://bucket/cache") == "s3://bucket/cache"
    shared = open_cache(f"file://{tmp_path}/shared")
    assert isinstance(shared, SharedCache)
    assert shared.root == tmp_path / "edgedistill"
    assert type(open_cache(tmp_path)) is Cache


def test_a_url_that_nothing_opens_is_refused_with_what_would_help() -> None:
    with pytest.raises(UsageError, match="nonsense://x"):
        open_cache("nonsense://x")
    with pytest.raises(UnavailableError) as caught:
        open_cache("oci://bucket/cache")
    assert "ocifs" in caught.value.message
    assert "s3fs" in str(caught.value.hint)
