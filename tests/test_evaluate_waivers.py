"""Consent is recorded, holds for what was consented to, and ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgedistill.build import Options, build
from edgedistill.chat import Chat
from edgedistill.cli import app
from edgedistill.content import sha256_file
from edgedistill.errors import ExitCode, InputError, UsageError
from edgedistill.evaluate.approve import approve
from edgedistill.evaluate.waivers import (
    Waiver,
    append_waiver,
    apply_waivers,
    describe_waiver,
    in_force,
    read_waivers,
    utc_today,
    waivers_beside,
)
from edgedistill.floor import Floor
from edgedistill.manifest import Manifest, ManifestFile, Quality
from edgedistill.preview import preview
from edgedistill.results import Evaluation, FloorCheck, Interval, Verdict
from tests.recipes import write_recipe, write_suite

Tiny = Callable[[str], Path]

TODAY = date(2026, 3, 1)
SHA = "0123456789abcdef" * 4


def waiver(**changes: Any) -> Waiver:
    fields = {
        "slice": "domain=nyt",
        "by": "Ann",
        "because": "newspapers come in May",
        "on": "2026-03-01",
        "until": "2026-05-31",
        "recipe": "tiny",
        "rung": "int4",
        "format": "gguf",
        "sha256": SHA,
        "consented": {"retention": 0.93, "unnamed loss": 0.04},
    }
    return Waiver.model_validate(fields | changes)


def check(
    clause: str = "retention",
    value: float = 0.93,
    verdict: Verdict = "fail",
    name: str = "domain=nyt",
) -> FloorCheck:
    interval = Interval(low=value - 0.01, high=value + 0.01)
    return FloorCheck(
        clause=clause, slice=name, limit=0.97, value=value, interval=interval, verdict=verdict
    )


def evaluation(*checks: FloorCheck, verdict: Verdict = "fail") -> Evaluation:
    return Evaluation(
        cases=10,
        cases_in_suite=10,
        runtime="llama_cpp",
        slices=[],
        floor=list(checks),
        flips=[],
        verdict=verdict,
        seconds=1.0,
    )


def applied(found: Evaluation, *waivers: Waiver, today: date = TODAY) -> Evaluation:
    return apply_waivers(found, waivers, floor=Floor(), today=today)


def test_a_waived_clause_passes_and_says_by_whom_and_until_when() -> None:
    found = applied(evaluation(check(), check("unnamed loss", 0.04)), waiver())
    assert found.verdict == "pass"
    assert [c.verdict for c in found.floor] == ["pass", "pass"]
    assert all(c.waived for c in found.floor)
    assert found.floor[0].note == "waived by Ann until 2026-05-31: newspapers come in May"


def test_a_waiver_ends_with_its_last_day() -> None:
    failed = evaluation(check())
    assert applied(failed, waiver(), today=date(2026, 5, 31)).verdict == "pass"
    expired = applied(failed, waiver(), today=date(2026, 6, 1))
    assert (expired.verdict, expired.floor[0].verdict) == ("fail", "fail")
    assert expired.floor[0].note == "the waiver by Ann expired on 2026-05-31"
    assert not expired.floor[0].waived


@pytest.mark.parametrize(
    ("clause", "consented", "narrower", "broader"),
    [
        ("retention", 0.93, 0.94, 0.9299),
        ("score", 0.60, 0.61, 0.59),
        ("max_broken", 0.05, 0.04, 0.051),
        ("max_log_score_loss", 0.05, 0.04, 0.051),
        ("protected", 0.03, 0.02, 0.031),
        ("unnamed loss", 0.03, 0.02, 0.031),
    ],
)
def test_a_broader_loss_than_was_consented_to_does_not_pass(
    clause: str, consented: float, narrower: float, broader: float
) -> None:
    given_ = waiver(consented={clause: consented})
    for value, verdict in ((consented, "pass"), (narrower, "pass"), (broader, "fail")):
        assert applied(evaluation(check(clause, value)), given_).verdict == verdict
    note = applied(evaluation(check(clause, broader)), given_).floor[0].note
    assert note is not None
    assert note.startswith("Ann consented to ")


def test_nothing_else_is_let_through() -> None:
    others = [check("score", 0.1), check(name="negation")]
    found = applied(evaluation(check(), *others), waiver())
    assert [c.verdict for c in found.floor] == ["pass", "fail", "fail"]
    assert found.verdict == "fail"
    undecided = check(name="negation", verdict="underpowered")
    assert applied(evaluation(check(), undecided), waiver()).verdict == "underpowered"
    assert not waiver().is_for("tiny", "int8", "gguf")
    assert not waiver().is_for("tiny", "int4", "onnx")
    assert waiver().is_for("tiny", "int4", "gguf")
    untouched = evaluation(check(verdict="pass"), verdict="pass")
    assert applied(untouched, waiver()) is untouched


def test_the_waivers_in_force_are_those_of_the_recipe_that_have_not_ended() -> None:
    waivers = [waiver(), waiver(rung="int8", until="2026-03-02"), waiver(recipe="other")]
    assert set(in_force(waivers, "tiny", TODAY)) == {("int4", "gguf"), ("int8", "gguf")}
    assert set(in_force(waivers, "tiny", date(2026, 3, 3))) == {("int4", "gguf")}


# ---- the file ----


def recipe_file(root: Path, text: str = "name: tiny\n") -> Path:
    path = root / "tiny.yaml"
    path.write_text(text)
    return path


def test_a_file_grows_by_whole_waivers_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    path = waivers_beside(recipe)
    assert path.name == "tiny.waivers.yaml"
    assert read_waivers(path) == []
    append_waiver(path, waiver(), recipe=recipe)
    path.write_text(path.read_text() + "# Ann asked in May")
    append_waiver(path, waiver(slice="tail"), recipe=recipe)
    assert [w.slice for w in read_waivers(path)] == ["domain=nyt", "tail"]
    text = path.read_text()
    assert text.startswith("# Losses that somebody consented to")
    assert "# Ann asked in May\n- slice: " in text
    assert 'because: "newspapers come in May"' in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.waivers.yaml", "tiny.yaml"]


def _append(arguments: tuple[Path, int]) -> None:
    recipe, number = arguments
    append_waiver(waivers_beside(recipe), waiver(slice=f"slice {number}"), recipe=recipe)


def test_consent_from_many_at_once_is_lost_by_nobody(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_append, [(recipe, number) for number in range(24)])
    found = {w.slice for w in read_waivers(waivers_beside(recipe))}
    assert found == {f"slice {number}" for number in range(24)}


def test_a_file_that_is_no_list_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    path = waivers_beside(recipe)
    for text in ("{}\n", "[]\n", "- {slice: a}\n", "text", "- &a 1\n", "\x00", "[" * 5000):
        path.write_text(text)
        with pytest.raises(InputError):
            append_waiver(path, waiver(), recipe=recipe)
        assert path.read_text() == text
        assert not list(tmp_path.glob(".*"))


def test_everything_wrong_in_the_file_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    first = describe_waiver(waiver()).replace("2026-05-31", "soon")
    path.write_text(first + describe_waiver(waiver(slice="b")).replace("by:", "bye:"))
    with pytest.raises(InputError) as caught:
        read_waivers(path)
    text = str(caught.value)
    assert "3 problems in the waivers" in text
    assert f"{path}:5: until: is not a date" in text
    assert "bye: Extra inputs" in text


FUZZED = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LINES = st.text(min_size=1, max_size=80).filter(lambda t: t.isprintable() and t.strip())


@FUZZED
@given(
    by=LINES,
    because=LINES,
    clause=LINES,
    value=st.floats(allow_nan=False, allow_infinity=False),
)
def test_whatever_people_write_is_read_back(
    tmp_path: Path, by: str, because: str, clause: str, value: float
) -> None:
    written = waiver(by=by, because=because, consented={clause: value})
    (tmp_path / "w.yaml").write_text(describe_waiver(written), encoding="utf-8")
    assert read_waivers(tmp_path / "w.yaml") == [written]


@FUZZED
@given(data=st.binary(max_size=200), cut=st.integers(0, 300))
def test_no_file_is_read_with_a_traceback(tmp_path: Path, data: bytes, cut: int) -> None:
    whole = describe_waiver(waiver()).encode()
    (tmp_path / "w.yaml").write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    with suppress(InputError):  # anything else is a traceback for its reader
        assert all(isinstance(found, Waiver) for found in read_waivers(tmp_path / "w.yaml"))


# ---- the command ----


def publish(root: Path, *checks: FloorCheck, **changes: Any) -> Path:
    """An artifact as a build leaves it, without its steps."""
    artifact = root / "exports" / "tiny" / "int4" / "gguf"
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "model.gguf").write_bytes(b"weights")
    file = ManifestFile(
        path="model.gguf", size_bytes=7, sha256=sha256_file(artifact / "model.gguf")
    )
    quality = Quality(
        verdict="fail",
        runtime="llama_cpp",
        cases=10,
        cases_in_suite=10,
        slices=[],
        floor=list(checks),
    )
    fields: dict[str, Any] = {
        "recipe": "tiny",
        "rung": "int4",
        "format": "gguf",
        "runtime": "llama_cpp",
        "edgedistill": "0",
        "license": None,
        "student": "s",
        "context_tokens": 64,
        "chat": Chat(),
        "parameters": 1,
        "size_bytes": 7,
        "weight_bytes": 7,
        "bits_per_weight": 4.5,
        "shippable": False,
        "why_not": None,
        "files": [file],
        "lineage": [],
        "libraries": {},
        "verification": None,
        "quality": quality,
        "budget": [],
        "bench": None,
    }
    manifest = Manifest.model_validate(fields | changes)
    (artifact / "manifest.json").write_text(manifest.model_dump_json(indent=2))
    return artifact


def consent(artifact: Path, recipe: Path | None, **changes: Any) -> tuple[Waiver, Path]:
    arguments: dict[str, Any] = {
        "slice_name": "domain=nyt",
        "because": "newspapers come in May",
        "by": "Ann",
        "until": "2026-05-31",
        "today": TODAY,
    }
    return approve(artifact, recipe=recipe, **(arguments | changes))


def test_consent_takes_the_measured_loss_of_every_failed_clause_of_the_slice(
    tmp_path: Path,
) -> None:
    failed = (check(), check("max_broken", 0.2), check("score", 0.4, "pass"), check(name="b"))
    artifact, recipe = publish(tmp_path, *failed), recipe_file(tmp_path)
    found, path = consent(artifact, recipe)
    assert found.consented == {"retention": 0.93, "max_broken": 0.2}
    assert (found.rung, found.format, found.recipe) == ("int4", "gguf", "tiny")
    assert (found.on, found.until) == ("2026-03-01", "2026-05-31")
    assert path == tmp_path / "tiny.waivers.yaml"
    assert read_waivers(path) == [found]
    passing = applied(evaluation(*failed[:2], verdict="fail"), *read_waivers(path))
    assert passing.verdict == "pass"
    # what is waived already can be renewed
    renewed = publish(tmp_path, *passing.floor)
    assert consent(renewed, recipe, until="2026-12-31")[0].consented == found.consented


def test_a_recipe_says_where_its_waivers_lie(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, "name: tiny\nwaivers: consent.yaml\n")
    _, path = consent(publish(tmp_path, check()), recipe)
    assert path == tmp_path / "consent.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice_name": "domain=nty"}, "no clause failed there"),
        ({"until": "tomorrow"}, "is not a date"),
        ({"until": "2026-02-28"}, "is past"),
        ({"until": "2027-06-01"}, "more than a year"),
        ({"by": " "}, "--by"),
        ({"because": "a\nb"}, "--because"),
        ({"because": "\x1b[2J"}, "--because"),
    ],
)
def test_consent_that_means_nothing_is_refused_and_leaves_no_file(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    artifact, recipe = publish(tmp_path, check()), recipe_file(tmp_path)
    with pytest.raises(UsageError, match=message):
        consent(artifact, recipe, **changes)
    assert not waivers_beside(recipe).exists()


def test_consent_is_to_the_artifact_that_was_judged(tmp_path: Path) -> None:
    artifact, recipe = publish(tmp_path, check()), recipe_file(tmp_path)
    with pytest.raises(UsageError, match="is the recipe 'other'"):
        consent(artifact, recipe_file(tmp_path, "name: other\n"))
    with pytest.raises(UsageError, match="cannot be read"):
        consent(artifact, tmp_path / "nowhere.yaml")
    recipe_file(tmp_path)
    (artifact / "model.gguf").write_bytes(b"wieghts")
    with pytest.raises(InputError, match="not the file that was judged"):
        consent(artifact, recipe)
    (artifact / "model.gguf").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        consent(artifact, recipe)
    outside = ManifestFile(path="../../secret", size_bytes=1, sha256=SHA)
    with pytest.raises(InputError, match="outside"):
        consent(publish(tmp_path, check(), files=[outside]), recipe)
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is not a manifest"):
        consent(artifact, recipe)
    with pytest.raises(InputError, match=r"manifest\.json"):
        consent(tmp_path, recipe)


def test_the_command_prints_what_it_wrote_and_ends_with_2_where_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe_file(tmp_path / "recipes")
    artifact = publish(tmp_path, check())
    until = (utc_today() + timedelta(days=30)).isoformat()
    words = ["--because", "asked for", "--by", "Ann", "--until", until]
    ran = CliRunner().invoke(app, ["approve", str(artifact), "--slice", "domain=nyt", *words])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith('- slice: "domain=nyt"\n')
    assert "recipes/tiny.waivers.yaml; commit it" in ran.stderr
    assert (tmp_path / "recipes" / "tiny.waivers.yaml").read_text().endswith(ran.stdout)
    refused = CliRunner().invoke(app, ["approve", str(artifact), "--slice", "b", *words])
    assert refused.exit_code == 2
    assert "hint: it failed on domain=nyt" in refused.stderr


# ---- from build to build ----

RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
rungs:
  float: []
export: [gguf]
suite: suite.jsonl
floor: {{score: 1.0}}
slices:
  odd: {{sacrificed: {{because: nobody asks these, by: Ann, on: 2026-01-31}}}}
evaluate: {{stop_early: true}}
build: {{threads: 1}}
"""


