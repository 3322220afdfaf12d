"""A rung is put into the text of a recipe, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.recipe_yaml import read_yaml
from edgedistill.search.found_recipe import flow, found_path, with_rung, write_found

STEPS: list[dict[str, Any]] = [{"heal": {"tokens": 64}}, {"quantize_gptq": {"bits": 4}}]
BLOCK = """\
# Why this student.
name: tiny   # the name
student: ../student
context_tokens: 64

# How.
rungs:
  int8:
    # The safest.
    - quantize_rtn: {bits: 8}  # beside it
  int4:
    - quantize_rtn:
        bits: 4
        zero: fixed      # last of all

# Where.
targets:
  android: {format: gguf, rungs: [int8, int4], budget: {file_mb: 200}}  # phones
  windows:
    format: onnx
    rungs:   # all of them
      - int8
      - int4
    # what it may cost
    budget: {file_mb: 260}
  iphone: {format: coreml}

suite: suite.jsonl
"""
HEADER = ["Found by `edgedistill search tiny.yaml` with edgedistill 0:", "int4 won.", "", "  row"]


def changed(text: str, waivers: str | None = None) -> str:
    return with_rung(text, "slim", STEPS, header=HEADER, waivers=waivers)


def expected(text: str) -> Any:
    """The data by PyYAML's own loader, with the rung in the place of the rungs."""
    data = yaml.safe_load(text)
    data["rungs"] = {"slim": STEPS}
    for target in data.get("targets", {}).values():
        if "rungs" in target:
            target["rungs"] = ["slim"]
    return data


@pytest.mark.parametrize(
    "text",
    [
        BLOCK,
        BLOCK.replace("      - int8\n      - int4", "    - int8\n    - int4"),
        BLOCK[: BLOCK.index("rungs:")] + BLOCK[BLOCK.index("# Where") :],
        BLOCK[: BLOCK.index("  int8:")] + "\n" + BLOCK[BLOCK.index("# Where") :],
        "name: a\nexport: [gguf]\nrungs: {}  # none yet",
        "name: a\nrungs: {int8: [{quantize_rtn: {bits: 8}}]} # one\nexport: [gguf]\n",
        "---\nname: a\nexport:\n  - gguf\n...\n",
        '{"name": "a", "rungs": {"int8": []}, "targets": {"x": {"rungs": ["int8"]}}}',
        '{"name": "a", "export": ["gguf"]}\n',
        "name: größe 你好\nrungs:\n  'no': []\nexport: [gguf]\n",
    ],
)
def test_the_rung_replaces_the_rungs_and_other_keys_stay(text: str) -> None:
    assert yaml.safe_load(changed(text)) == expected(text)


def test_comments_outside_the_rungs_stay_where_they_are() -> None:
    lines = changed(BLOCK).splitlines()
    kept = BLOCK[: BLOCK.index("rungs:")] + BLOCK[BLOCK.index("\n# Where") :]
    for line in kept.splitlines():
        if "rungs:" not in line and "- int" not in line:
            assert line in lines
    assert "  android: {format: gguf, rungs: [slim], budget: {file_mb: 200}}  # phones" in lines
    assert lines[:4] == [f"# {line}".rstrip() for line in HEADER]
    assert lines[5] == "# Why this student."


def test_a_found_recipe_that_is_searched_again_has_one_header() -> None:
    once = changed(BLOCK)
    assert changed(once) == once


def test_waivers_that_lie_under_another_name_are_named() -> None:
    assert yaml.safe_load(changed(BLOCK, "tiny.waivers.yaml"))["waivers"] == "tiny.waivers.yaml"
    as_json = changed('{"name": "a", "export": ["gguf"]}', "a.waivers.yaml")
    assert yaml.safe_load(as_json)["waivers"] == "a.waivers.yaml"


Scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=12)
Values = st.recursive(
    Scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(Values)
@settings(deadline=None)
def test_what_is_written_on_one_line_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "flow.yaml"
    path.write_text(f"value: {flow(value)}\n", encoding="utf-8")
    document = read_yaml(path)
    assert document.problems == []
    assert document.data == {"value": value}


def test_a_file_is_replaced_only_when_asked_and_stays_beside_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    out = found_path(recipe, None, overwrite=False)
    assert out == tmp_path / "a.found.yaml"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        found_path(recipe, None, overwrite=False)
    assert found_path(recipe, None, overwrite=True) == out
    with pytest.raises(UsageError, match="relative to its directory"):
        found_path(recipe, tmp_path / "elsewhere" / "a.yaml", overwrite=False)


def test_what_the_check_refuses_is_not_left_behind(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise UsageError(f"no {path.read_text()}")

    with pytest.raises(UsageError, match="no good"):
        write_found(tmp_path / "a.yaml", "good", refuse)
    assert list(tmp_path.iterdir()) == []
