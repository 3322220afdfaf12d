"""What rounding costs a model foretells what a correct artifact differs by, and widens no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.session import Agreement
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.rounding import COSTS_FILE, LARGEST_LIMIT, fit_agreement
from tests.peaked import Good, export, make_good, verify

# Rounding moves it by more than a runtime's own limit allows: it is wide for its size.
SHAPE = {"num_hidden_layers": 4, "hidden_size": 96, "num_attention_heads": 6}
# What was found / what rounding costs, by rung and format.
FORETOLD = [
    ("int8", "gguf", "int8", (0.6, 1.7)),
    ("int8", "onnx", "int8", (0.6, 1.7)),
    ("float", "gguf", "float16", (0.4, 4.0)),
    ("float", "coreml", "float16", (1.0, 12.0)),
]

Made = Callable[[str], Good]


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("sensitive")
    rungs = {"float": [], "int8": [QuantizeRtn(bits=8)]}
    return make_good(root, "llama", rungs, 5205, **SHAPE).__getitem__


def costs(good: Good) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((good.rung.judge / COSTS_FILE).read_text())
    return found


@pytest.mark.parametrize(("rung", "format_name", "rounding", "within"), FORETOLD)
def test_what_an_artifact_differs_by_is_foretold(
    sensitive: Made,
    tmp_path: Path,
    rung: str,
    format_name: str,
    rounding: str,
    within: tuple[float, float],
) -> None:
    good = sensitive(rung)
    artifact = export(good.rung.student, tmp_path / "artifact", format_name)
    found = verify(good, artifact, format_name)
    assert [check for check in found.checks if not check.passed] == []
    check = next(c for c in found.checks if c.name == "logits: mean KL")
    assert check.value is not None
    low, high = within
    assert low < check.value / costs(good)[rounding]["kl_mean"] < high


def test_a_wider_limit_is_said_and_lets_no_fault_pass(sensitive: Made, tmp_path: Path) -> None:
    good = sensitive("float")
    artifact = export(good.rung.student, tmp_path / "good", "gguf")
    check = next(c for c in verify(good, artifact, "gguf").checks if c.name == "logits: mean KL")
    assert check.limit is not None
    assert check.limit > 1e-4
    assert "because float16 activations alone move this model by" in check.detail
    faulty = export(_norm_moved(good.rung.student, tmp_path / "moved"), tmp_path / "bad", "gguf")
    failed = {c.name for c in verify(good, faulty, "gguf").checks if not c.passed}
    assert "logits: mean KL" in failed


def _norm_moved(student: Path, dst: Path) -> Path:
    """Two entries of one norm swapped: the smallest of faults."""
    source = Student(student)
    dst.mkdir()
    with StudentWriter(dst, source) as writer:
        for name in source.names():
            values = source.read(name)
            if name == "model.layers.1.post_attention_layernorm.weight":
                values = np.concatenate([values[48:], values[:48]])
            writer.write(name, values)
    return dst


@pytest.mark.parametrize(
    ("cost", "flips", "limit", "top1"),
    [
        (1e-6, 9, 1e-4, 0.995),  # moved by less: the runtime's own limits hold
        (1e-3, 0, 4e-3, 1 - 4 * 3 / 600),
        (1e-3, 15, 4e-3, 1 - 4 * 18 / 600),
        (9.0, 600, LARGEST_LIMIT, 0.5),
    ],
)
def test_limits_widen_with_the_cost_and_never_close(
    tmp_path: Path, cost: float, flips: int, limit: float, top1: float
) -> None:
    stored = {"float16": {"kl_mean": cost, "flips": flips, "tokens": 600}}
    (tmp_path / COSTS_FILE).write_text(json.dumps(stored))
    fitted = fit_agreement(Agreement(1e-4, 0.995, "float16", 4), tmp_path)
    assert fitted.kl_mean == pytest.approx(limit)
    assert fitted.top1 == pytest.approx(top1)
    exact = Agreement(1e-4, 0.995)
    assert fit_agreement(exact, tmp_path) == exact