@pytest.mark.slow
def test_a_failed_artifact_ships_after_consent_and_a_lowered_floor_is_said(
    tiny: Tiny, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny("llama"), RECIPE)
    write_suite(tmp_path / "suite.jsonl")
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports")
    said: list[str] = []
    failed, _ = build(options, said.append)
    assert failed.exit_code == ExitCode.FLOOR_NOT_MET
    assert failed.floor_lowered == []
    artifact = tmp_path / "exports" / "tiny" / "float" / "gguf"
    until = (utc_today() + timedelta(days=3)).isoformat()
    given_ = {"slice_name": "all", "because": "a demo", "by": "Ann", "until": until}
    approve(artifact, recipe=recipe, today=utc_today(), **given_)

    consented, _ = build(options, said.append)
    assert consented.exit_code == ExitCode.OK
    (report,) = consented.artifacts
    assert report.shippable
    assert report.evaluation is not None
    checked = {c.clause: c for c in report.evaluation.floor}
    assert (checked["score"].verdict, checked["score"].waived) == ("pass", True)
    assert (checked["score"].note or "").startswith(f"waived by Ann until {until}")
    assert (checked["sacrificed"].note or "").startswith("given up by Ann on 2026-01-31")
    ran = {step.label for step in consented.steps if not step.cached}
    assert ran == {"float/gguf: score", "float/gguf: judge"}  # now on the whole suite

    recipe.write_text(recipe.read_text().replace("score: 1.0", "score: 0.9"))
    for _ in range(2):  # the second time the manifest knows the lower floor already
        lower, _ = build(options, said.append)
        assert [str(c) for c in lower.floor_lowered] == ["score on all was 1, is 0.9"]
    assert any("warning: the floor was lowered" in line for line in said)
    assert [str(c) for c in preview(options).floor_lowered] == ["score on all was 1, is 0.9"]
