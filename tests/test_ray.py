"""Builds on a real Ray cluster of two nodes, each with a cache of its own, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from edgedistill.build import Options, build, prepare
from edgedistill.cache import Cache
from edgedistill.carried_files import receive_files, send_files
from edgedistill.code_version import CodeVersion
from edgedistill.content import ContentHashes, files_below, sha256_file
from edgedistill.errors import InputError, StageError, UnavailableError, UsageError
from edgedistill.pipeline import Pipeline, Step
from edgedistill.preview import estimate_peaks
from edgedistill.ray_cluster import ENVIRONMENT, Asked, gpus_of
from edgedistill.ray_executor import RayPipeline
from edgedistill.shared_cache import SharedCache
from edgedistill.task import Task
from edgedistill.tasks import ARTIFACT, RunStage
from tests.pipeline_tasks import Copy, Fail, Orphan, Write
from tests.recipes import MINIMAL, write_recipe

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[1]
RECIPE = (
    MINIMAL.replace("{{bits: 8}}", "{{bits: 8, group_size: 32}}").replace("[gguf]", "[gguf, onnx]")
    + "build: {{threads: 1}}\n"
)


@dataclass(frozen=True)
class TwoNodes:
    """A cluster.

    Attributes:
        caches: of the machines that its two nodes stand for.
    """

    address: str
    caches: list[Path]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    homes = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    args = [
        {
            "num_cpus": 1,
            "object_store_memory": 80_000_000,
            "env_vars": {"XDG_CACHE_HOME": str(home)},
        }
        for home in homes
    ]
    cluster = Cluster(initialize_head=True, head_node_args={**args[0], "include_dashboard": False})
    cluster.add_node(**args[1])
    try:
        yield TwoNodes(cluster.address, [home / "edgedistill" for home in homes])
    finally:
        cluster.shutdown()


def step(task: Task, label: str = "step", **inputs: Step) -> Step:
    return Step(label, task, inputs, ContentHashes())


def pipeline_on(
    nodes: TwoNodes, place: Path | str, tell: Callable[[str], None] = lambda line: None
) -> RayPipeline:
    return RayPipeline(place, tell, asked=Asked(nodes.address), peak_bytes={})


def lines(witness: Path) -> list[str]:
    return witness.read_text().split() if witness.exists() else []


def written(cache: Cache, steps: list[Step]) -> dict[str, list[tuple[str, str]]]:
    """Label -> path and hash of every file of the step's output."""
    found = {}
    for each in steps:
        record = cache.look_up(each.key)
        assert record is not None, each.label
        found[each.label] = [(file.path, file.sha256) for file in record.files]
    return found


def test_two_rungs_in_two_formats_are_the_same_bytes_from_two_machines(
    nodes: TwoNodes, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny("llama"), RECIPE)
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports")
    prepared = prepare(options)
    steps = [s for s in prepared.steps.ordered() if not s.alone]
    local = Pipeline(Cache(tmp_path / "cache"), lambda line: None)
    assert not [r.error for r in local.run(steps) if r.error]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    url = f"file://{tmp_path}/shared"
    said: list[str] = []
    pipeline = RayPipeline(
        url, said.append, asked=Asked(nodes.address), peak_bytes=estimate_peaks(prepared)
    )
    reports = pipeline.run(steps)
    assert not [r.error for r in reports if r.error]
    assert all(r.peak_rss_bytes > 0 and not r.cached for r in reports)
    assert len(set(pipeline.nodes.values())) == 2, said
    assert set(pipeline.nodes) == {s.key for s in steps if s.inputs}
    assert written(SharedCache(tmp_path / "four", url), steps) == written(
        Cache(tmp_path / "cache"), steps
    )
    assert all(list((cache / "steps").iterdir()) for cache in nodes.caches)

    # Another build, of a machine that has nothing, only times what is there.
    far = replace(options, cache=url, executor="ray", ray_address=nodes.address)
    report, _ = build(far, said.append)
    timed = [f"{a.rung}/{a.format}: bench" for a in prepared.steps.artifacts]
    assert [s.label for s in report.steps if not s.cached] == timed
    for artifact in prepared.steps.artifacts:
        made = local.output(artifact.export)
        assert made is not None
        for file in files_below(made / ARTIFACT):
            published = far.exports / "tiny" / artifact.rung / artifact.format
            path = published / file.relative_to(made / ARTIFACT)
            assert sha256_file(path) == sha256_file(file)


