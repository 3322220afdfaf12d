from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.recipe_yaml import YamlDocument, dotted, read_yaml


def parse(tmp_path: Path, text: str) -> YamlDocument:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def test_scalars_follow_the_core_schema_and_words_stay_words(tmp_path: Path) -> None:
    text = "a: no\nb: on\nc: 12:30\nd: 1e-3\ne: 007\nf: 'true'\ng: true\nh: ~\ni: 2026-01-02\n"
    expected = {"a": "no", "b": "on", "c": "12:30", "d": 1e-3, "e": 7, "f": "true"}
    expected |= {"g": True, "h": None, "i": "2026-01-02"}
    assert parse(tmp_path, text).data == expected


def test_every_value_has_the_line_of_its_key(tmp_path: Path) -> None:
    document = parse(tmp_path, "a:\n  b: 1\nc:\n  - d: {e: 2}\n  - 3\n")
    assert document.lines[("a", "b")] == 2
    assert document.lines[("c", 0, "d", "e")] == 4
    assert document.where(("c", 1)).endswith("recipe.yaml:5")
    assert document.where(("c", 0, "d", "nothing", "there")).endswith("recipe.yaml:4")


def test_a_key_given_twice_is_a_problem_that_names_both_lines(tmp_path: Path) -> None:
    document = parse(tmp_path, "a:\n  b: 1\n  c: 2\n  b: 3\n")
    (problem,) = document.problems
    assert "a.b: the key is given twice, first in line 2" in str(problem)
    assert (problem.where or "").endswith(":4")
    assert document.data == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x\n", "no anchors"),
        ("a: !!python/object/apply:os.system ['true']\n", "no tags"),
        ("a: [1\nb: 2\n", "is not YAML"),
        ("a: 1\n b: 2\n", "is not YAML"),
        ("? [1, 2]\n: 3\n", "a key is a list"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused(tmp_path: Path, text: str, words: str) -> None:
    problems = parse(tmp_path, text).problems
    assert [words in str(problem) for problem in problems] == [True]
    assert "recipe.yaml:" in (problems[0].where or "")


def test_a_missing_file_and_bytes_that_are_no_text_are_problems(tmp_path: Path) -> None:
    assert "cannot be read" in str(read_yaml(tmp_path / "none.yaml").problems[0])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in str(read_yaml(tmp_path / "binary.yaml").problems[0])


def test_places_are_written_as_people_write_them() -> None:
    assert dotted(("rungs", "int4", 0, "quantize_rtn", "bits")) == "rungs.int4[0].quantize_rtn.bits"
