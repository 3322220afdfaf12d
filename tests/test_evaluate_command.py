from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill.artifact_source import find_artifact
from edgedistill.cli import app
from edgedistill.errors import InputError, UsageError
from edgedistill.evaluate.command import Request, _plan, evaluate_artifact
from edgedistill.evaluate.criteria import read_criteria
from edgedistill.evaluate.table import render_evaluation
from edgedistill.evaluate.waivers import Waiver, append_waiver, utc_today
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plan import plan_build
from edgedistill.plugins import load_plugin
from edgedistill.recipe_load import load_recipe
from edgedistill.results import Evaluation
from edgedistill.student import Student
from tests.recipes import MINIMAL, write_recipe, write_suite
from tests.tiny import write_student

Tiny = Callable[..., Path]


def export(student: Path, dst: Path, name: str = "gguf") -> Path:
    dst.mkdir(parents=True)
    load_plugin("exporters", name)().export(Student(student), dst, context_tokens=64)
    return dst


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gguf(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file alone, under a name of its own."""
    directory = export(tiny(), tmp_path_factory.mktemp("gguf") / "made")
    return (directory / "model.gguf").rename(directory / "theirs.gguf")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Cases of all kinds."""
    path = write_suite(tmp_path / "suite.jsonl", 24)
    asked = {
        "id": "asked",
        "kind": "generate",
        "messages": [{"role": "user", "content": "The quick"}],
        "regex": ".",
        "max_tokens": 4,
        "slices": ["words"],
    }
    read = {"id": "read", "kind": "text", "text": "The quick brown fox", "slices": ["texts"]}
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(case) + "\n" for case in (asked, read)))
    return path


def request(artifact: Path, student: Path, suite: Path, cache: Path, **fields: Any) -> Request:
    return Request(artifact, (suite,), str(student), cache, threads=1, **fields)


def test_a_gguf_of_the_reference_itself_is_unharmed_and_found_again(
    tiny: Tiny, gguf: Path, suite: Path, cache: Path
) -> None:
    said: list[str] = []
    asked = request(gguf, tiny(), suite, cache)
    first = evaluate_artifact(asked, said.append)
    assert first.evaluation is not None
    assert (first.code, first.evaluation.verdict) == (0, "unjudged")
    assert (first.evaluation.cases, first.evaluation.runtime) == (26, "llama_cpp")
    assert first.evaluation.overall.score == first.evaluation.overall.reference_score
    assert abs(first.evaluation.overall.bits_per_byte_loss or 1.0) < 0.05
    assert [found.slice for found in first.evaluation.slices] == [
        "all",
        "even",
        "odd",
        "texts",
        "words",
    ]
    assert any("reference: score" in line for line in said)
    said.clear()
    again = evaluate_artifact(asked, said.append).evaluation
    assert again is not None
    assert again.model_dump_json() == first.evaluation.model_dump_json()
    assert said == []


def test_another_model_is_told_from_the_reference(
    tiny: Tiny, suite: Path, cache: Path, tmp_path: Path
) -> None:
    other = export(write_student(tmp_path / "other", seed=5), tmp_path / "other-gguf")
    outcome = evaluate_artifact(request(other, tiny(), suite, cache))
    assert outcome.evaluation is not None
    overall = outcome.evaluation.overall
    assert abs(overall.log_score_loss) > 0.1
    assert abs(overall.bits_per_byte_loss or 0.0) > 0.1


def test_the_reference_is_scored_as_in_a_build(
    tiny: Tiny, gguf: Path, suite: Path, cache: Path, tmp_path: Path
) -> None:
    text = MINIMAL + f"suite: {suite}\nbuild: {{{{threads: 1}}}}\nchat: {{{{system: Be brief.}}}}\n"
    recipe = write_recipe(tmp_path, tiny(), text)
    loaded = load_recipe(recipe)
    steps = plan_build(loaded.recipe, *loaded.fetched()[:1], machine="m")
    assert steps.reference_quality is not None
    asked = request(gguf, tiny(), suite, cache, floor=str(recipe))
    judged = _plan(asked, read_criteria(str(recipe)), find_artifact(gguf))
    built = steps.reference_quality.inputs["reference_scores"]
    assert judged.inputs["reference_scores"].key == built.key