def test_steps_that_do_not_wait_for_one_another_run_at_the_same_time_in_one_directory(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    first = step(Write(text="first"))
    both = [step(Write(text=text, seconds=4.0), text, a=first) for text in "ab"]
    last = step(Write(text="last"), "last", a=both[0], b=both[1])
    pipeline = pipeline_on(nodes, tmp_path / "cache")
    pipeline.run([last])
    assert len({pipeline.nodes[s.key] for s in both}) == 2
    output = pipeline.output(last)
    assert output == Cache(tmp_path / "cache").out(last.key)
    assert (output / "text").read_text() == "firstafirstblast"


def test_a_failed_step_fails_what_depends_on_it_and_nothing_else(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    first = step(Write(text="first"))
    bad, bug = (step(Fail(how=how), how, a=first) for how in ("input", "bug"))
    child = step(Write(text="a"), "child", a=bad)
    good = step(Write(text="b"), "good", a=first)
    pipeline = pipeline_on(nodes, tmp_path)
    reports = pipeline.run([child, bug, good])
    assert {r.label: r.error is None for r in reports} == {
        "step": True,
        "input": False,
        "bug": False,
        "good": True,
    }
    error = pipeline.outcome(child).error
    assert type(error) is InputError
    assert (error.message, error.where, error.hint) == (
        "the value 7 is wrong",
        "file.json: key",
        "make it 8",
    )
    assert "ZeroDivisionError: a bug" in str(pipeline.outcome(bug).error)
    assert pipeline.output(good) is not None


@pytest.mark.parametrize("times", [1, 9])
def test_a_step_whose_machine_is_lost_is_begun_again_but_not_for_ever(
    nodes: TwoNodes, tmp_path: Path, times: int
) -> None:
    first, witness = step(Write(text="first")), tmp_path / "witness"
    lost = step(Orphan(witness=str(witness), times=times), "lost", a=first)
    said: list[str] = []
    pipeline = pipeline_on(nodes, tmp_path / "cache", said.append)
    pipeline.run([lost])
    if times == 1:
        assert pipeline.outcome(lost).error is None
        assert len(lines(witness)) == 2
        assert any("lost: lost, and begun again" in line for line in said)
    else:
        assert "lost 3 times" in str(pipeline.outcome(lost).error)
        assert len(lines(witness)) == 3


def test_a_machine_with_other_code_is_refused(nodes: TwoNodes, tmp_path: Path) -> None:
    last = step(Write(text="a"), a=step(Write(text="first")))
    own = last.code
    vars(last)["code"] = CodeVersion("0" * 64, {**own.libraries, "torch": "1.0"})
    pipeline = pipeline_on(nodes, tmp_path)
    pipeline.run([last])
    error = pipeline.outcome(last).error
    assert type(error) is StageError
    assert "torch None instead of 1.0" in error.message


def test_a_machine_whose_cache_is_not_seen_is_named(nodes: TwoNodes, tmp_path: Path) -> None:
    """What is in the memory of one process is nowhere else."""
    last = step(Write(text="a"), a=step(Write(text="first")))
    pipeline = pipeline_on(nodes, f"memory:/{tmp_path}")
    pipeline.run([last])
    error = pipeline.outcome(last).error
    assert error is not None
    assert "does not see" in error.message
    assert "--cache" in str(error.hint)


def test_files_that_a_step_names_are_carried_to_where_they_do_not_lie(tmp_path: Path) -> None:
    text, adapter = tmp_path / "text.jsonl", tmp_path / "adapter"
    text.write_text('{"text": "what it says"}\n')
    (adapter / "inner").mkdir(parents=True)
    (adapter / "inner" / "file").write_text("adapted")
    first = step(Write(text="first"))
    copied = step(Copy(source=text), a=first)
    merge = RunStage(stage="merge_lora", fields={"adapter": str(adapter)})
    merged = step(merge, a=copied)
    url = f"file://{tmp_path}/shared"
    key, carried = merged.key, send_files(merged, SharedCache(tmp_path / "one", url).store)
    text.unlink()
    (adapter / "inner" / "file").unlink()
    here = SharedCache(tmp_path / "two", url)
    moved = receive_files(merged, carried, here)
    assert moved.key == key
    assert isinstance(moved.task, RunStage)
    assert (Path(moved.task.fields["adapter"]) / "inner" / "file").read_text() == "adapted"
    source = moved.inputs["a"]
    pipeline = Pipeline(here, lambda line: None)
    pipeline.run([source])
    output = pipeline.output(source)
    assert output is not None
    assert (output / "text").read_text() == '{"text": "what it says"}\n'
    (file,) = (tmp_path / "shared" / "files").glob(sha256_file(output / "text"))
    file.write_text("something else")
    with pytest.raises(UnavailableError, match="did not come as it was sent"):
        receive_files(merged, carried, SharedCache(tmp_path / "three", url))


@pytest.mark.parametrize(
    ("fields", "gpus"), [({"device": "gpu", "processes": 4}, 4), ({"processes": 4}, 0), ({}, 0)]
)
def test_a_stage_that_trains_on_gpus_asks_for_one_a_process(
    fields: dict[str, object], gpus: int
) -> None:
    assert gpus_of(step(RunStage(stage="heal", fields={"tokens": 4096, **fields}))) == gpus
    assert gpus_of(step(RunStage(stage="quantize_rtn", fields={"bits": 8}))) == 0
    assert gpus_of(step(Write(text="a"))) == 0


def test_an_interrupt_ends_all_steps_and_the_cluster_and_leaves_nothing_half_written(
    tmp_path: Path,
) -> None:
    cache, witness = tmp_path / "cache", tmp_path / "witness"
    command = [sys.executable, "-m", "tests.pipeline_driver", str(cache), str(witness), "90", "ray"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while lines(witness) != ["one", "two"]:
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("edgedistill.step_process" in " ".join(c.cmdline()) for c in children)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=40)
    finally:
        process.kill()
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left
    assert not list((cache / "scratch").iterdir())
    assert len(list((cache / "steps").iterdir())) == 1


def test_without_ray_the_error_says_what_to_install(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = write_recipe(tmp_path, tiny("llama"), MINIMAL)
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path, executor="ray")
    with pytest.raises(UnavailableError, match="not installed") as caught:
        build(options)
    assert "edgedistill[ray]" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--ray-address"):
        build(replace(options, executor="local", ray_address="here:1"))
    assert not (tmp_path / "cache").exists()


def test_a_cluster_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    last = step(Write(text="a"), a=step(Write(text="first")))
    asked = Asked("127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        RayPipeline(tmp_path, lambda line: None, asked=asked, peak_bytes={}).run([last])
