"""Taking a student off its grid: it computes the same, and no grid holds its weights any more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.stages.quantize_rtn import QuantizeRtn, round_to_grid
from edgedistill.student import Student, dequantize_student
from tests.tiny import FAMILY_CONFIGS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from off_grid import LEAST, MOST, largest_difference, rescalings, take_off_grid

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_computes_the_same(tiny: Tiny, tmp_path: Path, family: str) -> None:
    take_off_grid(Student(tiny(family)), tmp_path, seed=3)
    assert largest_difference(tiny(family), tmp_path, tokens=128) < 1e-4
    facts = Student(tiny(family)).facts
    for name in set(facts.matrices()) - ({facts.embedding} if facts.tied_embeddings else set()):
        if name != facts.embedding:
            assert not np.allclose(Student(tmp_path).read(name), Student(tiny(family)).read(name))


def test_one_factor_too_many_shows(tiny: Tiny, tmp_path: Path) -> None:
    from edgedistill.student import StudentWriter

    source = Student(tiny("qwen2"))
    changes = rescalings(source.facts, 3)
    del changes["model.layers.1.self_attn.v_proj.bias"]
    with StudentWriter(tmp_path, source) as writer:
        for name in source.names():
            values = source.read(name)
            writer.write(name, changes[name].apply(values) if name in changes else values)
    assert largest_difference(tiny("qwen2"), tmp_path, tokens=128) > 1e-3


def test_weights_that_were_on_a_grid_are_not_copied_for_free(tiny: Tiny, tmp_path: Path) -> None:
    grid, name = QuantizeRtn(bits=4), "model.layers.1.mlp.down_proj.weight"
    quantized, on, off = (tmp_path / part for part in ("quantized", "on", "off"))
    for directory in (quantized, on, off):
        directory.mkdir()
    grid.run(tiny("llama"), quantized)
    dequantize_student(quantized, on)
    take_off_grid(Student(on), off)

    def error(student: Path) -> float:
        weights = Student(student).read(name)
        rounded = round_to_grid(weights, grid.grid()).dequantize()
        return float(np.linalg.norm(rounded - weights) / np.linalg.norm(weights))

    assert error(on) < 0.01
    assert error(off) > 0.04


def test_factors_are_seeded_and_in_their_range(tiny: Tiny) -> None:
    facts = Student(tiny("llama")).facts
    name = facts.linears(0)["down"]
    one, again, other = (rescalings(facts, seed)[name].columns for seed in (0, 0, 1))
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.min() >= LEAST
    assert one.max() <= MOST
    assert one.max() / one.min() > 1.3
