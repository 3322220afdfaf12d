"""What an earlier release was held to is not forgotten when the recipe asks for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.chat import Chat
from edgedistill.floor import Floor, SliceSpec
from edgedistill.lowered import lowered_clauses, read_manifests
from edgedistill.manifest import Manifest
from edgedistill.results import LoweredClause


def release(floor: Floor | None, slices: dict[str, Any] | None = None, **more: Any) -> Manifest:
    specs = {n: SliceSpec.model_validate(s) for n, s in (slices or {}).items()}
    base: dict[str, Any] = {
        "recipe": "tiny",
        "rung": "r",
        "format": "f",
        "runtime": "x",
        "edgedistill": "0",
        "license": None,
        "student": "s",
        "context_tokens": 8,
        "chat": Chat(),
        "parameters": 1,
        "size_bytes": 1,
        "weight_bytes": 1,
        "bits_per_weight": 1.0,
        "shippable": True,
        "why_not": None,
        "files": [],
        "lineage": [],
        "libraries": {},
        "verification": None,
        "quality": None,
        "budget": [],
        "bench": None,
    }
    return Manifest.model_validate(base | {"floor": floor, "slices": specs} | more)


def lowered(
    before: Manifest, floor: Floor | None, slices: dict[str, Any] | None = None
) -> list[str]:
    specs = {n: SliceSpec.model_validate(s) for n, s in (slices or {}).items()}
    return [str(clause) for clause in lowered_clauses([before], floor, specs)]


STRICT = Floor(retention=0.97, max_broken=0.1)


@pytest.mark.parametrize(
    ("floor", "slices", "expected"),
    [
        (STRICT, {"a": {"protected": True}}, []),
        (Floor(retention=0.98, max_broken=0.05, score=0.5), {"a": {"protected": True}}, []),
        (
            Floor(retention=0.96, max_broken=0.1),
            {"a": {"protected": True}},
            ["retention on all was 0.97, is 0.96"],
        ),
        (
            Floor(retention=0.97, max_broken=0.2),
            {"a": {"protected": True}},
            ["max_broken on all was 0.1, is 0.2"],
        ),
        (
            Floor(max_broken=0.1),
            {"a": {"protected": True}},
            ["retention on all was 0.97, is not held"],
        ),
        (STRICT, {}, ["loss on a was 0, is 0.02"]),
        (STRICT, {"a": {"retention": 0.5}}, ["loss on a was 0, is not held"]),
        (STRICT, {"a": {"sacrificed": "why"}}, ["loss on a was 0, is not held"]),
        (
            STRICT,
            {"a": {"protected": True}, "b": {"retention": 0.1}},
            ["loss on b was 0.02, is not held"],
        ),
        (
            STRICT.model_copy(update={"when_underpowered": "pass"}),
            {"a": {"protected": True}},
            ["undecided on all was 0, is not held"],
        ),
    ],
)
def test_what_is_asked_for_less_than_before_is_said(
    floor: Floor, slices: dict[str, Any], expected: list[str]
) -> None:
    assert lowered(release(STRICT, {"a": {"protected": True}}), floor, slices) == expected


def test_a_recipe_without_a_floor_has_lowered_all_of_it() -> None:
    assert len(lowered(release(STRICT, {"a": {"protected": True}}), None)) == 4
    assert lowered(release(None), STRICT) == []


def test_building_twice_does_not_hide_what_was_lowered() -> None:
    weak = Floor(retention=0.9)
    memory = [LoweredClause(slice="all", clause="retention", was=0.97, now=0.9)]
    second = release(weak, floor_lowered=memory)
    assert lowered(second, weak) == ["retention on all was 0.97, is 0.9"]
    assert lowered(second, Floor(retention=0.97)) == []
    both = lowered_clauses([release(Floor(retention=0.95)), second], weak, {})
    assert [c.was for c in both] == [0.97]


def test_manifests_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    exports = tmp_path / "tiny"
    artifact = exports / "int4" / "gguf"
    artifact.mkdir(parents=True)
    (artifact / "manifest.json").write_text(release(STRICT).model_dump_json())
    assert [m.floor for m in read_manifests(exports)] == [STRICT]
    (artifact / "manifest.json").write_text('{"recipe": "tiny"}')
    assert read_manifests(exports) == []
    assert read_manifests(tmp_path / "nowhere") == []
