"""Mixed bits: never more bytes than the target, and losses that are what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edgedistill.allocation_results import ALLOCATION_FILE, Allocation
from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.estimate import artifact_bytes
from edgedistill.grid_damage import SensitivityText, measure_damage
from edgedistill.mixed_bytes import MixedBytes
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid, QTensor
from edgedistill.recipe import StageStep
from edgedistill.recipe_load import load_recipe
from edgedistill.stages.quantize_mixed import QuantizeMixed
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student
from edgedistill.tasks import RunStage
from tests.recipes import write_recipe

Tiny = Callable[[str], Path]

TEXT = Calibration(tokens=1024, sequence_tokens=64)
FORMATS = ("gguf", "onnx")
RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
rungs:
  mixed: [quantize_mixed: {{TARGET}}]
export: [gguf, onnx]
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student at 4 bits a weight, in the fuller of two formats."""
    from tests.tiny import write_student

    source = write_student(tmp_path_factory.mktemp("source") / "student")
    dst = tmp_path_factory.mktemp("mixed")
    QuantizeMixed(bits_per_weight=4.0, formats=FORMATS, calibration=TEXT).run(source, dst)
    return dst


def read_allocation(directory: Path) -> Allocation:
    return Allocation.model_validate_json((directory / ALLOCATION_FILE).read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_exported_file_is_never_over_the_target(mixed: Path, tmp_path: Path, name: str) -> None:
    exporter = load_plugin("exporters", name)()
    exporter.export(Student(mixed), tmp_path, context_tokens=64)
    written, allocation = exporter.weight_bytes(tmp_path), read_allocation(mixed)
    assert written <= allocation.target_bytes
    assert allocation.target_bytes == 4 * Student(mixed).facts.parameters // 8
    if name == "onnx":  # the fuller one: to the byte
        assert written == allocation.total_bytes
        assert written > 0.97 * allocation.target_bytes


@pytest.mark.slow
def test_bits_differ_and_the_document_says_what_was_done(mixed: Path) -> None:
    allocation, student = read_allocation(mixed), Student(mixed)
    said = {matrix.tensor: matrix.grid for matrix in allocation.matrices}
    assert said == {name: str(grid) for name, grid in student.grids.items()}
    assert len({matrix.bits for matrix in allocation.matrices}) > 1
    assert allocation.loss == pytest.approx(sum(m.loss for m in allocation.matrices))
    # What was left lying pays no more for its bytes than the bytes that were given out.
    for matrix in allocation.matrices:
        if matrix.step_up and matrix.step_up.more_bytes <= (
            allocation.target_bytes - allocation.total_bytes
        ):
            assert matrix.step_up.gain <= 0


@pytest.mark.slow
def test_a_rung_for_core_ml_alone_gets_three_bits_too(tiny: Tiny, tmp_path: Path) -> None:
    source, quantized, artifact = tiny("llama"), tmp_path / "quantized", tmp_path / "artifact"
    plain = tmp_path / "plain"
    for directory in (quantized, artifact, plain):
        directory.mkdir()
    QuantizeMixed(bits_per_weight=3.6, formats=("coreml",), calibration=TEXT).run(source, quantized)
    allocation, student = read_allocation(quantized), Student(quantized)
    assert {grid.bits for grid in student.grids.values()} >= {3, 4}
    assert {matrix.grid for matrix in allocation.matrices} == {
        str(grid) for grid in student.grids.values()
    }
    assert 0.97 * allocation.target_bytes < allocation.total_bytes <= allocation.target_bytes
    # What is in the file besides the student's tensors is in that of the float student, too.
    exporter, facts = load_plugin("exporters", "coreml")(), student.facts
    exporter.export(student, artifact, context_tokens=64)
    exporter.export(Student(source), plain, context_tokens=64)
    beside = exporter.weight_bytes(plain) - 2 * facts.parameters
    # Tables of the values of 2 and 3 bits stand in the program, not in its weight file.
    tables = sum(1 << grid.bits for grid in student.grids.values() if grid.bits < 4)
    assert exporter.weight_bytes(artifact) - beside == allocation.total_bytes - tables


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])  # of a tied and of an untied head
def test_a_rung_for_gguf_alone_gets_five_bits_too(family: str, tiny: Tiny, tmp_path: Path) -> None:
    quantized, artifact = tmp_path / "quantized", tmp_path / "artifact"
    for directory in (quantized, artifact):
        directory.mkdir()
    stage = QuantizeMixed(bits_per_weight=5.6, formats=("gguf",), calibration=TEXT)
    stage.run(tiny(family), quantized)
    allocation, student = read_allocation(quantized), Student(quantized)
    facts = student.facts
    assert Grid(5, 32) in {student.grids[name] for name in facts.linears(1).values()}
    assert Grid(5, 32) in {student.grids[name] for name in (facts.embedding, facts.head)}
    assert allocation.total_bytes <= allocation.target_bytes
    exporter = load_plugin("exporters", "gguf")()
    exporter.export(student, artifact, context_tokens=64)
    assert exporter.weight_bytes(artifact) == allocation.total_bytes