@pytest.mark.parametrize(
    ("floor", "verdict", "code"),
    [
        ('{"score": 0.01}', "pass", 0),
        ('{"max_log_score_loss": 0.0, "when_underpowered": "pass"}', "pass", 0),
        ('{"retention": 0.999}', "underpowered", 6),
    ],
)
def test_the_verdict_is_the_exit_code(
    tiny: Tiny, gguf: Path, suite: Path, cache: Path, floor: str, verdict: str, code: int
) -> None:
    outcome = evaluate_artifact(request(gguf, tiny(), suite, cache, floor=floor))
    assert outcome.evaluation is not None
    assert (outcome.evaluation.verdict, outcome.code) == (verdict, code)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_or_json(
    tiny: Tiny, suite: Path, cache: Path, tmp_path: Path
) -> None:
    other = export(write_student(tmp_path / "other", seed=5), tmp_path / "other-gguf")
    (tmp_path / "recipe.yaml").write_text(
        "name: x\nfloor: {score: 0.99, max_bits_per_byte_loss: 9}\n"
        "slices: {odd: {max_log_score_loss: 0.0001}}\n"
    )
    arguments = [str(other), "--suite", str(suite), "--reference", str(tiny())]
    arguments += ["--cache", str(cache), "--threads", "1"]
    arguments += ["--floor", str(tmp_path / "recipe.yaml")]
    code, out, _ = run(*arguments)
    assert code == 3
    assert "floor is not met" in out
    for expected in (
        "texts",
        "bits/byte",
        "odd: log-score loss ≤ 1e-4",
        "one text decides nothing",
    ):
        assert expected in out
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (3, "")
    evaluation = Evaluation.model_validate_json(out)
    assert evaluation.verdict == "fail"
    code, out, _ = run(*arguments, "--json", "--sample", "7")
    assert Evaluation.model_validate_json(out).cases == 7


