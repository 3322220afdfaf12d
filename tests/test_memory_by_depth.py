"""Memory grows with a block and not with the model: two students, one of which is much deeper."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill import child, memory_watch
from edgedistill.build import Options, prepare
from edgedistill.cache import Cache
from edgedistill.pipeline import Pipeline
from edgedistill.results import StepReport
from tests.recipes import write_recipe
from tests.tiny import write_student

SHALLOW, DEEP = 10, 30
HIDDEN, FFN = 384, 1024
# Four heads, of which two have keys and values.
BLOCK_BYTES = 4 * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
FURTHER_BYTES = (DEEP - SHALLOW) * BLOCK_BYTES
RECIPE = """\
name: depth
student: {student}
context_tokens: 64
calibration: {{tokens: 1024, sequence_tokens: 128}}
rungs:
  int4: [quantize_gptq: {{bits: 4, group_size: 32}}]
export: [gguf, onnx, coreml]
build: {{threads: 1}}
"""
# Share of the further blocks' float32 bytes that a step may hold more: some above what
# was measured.  Whoever holds all blocks in float32 once more holds 1 more.
GROWTH = {
    "take in the student": 0.1,
    # A shard, which this student does not fill: packed codes, and again as they are written.
    "int4: quantize_gptq": 0.4,
    "int4/gguf: export": 0.1,
    "int4/onnx: export": 0.1,
    # The program's constants, some times over.
    "int4/coreml: export": 0.8,
    # The runtimes' own weights; Core ML's interpreter has up to 1 GiB of them in float32 as well.
    "int4/gguf: verify": 0.1,
    "int4/onnx: verify": 0.4,
    "int4/coreml: verify": 1.9,
    # A small student is held, a quantized one dequantized before.
    "reference: float32 logits": 0.4,
    "int4: float32 logits": 1.4,
}


def built(directory: Path, layers: int) -> dict[str, StepReport]:
    shape = {"num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": FFN}
    student = write_student(directory / "student", "llama", **shape)
    recipe = write_recipe(directory, student, RECIPE)
    steps = prepare(Options(recipe, cache=directory / "cache")).steps.ordered()
    told: list[str] = []
    pipeline = Pipeline(Cache(directory / "cache"), told.append)
    reports = pipeline.run(step for step in steps if not step.label.endswith("bench"))
    assert all(report.error is None for report in reports), told
    return {report.label: report for report in reports}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_step_holds_more_of_a_deeper_student_than_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (child, memory_watch):
        monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.01)
    shallow, deep = built(tmp_path / "shallow", SHALLOW), built(tmp_path / "deep", DEEP)
    assert shallow.keys() == deep.keys() == GROWTH.keys()
    grown = {
        label: (deep[label].peak_own_bytes - report.peak_own_bytes) / FURTHER_BYTES
        for label, report in shallow.items()
    }
    assert not {label: share for label, share in grown.items() if share > GROWTH[label]}, grown
