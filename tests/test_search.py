"""A whole search on a tiny student in the real pipeline, and a build of what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from edgedistill.build import Options, build
from edgedistill.cli import app
from edgedistill.errors import ExitCode, UsageError
from edgedistill.search import candidates
from edgedistill.search.ladder import LADDER
from edgedistill.search.results import SearchedCandidate, SearchReport
from edgedistill.search.run import SearchOptions, search_recipe
from tests.recipes import write_recipe, write_suite

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
# Of the log-score, 8 bits lose .10 (.05 to .15) nats and 4 bits .80 (.57 to 1.04).
RECIPE = """\
# Tiny, but a student.
name: tiny
student: {student}
context_tokens: 64
rungs:
  # The same as the ladder's int8 in other words.
  eight: [quantize_rtn: {{bits: 8, embeddings: {{bits: 8}}}}]
targets:
  phone: {{format: gguf, rungs: [eight], budget: {{file_mb: 1}}}}  # an old one
  desk: {{format: onnx}}
suite: suite.jsonl
floor: {{max_log_score_loss: 0.2, when_underpowered: pass}}
build: {{threads: 1}}
"""


@dataclass(frozen=True)
class Searched:
    options: SearchOptions
    report: SearchReport
    said_first: list[str]
    said: list[str]


@pytest.fixture(scope="module")
def short_ladder() -> Iterator[None]:
    """8 and 4 bits by rounding."""
    patch = pytest.MonkeyPatch()
    patch.setattr(candidates, "LADDER", LADDER[:2])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def searched(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, short_ladder: None) -> Searched:
    """A search that was stopped by Ctrl-C when it began with int4, and run again."""
    directory = tmp_path_factory.mktemp("search")
    recipe = write_recipe(directory, tiny("llama"), RECIPE)
    write_suite(directory / "suite.jsonl", 40)
    options = SearchOptions(recipe, directory / "cache")
    first: list[str] = []

    def interrupted(line: str) -> None:
        first.append(line)
        if line.startswith("int4: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_recipe(options, interrupted)
    assert not (directory / "recipe.found.yaml").exists()
    said: list[str] = []
    return Searched(options, search_recipe(options, said.append), first, said)


def test_the_smallest_that_passes_wins(searched: Searched) -> None:
    states = {c.name: c.state for c in searched.report.candidates}
    assert states == {"eight": "wins", "int8": "not tried", "int4": "fails"}
    assert (searched.report.winner, searched.report.exit_code) == ("eight", ExitCode.OK)
    failed = next(c for c in searched.report.candidates if c.name == "int4")
    assert failed.exit_code == ExitCode.FLOOR_NOT_MET
    assert [list(c.size_bytes) for c in searched.report.candidates] == [
        ["gguf", "onnx"],
        [],
        ["gguf"],
    ]
    assert "max_log_score_loss" in failed.reason
    assert failed.slices[0].log_score_loss > 0.2
    assert {s.slice for s in failed.slices} == {"all", "even", "odd"}
    record = searched.options.recipe.with_name("recipe.search.json")
    assert SearchReport.model_validate_json(record.read_text()) == searched.report


def test_a_search_that_was_stopped_goes_on_where_it_was(searched: Searched) -> None:
    done = [line for line in searched.said_first if "eight/gguf: score: " in line]
    assert done
    ran = [line.partition("] ")[2] for line in searched.said if line.startswith("[")]
    assert {label.partition(":")[0] for label in ran} == {
        "int4",
        "int4/gguf",
        "eight/gguf",
        "eight/onnx",
    }
    assert all("bench" in label for label in ran if label.startswith("eight/gguf"))
    # In the other format only the one that would win is run, and last of all.
    first_onnx = next(i for i, label in enumerate(ran) if "onnx" in label)
    assert not [label for label in ran[first_onnx:] if label.startswith("int4")]


def test_a_build_of_the_found_recipe_runs_nothing_and_ships_the_winner(
    searched: Searched, tmp_path: Path
) -> None:
    found = searched.options.recipe.with_name("recipe.found.yaml")
    text = found.read_text()
    assert "# Tiny, but a student.\n" in text
    assert "# an old one\n" in text
    assert text.startswith("# Found by `edgedistill search recipe.yaml` with edgedistill ")
    data = yaml.safe_load(text)
    assert data["rungs"] == {"eight": [{"quantize_rtn": {"bits": 8, "embeddings": {"bits": 8}}}]}
    assert data["targets"]["phone"]["rungs"] == ["eight"]
    options = Options(found, cache=searched.options.cache, exports=tmp_path / "exports")
    report, _ = build(options, lambda line: pytest.fail(line))
    assert all(step.cached and step.error is None for step in report.steps)
    assert [j.rung for j in report.judgements] == ["eight", "eight"]
    assert report.exit_code == ExitCode.OK


def test_the_same_search_again_runs_nothing_and_writes_the_same(searched: Searched) -> None:
    with pytest.raises(UsageError, match="exists already"):
        search_recipe(searched.options)
    found = searched.options.recipe.with_name("recipe.found.yaml")
    before, said = found.read_bytes(), list[str]()
    again = search_recipe(replace(searched.options, overwrite=True), said.append)
    assert not [line for line in said if line.startswith("[")]
    assert found.read_bytes() == before
    assert [measured(c) for c in again.candidates] == [
        measured(c) for c in searched.report.candidates
    ]
    assert not any(c.ran for c in again.candidates)


def measured(candidate: SearchedCandidate) -> SearchedCandidate:
    """Without what depends on the state of the cache."""
    return candidate.model_copy(update={"ran": False, "planned_seconds": 0.0})


def test_if_nothing_passes_the_code_is_that_of_a_build_and_no_recipe_is_written(
    searched: Searched,
) -> None:
    strict = searched.options.recipe.with_name("strict.yaml")
    strict.write_text(searched.options.recipe.read_text().replace("loss: 0.2", "loss: 0.01"))
    arguments = ["search", str(strict), "--cache", str(searched.options.cache), "--json"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == ExitCode.FLOOR_NOT_MET
    found = {c["name"]: c for c in json.loads(ran.stdout)["candidates"]}
    assert found["eight"]["reason"].startswith("floor not met: max_log_score_loss")
    # Other steps, the same bytes: the verdict is known without a run in the runtime.
    assert found["int8"]["reason"].startswith("the same bytes as eight: floor not met")
    assert "int8/gguf: verify" not in ran.stderr
    assert found["int4"]["state"] == "not tried"
    assert not strict.with_name("strict.found.yaml").exists()
    assert strict.with_name("strict.search.json").exists()


def test_a_winner_fits_every_target_and_not_only_one(searched: Searched) -> None:
    """The weights alone would fit the watch, the file does not."""
    won = searched.report.candidates[0]
    limit_mb = (won.planned_bytes["gguf"] + won.size_bytes["gguf"]) / 2e6
    two = searched.options.recipe.with_name("two.yaml")
    watch = f"targets:\n  watch: {{format: gguf, budget: {{file_mb: {limit_mb}}}}}\n"
    two.write_text(searched.options.recipe.read_text().replace("targets:\n", watch))
    report = search_recipe(replace(searched.options, recipe=two), lambda _: None)
    failed = report.candidates[0]
    assert (failed.name, failed.state) == ("eight", "fails")
    assert failed.exit_code == ExitCode.BUDGET_NOT_MET
    assert failed.reason.startswith("watch: over budget: watch: file_mb is ")
    assert report.winner is None
    assert report.exit_code == ExitCode.FLOOR_NOT_MET  # int4 fits


def test_the_table_names_the_winner_and_the_recipe(searched: Searched) -> None:
    arguments = ["search", str(searched.options.recipe), "--cache", str(searched.options.cache)]
    ran = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert ran.exit_code == ExitCode.OK
    assert "the smallest that passes: eight" in ran.stdout
    assert "recipe: recipe.found.yaml" in ran.stdout
    assert "[" not in ran.stderr  # no step was run
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == ExitCode.USAGE
    assert "--overwrite" in refused.stderr