@pytest.mark.parametrize(
    ("own", "grids"),
    [("coreml", {Grid(3, 64), Grid(3, 32)}), ("gguf", {Grid(5, 32)}), ("onnx", set())],
)
def test_no_rung_gets_bits_that_one_of_its_formats_lacks(
    own: str, grids: set[Grid], tiny: Tiny
) -> None:
    facts = Student(tiny("llama")).facts

    def of_few(formats: tuple[str, ...] | None) -> set[Grid]:
        found = set()
        for bits_per_weight in (3.6, 5.2):
            stage = QuantizeMixed(bits_per_weight=bits_per_weight, formats=formats)
            expected = {g for n in facts.matrices() for g in stage.expected_grids(n, facts)}
            found |= {grid for grid in [*stage.grids(facts), *expected] if grid.bits in (3, 5)}
        return found

    assert of_few((own,)) == grids
    for other in {"gguf", "onnx", "coreml"} - {own}:
        assert of_few((own, other)) == set()
    assert of_few(None) == set()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "smollm3", "granite", "gemma2", "gemma3"])
def test_predicted_losses_are_those_that_transformers_measures(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    """One matrix at a time is put into the float student as it was quantized."""
    from transformers import AutoModelForCausalLM

    student = Student(tiny(family))
    facts = student.facts
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, facts.vocab_size, (40, 48), generator=draw)
    text = SensitivityText(ids[16:], ids[:16])
    grids = [Grid(2, 64), Grid(4, 32), Grid(8, 32)]
    kept: dict[tuple[str, Grid], QTensor] = {}

    def watch(name: str, quantized: QTensor) -> None:
        kept[name, quantized.grid] = quantized

    candidates = dict.fromkeys(facts.matrices(), grids)
    damage = measure_damage(student, candidates, text, tmp_path, watch=watch)
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    outer = (facts.embedding, facts.head)

    def log_probs() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(text.measured).logits.double().log_softmax(-1)
        return found

    own, predicted, measured = log_probs(), [], []
    for (name, grid), quantized in kept.items():
        matrix = model.get_parameter(name)
        before = matrix.data.clone()
        matrix.data.copy_(torch.from_numpy(quantized.dequantize()))
        measured.append(float((own.exp() * (own - log_probs())).sum(-1).mean()))
        matrix.data.copy_(before)
        predicted.append(damage[name][grid])
        if name in outer:
            assert predicted[-1] == pytest.approx(measured[-1], rel=1e-3, abs=1e-6)
    # Second order: near where errors are small, and in the right order throughout.
    ratios = np.array(predicted) / np.array(measured)
    assert np.quantile(ratios, 0.1) > 0.5
    assert np.quantile(ratios, 0.9) < 2.0
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.97
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_is_nearer_than_rounding_everything_to_four_bits_at_no_more_bytes(
    tiny: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from edgedistill.student import dequantize_student
    from tests.tiny import CORPUS

    words = np.random.default_rng(0).choice(" ".join(CORPUS).split(), 6000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    seen = Calibration(file=tmp_path / "text.txt", tokens=8192, sequence_tokens=128)
    source = Student(tiny("llama"))
    choice = QuantizeRtn.model_validate(
        {"bits": 4, "zero": "fixed", "embeddings": {"bits": 4, "zero": "fixed"}}
    )
    steps = (StageStep.model_construct(name="quantize_rtn", config=choice),)
    size_mb = artifact_bytes(source.facts, steps, "gguf") / 1e6
    stages = {
        "rounded": choice,
        "mixed": QuantizeMixed(size_mb=size_mb, formats=("gguf",), calibration=seen),
        "own": None,
    }
    unseen = seen.model_copy(update={"seed": 1, "tokens": 1024})
    ids = torch.from_numpy(np.stack(calibration_ids(source.path, unseen, Chat())))
    logits = {}
    for name, stage in stages.items():
        path, plain = tmp_path / name, tmp_path / f"{name}-float"
        path.mkdir()
        plain.mkdir()
        if stage:
            stage.run(source.path, path)
        dequantize_student(path if stage else source.path, plain)
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        with torch.no_grad():
            logits[name] = model(ids).logits.double().log_softmax(-1)
    own = logits.pop("own")
    kl = {n: float((own.exp() * (own - other)).sum(-1).mean()) for n, other in logits.items()}
    assert kl["mixed"] < 0.9 * kl["rounded"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_what_an_exporter_says_that_tensors_take_is_what_it_writes(
    tiny: Tiny, tmp_path: Path, name: str, family: str
) -> None:
    exporter, facts = load_plugin("exporters", name)(), Student(tiny(family)).facts
    for index, choice in enumerate([{"bits": 2}, {"bits": 4}, {"bits": 8}]):
        stage = QuantizeRtn.model_validate(choice)
        quantized, artifact = tmp_path / f"{index}", tmp_path / f"{index}-{name}"
        quantized.mkdir()
        artifact.mkdir()
        stage.run(tiny(family), quantized)
        exporter.export(Student(quantized), artifact, context_tokens=64)
        steps = (StageStep.model_construct(name="quantize_rtn", config=stage),)
        assert artifact_bytes(facts, steps, name) == exporter.weight_bytes(artifact)


def test_the_mixture_that_plan_expects_meets_the_target(tiny: Tiny) -> None:
    facts = Student(tiny("llama")).facts
    sizes = MixedBytes(facts, FORMATS)
    for bits in (3.0, 3.5, 4.0, 6.0):
        stage = QuantizeMixed(bits_per_weight=bits, formats=FORMATS)
        steps = (StageStep.model_construct(name="quantize_mixed", config=stage),)
        target = stage.target_bytes(facts)
        assert sizes.least <= target <= sizes.most
        assert artifact_bytes(facts, steps, "onnx") == pytest.approx(target, abs=2)
        assert 0.8 * target < artifact_bytes(facts, steps, "gguf") < target


def test_targets_out_of_reach_are_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    from edgedistill.errors import RecipeError

    def problem(target: str) -> str:
        text = RECIPE.replace("TARGET", target)
        with pytest.raises(RecipeError) as caught:
            load_recipe(write_recipe(tmp_path, tiny("llama"), text))
        assert len(caught.value.problems) == 1
        return str(caught.value.problems[0])

    facts = Student(tiny("llama")).facts
    sizes = MixedBytes(facts, FORMATS)
    least, most = (f"{8 * b / facts.parameters:.4g}" for b in (sizes.least, sizes.most))
    for target in ("bits_per_weight: 2.1", "bits_per_weight: 12"):
        told = problem(target)
        assert f"{least} to {most}" in told
        assert "gguf and onnx" in told
    assert "size_mb" in problem("size_mb: 0.001")
    assert "either" in problem("bits_per_weight: 4, size_mb: 1")
    assert "no format 'gufg'" in problem("bits_per_weight: 4, formats: [gufg]")
    facts_ = Student(tiny("llama")).facts
    assert "already" in QuantizeMixed(size_mb=1.0).problems(facts_, quantized=True)[0]


def test_a_recipe_fills_in_the_formats_of_the_rung(tiny: Tiny, tmp_path: Path) -> None:
    text = RECIPE.replace("TARGET", "bits_per_weight: 4")
    config: Any = (
        load_recipe(write_recipe(tmp_path, tiny("llama"), text)).recipe.rungs["mixed"][0].config
    )
    assert config.formats == ("gguf", "onnx")
    fields = json.loads(config.model_dump_json(exclude_unset=True))
    assert fields["formats"] == ["gguf", "onnx"]
    task = RunStage(stage="quantize_mixed", fields=fields)
    assert ("exporters", "onnx") in task.plugins()
    facts = Student(tiny("llama")).facts
    assert Grid(4, 64) not in config.grids(facts)
    alone = text.replace("[gguf, onnx]", "[onnx]")
    only: Any = (
        load_recipe(write_recipe(tmp_path, tiny("llama"), alone)).recipe.rungs["mixed"][0].config
    )
    assert Grid(4, 64) in only.grids(facts)


def test_neither_or_both_targets_are_refused() -> None:
    with pytest.raises(ValidationError, match="either"):
        QuantizeMixed()
    with pytest.raises(ValidationError, match="either"):
        QuantizeMixed(bits_per_weight=4.0, size_mb=2.0)