def test_what_was_consented_to_passes_for_the_artifact_that_it_is_about(
    tiny: Tiny, gguf: Path, suite: Path, cache: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text("name: theirs\nfloor: {score: 1.0}\n")
    artifact = tmp_path / "int4"
    artifact.mkdir()
    shutil.copyfile(gguf, artifact / "model.gguf")
    (artifact / "manifest.json").write_text('{"recipe": "theirs", "rung": "int4"}')
    asked = request(artifact, tiny(), suite, cache, floor=str(recipe))
    failed = evaluate_artifact(asked).evaluation
    assert failed is not None
    assert failed.verdict == "fail"
    waiver = Waiver.model_validate(
        {
            "slice": "all",
            "by": "Ann",
            "because": "a demo",
            "on": utc_today().isoformat(),
            "until": utc_today().isoformat(),
            "recipe": "theirs",
            "rung": "int4",
            "format": "gguf",
            "sha256": "0" * 64,
            "consented": {"score": failed.overall.score},
        }
    )
    append_waiver(tmp_path / "theirs.waivers.yaml", waiver, recipe=recipe)
    found = evaluate_artifact(asked)
    assert found.evaluation is not None
    assert (found.evaluation.verdict, found.code) == ("pass", 0)
    (artifact / "manifest.json").write_text('{"recipe": "theirs", "rung": "int8"}')
    assert evaluate_artifact(asked).code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sample", "0"], "--sample 0"),
        (["--floor", "{oops"], "the floor is not JSON"),
        (["--floor", '{"retentoin": 0.9}'], "floor.retentoin: Extra inputs are not permitted"),
        (["--floor", '{"retention": 9}'], "floor.retention: Input should be less than or equal"),
        (["--floor", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--suite", "nowhere.jsonl"], "nowhere.jsonl: the suite cannot be read"),
        (["--reference", "nowhere"], "nowhere: there is no such student"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_message(
    tiny: Tiny, gguf: Path, suite: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    arguments = {"--suite": str(suite), "--reference": str(tiny()), "--cache": str(tmp_path / "c")}
    arguments |= {change[0]: change[1]}
    code, out, err = run(str(gguf), *(word for pair in arguments.items() for word in pair))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "c").exists()


def test_a_damaged_file_fails_alone_and_clearly(
    tiny: Tiny, gguf: Path, suite: Path, cache: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:5000])
    said: list[str] = []
    outcome = evaluate_artifact(request(damaged, tiny(), suite, cache), said.append)
    assert (outcome.evaluation, outcome.code) == (None, 2)
    assert any("error: " in line and "model.gguf" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "coreml"])
def test_other_formats_are_evaluated(
    tiny: Tiny, suite: Path, cache: Path, tmp_path: Path, name: str
) -> None:
    directory = export(tiny(), tmp_path / name, name)
    artifact = directory
    if name == "coreml":
        artifact = (directory / "model.mlpackage").rename(directory / "theirs.mlpackage")
    asked = request(artifact, tiny(), suite, cache, context_tokens=64)
    outcome = evaluate_artifact(asked)
    assert outcome.evaluation is not None
    assert outcome.evaluation.overall.retention == pytest.approx(1.0, abs=0.15)
    loss = outcome.evaluation.overall.bits_per_byte_loss
    assert loss is not None
    assert abs(loss) < 0.05


def test_artifacts_are_known_by_what_lies_there(tmp_path: Path) -> None:
    def make(*names: str) -> Path:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        return root

    one = make("a.gguf", "notes.txt")
    for path in (one, one / "a.gguf"):
        found = find_artifact(path)
        assert (found.format, found.files) == ("gguf", {"model.gguf": one / "a.gguf"})
    graph = make("model.onnx", "model.onnx.data", "tokenizer.json", "README.md", "manifest.json")
    for path in (graph, graph / "model.onnx"):
        found = find_artifact(path)
        assert found.format == "onnx"
        assert set(found.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    package = make("x.mlpackage/Manifest.json", "x.mlpackage/Data/weights", "tokenizer.json")
    assert set(find_artifact(package).files) == {
        "model.mlpackage/Manifest.json",
        "model.mlpackage/Data/weights",
        "tokenizer.json",
    }
    assert find_artifact(package / "x.mlpackage").files == find_artifact(package).files
    for names in (("a.gguf", "b.gguf"), ("a.gguf", "model.onnx"), ("notes.txt",)):
        with pytest.raises(InputError, match="is not one artifact of a format that is known"):
            find_artifact(make(*names))
    with pytest.raises(InputError, match="there is no such file"):
        find_artifact(tmp_path / "nowhere")


def test_a_manifest_tells_context_and_conversation(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    manifest = {"context_tokens": 512, "chat": {"system": "Rate it."}, "rung": "int4"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    claims = find_artifact(tmp_path).claims
    assert (claims.context_tokens, claims.chat.system) == (512, "Rate it.")
    (tmp_path / "manifest.json").write_text('{"context_tokens": "many"}')
    with pytest.raises(InputError, match="is not a manifest"):
        find_artifact(tmp_path)


def test_criteria_are_read_from_a_recipe_or_written_out(tmp_path: Path) -> None:
    assert read_criteria(None).floor is None
    assert read_criteria(' {"retention": 0.97}').floor == Floor(retention=0.97)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nstudent: nowhere\ncontext_tokens: 128\nchat: {system: Hi}\n"
        "floor: {score: 0.5}\nslices:\n  tail: {protected: true}\n"
    )
    found = read_criteria(str(recipe))
    assert (found.floor, found.context_tokens) == (Floor(score=0.5), 128)
    assert found.slices == {"tail": SliceSpec(protected=True)}
    assert found.chat is not None
    recipe.write_text("floor: {score: 2}\nslices: {tail: {protectd: true}}\n")
    with pytest.raises(UsageError) as raised:
        read_criteria(str(recipe))
    assert "2 problems in the floor" in str(raised.value)
    assert f"{recipe}:1: floor.score: " in str(raised.value)
    assert f"{recipe}:2: slices.tail.protectd: " in str(raised.value)
    recipe.write_text("- a list\n")
    with pytest.raises(UsageError, match="holds no keys of a recipe"):
        read_criteria(str(recipe))


def test_control_characters_of_a_suite_do_not_reach_the_terminal(
    tiny: Tiny, suite: Path, cache: Path, gguf: Path, tmp_path: Path
) -> None:
    from rich.console import Console

    lines = suite.read_text().replace('"odd"', '"\\u001b[31mred"')
    suite.write_text(lines)
    outcome = evaluate_artifact(request(gguf, tiny(), suite, cache))
    assert outcome.evaluation is not None
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    console.print(render_evaluation(outcome.evaluation, "model\x1b[1m"))
    shown = console.export_text()
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown


def test_an_artifact_of_ours_is_linked_not_copied(tiny: Tiny, gguf: Path, tmp_path: Path) -> None:
    shutil.copyfile(gguf, tmp_path / "model.gguf")
    dst = tmp_path / "linked"
    dst.mkdir()
    find_artifact(tmp_path / "model.gguf").link(dst)
    assert (dst / "model.gguf").stat().st_ino == (tmp_path / "model.gguf").stat().st_ino


def test_a_sample_asks_the_reference_no_more_unless_all_its_scores_are_at_hand(
    tiny: Tiny, gguf: Path, suite: Path, tmp_path: Path
) -> None:
    scored: list[int] = []
    for sample in (7, None, 5):
        asked = request(gguf, tiny(), suite, tmp_path / "cache", sample=sample)
        found = evaluate_artifact(asked, lambda _: None).evaluation
        assert found is not None
        assert found.cases == (sample or 26)
        judged = _plan(asked, read_criteria(None), find_artifact(gguf))
        scores = tmp_path / "cache" / "steps" / judged.inputs["reference_scores"].key
        lines = next(scores.rglob("scores.jsonl")).read_text().splitlines()
        scored.append(len(lines))
    assert scored == [7, 26, 26]
