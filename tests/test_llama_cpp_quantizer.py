"""llama.cpp's own quantizer, as the benchmarks call it: the matrix it gets, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedistill.errors import InputError, StageError
from edgedistill.exporters.gguf import WEIGHTS_FILE, Gguf
from edgedistill.gguf_file import GgufFile, gguf_package
from edgedistill.reference_model import load_reference
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from llama_cpp_quantizer import ImportanceMatrix, importance_matrix, quantize, weights_by_type

Tiny = Callable[[str], Path]
NAME = "blk.1.ffn_down.weight"


@pytest.fixture
def source(tiny: Tiny, tmp_path: Path) -> Path:
    Gguf().export(Student(tiny("llama")), tmp_path, context_tokens=64)
    return tmp_path / WEIGHTS_FILE


def uneven(source: Path) -> ImportanceMatrix:
    """Every eighth column counts a thousand times as much."""
    found = {}
    for name, tensor in GgufFile(source).tensors.items():
        if len(tensor.shape) == 2 and name.startswith("blk."):
            found[name] = np.ones(tensor.shape[1], dtype=np.float32)
            found[name][::8] = 1000
    return found


def test_importance_is_what_transformers_feeds_to_each_matrix(tiny: Tiny) -> None:
    ids = list(np.random.default_rng(0).integers(0, 500, (3, 40)))
    found = importance_matrix(Student(tiny("llama")), ids)
    model = load_reference(tiny("llama"), threads=1)
    squares: dict[str, list[torch.Tensor]] = {}
    places = {"q_proj": "attn_q", "o_proj": "attn_output", "up_proj": "ffn_up"}
    for layer, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            short = places.get(name.split(".")[-1])
            if short:
                kept = squares.setdefault(f"blk.{layer}.{short}.weight", [])
                module.register_forward_pre_hook(
                    lambda _, given, kept=kept: kept.append(given[0].square().mean(dim=(0, 1)))
                )
    with torch.inference_mode():
        for sequence in ids:
            model(torch.from_numpy(sequence)[None])
    assert len(squares) == 3 * len(model.model.layers)
    for gguf_name, parts in squares.items():
        expected = torch.stack(parts).mean(dim=0).numpy()
        np.testing.assert_allclose(found[gguf_name], expected, rtol=1e-4)
    assert len(found) == 7 * len(model.model.layers)


def test_without_importance_the_blocks_are_those_of_the_gguf_package(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    counts = quantize(source, out, "Q4_0")
    gguf = gguf_package()
    values = GgufFile(source).read(NAME)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(GgufFile(out).blocks(NAME), expected)
    assert counts == weights_by_type(out)
    assert counts["Q4_0"] > sum(counts.values()) / 2


def test_importance_moves_the_error_to_columns_that_count_less(
    source: Path, tmp_path: Path
) -> None:
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    importance = uneven(source)
    quantize(source, plain, "Q4_0")
    quantize(source, weighted, "Q4_0", importance)
    values = GgufFile(source).read(NAME)

    def error(file: Path) -> float:
        off = GgufFile(file).read(NAME) - values
        return float((np.square(off) * importance[NAME]).sum())

    assert error(weighted) < 0.9 * error(plain)


def test_the_log_goes_where_it_went_before(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with LlamaCpp().open(source, context_tokens=32, threads=1) as session:
        session.prefill([5])
    capfd.readouterr()
    quantize(source, tmp_path / "out.gguf", "Q4_0")
    with LlamaCpp().open(tmp_path / "out.gguf", context_tokens=32, threads=1) as session:
        session.prefill([5])
    assert capfd.readouterr().err == ""
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "out.gguf").read_bytes()[:-5000])
    with pytest.raises(InputError):
        LlamaCpp().open(tmp_path / "bad.gguf", context_tokens=32, threads=1)


def test_a_failure_tells_llama_cpps_reason(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="failed to open"):
        quantize(tmp_path / "none.gguf", tmp_path / "out.gguf", "Q4_0")
    short = {name: values[:-1] for name, values in uneven(source).items()}
    with pytest.raises(StageError, match=r"returned 1: .*size"):
        quantize(source, tmp_path / "out.gguf", "Q4_0", short)
