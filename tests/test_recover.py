"""Recovery on the grids: its gradients, what may move, killed runs, formats, the warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgedistill.adapter_matrix import AdapterMatrix
from edgedistill.build import Options
from edgedistill.cache import Cache
from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.cli import app
from edgedistill.errors import InputError, RecipeError, StageError
from edgedistill.grid_learner import GridTrained, ScalesMatrix
from edgedistill.healing_results import RECOVERY_FILE, Recovery
from edgedistill.pipeline import Pipeline
from edgedistill.plan import plan_build
from edgedistill.plugins import load_plugin
from edgedistill.preview import describe, preview
from edgedistill.quantized import Grid, QTensor
from edgedistill.recipe_load import load_recipe
from edgedistill.stages.quantize_rtn import QuantizeRtn, round_to_grid
from edgedistill.stages.recover import Recover
from edgedistill.student import Student, dequantize_student
from tests.interrupted import Interruption
from tests.pruned import edited, empty, load, logits, mean_kl, random_ids
from tests.recipes import write_recipe

Tiny = Callable[[str], Path]
Quantized = Callable[..., Path]
# What an adapter is folded into.
SOME_ON_8 = {"v": {"bits": 8}, "o": {"bits": 8}}
GRIDS = [
    Grid(2, 64),
    Grid(3, 32),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(5, 32),
    Grid(8, 32),
]
SHORT = Calibration(sequence_tokens=64)
BUDGET: dict[str, Any] = {
    "tokens": 2048,
    "batch_tokens": 128,
    "held_out_tokens": 256,
    "evaluations": 4,
    "learning_rate": 3e-3,
    "calibration": SHORT,
}
RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
calibration: {{sequence_tokens: 64}}
rungs:
  float: []
  plain:
    - quantize_rtn: {{bits: 2}}
  small:
    - quantize_rtn: {{bits: 2}}
    - recover: {{trained: scales, tokens: 1024, batch_tokens: 128, held_out_tokens: 128}}
export: [gguf]
"""


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A tiny student rounded to nearest, for the fields of ``quantize_rtn``; made once each."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **fields: Any) -> Path:
        key = f"{family} {sorted(fields.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized")
            QuantizeRtn(**fields).run(tiny(family), made[key])
        return made[key]

    return make


def _recover(
    stage: Recover, src: Path, dst: Path, teacher: Path, work: Path | None = None
) -> Recovery:
    stage.run_beside(src, empty(dst), teacher=teacher, work=work)
    return Recovery.model_validate_json((dst / RECOVERY_FILE).read_bytes())


def _held_out_kl(before: Path, after: Path, teacher: Path, scratch: Path) -> list[float]:
    """Mean KL to the teacher of two quantized students, by ``transformers``.

    The built-in texts are shorter than ``calibration.tokens``, so it is their end that is held out.
    """
    text = torch.from_numpy(np.stack(calibration_ids(before, SHORT, Chat())[-4:]))
    expected = logits(load(teacher), text)
    found = []
    for name, student in (("before", before), ("after", after)):
        dequantize_student(student, empty(scratch / name))
        found.append(mean_kl(expected, logits(load(scratch / name), text)))
    return found


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _adapter(rank: int = 4) -> tuple[AdapterMatrix, QTensor]:
    weights = np.random.default_rng(3).normal(0, 0.1, (6, 128)).astype(np.float32)
    rounded = round_to_grid(weights, Grid(8, 32))
    return AdapterMatrix(rounded, rank, torch.Generator().manual_seed(0)), rounded


def _matrix(grid: Grid) -> tuple[ScalesMatrix, QTensor]:
    weights = np.random.default_rng(3).normal(0, 0.1, (6, 128)).astype(np.float32)
    rounded = round_to_grid(weights, grid)
    return ScalesMatrix(rounded), rounded


def _loss_and_gradients(matrix: ScalesMatrix, towards: torch.Tensor) -> float:
    """Of a loss that is linear in the weights, whose finite differences are exact."""
    loss = (matrix.weight * towards).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    matrix.collect()
    return float(loss.detach())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_the_differences_that_steps_make(grid: Grid) -> None:
    """A scale doubled: the loss moves by what the gradient says."""
    matrix, _ = _matrix(grid)
    towards = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    before = _loss_and_gradients(matrix, towards)
    gradient = matrix.factor.grad
    assert gradient is not None
    for row, column in [(0, 0), (2, 70), (5, 127)]:
        group = column // grid.group_size
        with torch.no_grad():
            matrix.factor[row, group] = 1.0
        matrix.settle()
        doubled = _loss_and_gradients(matrix, towards) - before
        assert doubled == pytest.approx(float(gradient[row, group]), rel=1e-3, abs=2e-5)
        with torch.no_grad():
            matrix.factor[row, group] = 0.0
        matrix.settle()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nothing_moves_before_it_is_trained(grid: Grid) -> None:
    matrix, rounded = _matrix(grid)
    now = matrix.quantized()
    assert (now.codes == rounded.codes).all()
    assert (now.scales == rounded.scales).all()
    assert (matrix.weight.detach().numpy() == rounded.dequantize()).all()


def test_an_adapter_changes_nothing_before_it_is_trained() -> None:
    matrix, rounded = _adapter()
    now = matrix.quantized()
    assert (now.codes == rounded.codes).all()
    assert (now.scales == rounded.scales).all()
    assert (matrix.weight.detach().numpy() == rounded.dequantize()).all()
    assert matrix.changed_codes() == 0


def test_the_gradients_of_an_adapter_are_those_of_its_product() -> None:
    matrix, rounded = _adapter()
    a, b = matrix.trained()
    towards = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    matrix.settle()
    (matrix.weight * towards).sum().backward()  # type: ignore[no-untyped-call]
    matrix.collect()
    found = [part.grad.clone() for part in (a, b) if part.grad is not None]
    plain_a, plain_b = (part.detach().clone().requires_grad_() for part in (a, b))
    product = torch.from_numpy(rounded.dequantize()) + plain_b @ plain_a
    (product * towards).sum().backward()  # type: ignore[no-untyped-call]
    for own, plain in zip(found, (plain_a, plain_b), strict=True):
        assert plain.grad is not None
        torch.testing.assert_close(own, plain.grad)
    assert matrix.weight.grad is None


def test_of_a_change_below_half_a_step_as_many_codes_move_as_its_mean_takes() -> None:
    """Rounded from the codes themselves it would be lost altogether."""
    matrix, rounded = _adapter(rank=1)
    a, b = matrix.trained()
    step = float(rounded.scales.astype(np.float32).mean())
    with torch.no_grad():
        a.fill_(1.0)
        b.fill_(0.2 * step)
    matrix.settle()
    moved = matrix.weight.detach().numpy() - rounded.dequantize()
    assert moved.mean() == pytest.approx(0.2 * step, rel=0.25)
    assert 0 < matrix.changed_codes() < 0.5 * rounded.codes.size


def test_an_adapter_ends_on_the_grid_that_formats_hold() -> None:
    matrix, rounded = _adapter()
    with torch.no_grad():
        matrix.trained()[1].fill_(100.0)
    matrix.settle()
    now = matrix.quantized()
    assert (now.codes.min(), now.codes.max()) == (1, 255)
    assert (now.scales == rounded.scales).all()
    assert (matrix.weight.detach().numpy() == now.dequantize()).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_training_ends_on_the_grid_that_formats_hold(grid: Grid) -> None:
    matrix, rounded = _matrix(grid)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        matrix.factor.add_(torch.randn(matrix.factor.shape, generator=noise))
    matrix.settle()
    now = matrix.quantized()
    assert (now.codes == rounded.codes).all()
    assert (now.scales != rounded.scales).any()
    assert (now.zero_points() == rounded.zero_points()).all()
    assert (matrix.weight.detach().numpy() == now.dequantize()).all()
    if grid.zero == "integer":
        # GGUF's Q4_1 stores the product of scale and zero point.
        product = now.scales.astype(np.float32) * now.zero_points()
        assert (product.astype(np.float16).astype(np.float32) == product).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits"),
    [("llama", 2), ("llama", 4), ("granite", 2), ("gemma2", 2), ("gemma3", 2), ("gemma3", 4)],
)
def test_trained_scales_lower_the_kl_that_transformers_measures_and_no_code_moves(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, family: str, bits: int
) -> None:
    src, teacher = quantized(family, bits=bits), tiny(family)
    found = _recover(Recover(trained="scales", **BUDGET), src, out := tmp_path / "out", teacher)
    before, after = _held_out_kl(src, out, teacher, tmp_path)
    assert after < 0.95 * before
    assert found.kl_before == pytest.approx(before, rel=1e-3)
    assert found.kl_after == pytest.approx(after, rel=1e-3)
    was, now = Student(src), Student(out)
    assert now.grids == was.grids
    assert now.names() == was.names()
    assert (now.read(was.facts.embedding) == was.read(was.facts.embedding)).all()
    for layer in range(was.facts.layers):
        for name in was.facts.linears(layer).values():
            assert (now.read_quantized(name).codes == was.read_quantized(name).codes).all()
            assert (now.read_quantized(name).scales != was.read_quantized(name).scales).any()
    assert found.codes_changed == 0
    assert (now.read(was.facts.final_norm) != was.read(was.facts.final_norm)).any()


@pytest.mark.slow
def test_a_folded_adapter_lowers_the_kl_that_transformers_measures(
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    src, teacher = quantized(bits=2, linears=SOME_ON_8), tiny("llama")
    stage = Recover(**BUDGET | {"learning_rate": 1e-2})
    found = _recover(stage, src, out := tmp_path / "out", teacher)
    before, after = _held_out_kl(src, out, teacher, tmp_path)
    assert after < 0.95 * before
    assert found.kl_after == pytest.approx(after, rel=1e-3)
    was, now = Student(src), Student(out)
    assert now.grids == was.grids
    for name in was.facts.matrices():
        same = now.read_quantized(name), was.read_quantized(name)
        assert (same[0].scales == same[1].scales).all()
        folded = was.facts.short_name(name) in SOME_ON_8
        assert (same[0].codes != same[1].codes).any() == folded
    assert found.codes == sum(
        was.read_quantized(name).codes.size
        for name in was.facts.matrices()
        if was.facts.short_name(name) in SOME_ON_8
    )
    assert 0 < found.codes_changed < found.codes


def test_nothing_that_is_trained_or_measured_on_was_calibrated_on(
    tiny: Tiny, tmp_path: Path
) -> None:
    """GPTQ reads the first ``calibration.tokens`` of the text that recovery reads too."""
    lines = [
        json.dumps({"text": f"Sentence {n} of many, each another one. " * 8}) for n in range(60)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    calibration = Calibration(file=tmp_path / "text.jsonl", tokens=1024, sequence_tokens=64)
    stage = Recover(**BUDGET | {"calibration": calibration, "tokens": 512})
    split = stage.split_text(tiny("llama"))
    held_out = {tuple(ids.tolist()) for ids in split.held_out.ids}
    fitting = {tuple(ids.tolist()) for ids in split.fitting.ids}
    calibrated = {
        tuple(ids.tolist()) for ids in calibration_ids(tiny("llama"), calibration, Chat())
    }
    assert (len(held_out), len(fitting), len(calibrated)) == (4, 8, 16)
    assert len(held_out | fitting | calibrated) == 28


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["adapter", "scales"])
def test_a_run_that_was_killed_ends_in_the_bytes_of_one_that_was_not(
    tiny: Tiny,
    quantized: Quantized,
    tmp_path: Path,
    trained: GridTrained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src = quantized(bits=2, linears=SOME_ON_8)
    stage = Recover(trained=trained, passes=4, **BUDGET)
    work = empty(tmp_path / "work")
    _recover(stage, src, tmp_path / "whole", tiny("llama"))
    interruption = Interruption(monkeypatch, after=10)
    with pytest.raises(KeyboardInterrupt):
        _recover(stage, src, tmp_path / "killed", tiny("llama"), work)
    interruption.lift()
    _recover(stage, src, tmp_path / "resumed", tiny("llama"), work)
    assert interruption.taken == 8  # from the evaluation after 8 steps to the 16th
    assert _files(tmp_path / "resumed") == _files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["gguf", "onnx"])
@pytest.mark.parametrize("trained", ["adapter", "scales"])
def test_a_recovered_student_runs_in_its_runtime_as_its_dequantized_copy(
    tiny: Tiny, quantized: Quantized, tmp_path: Path, format_name: str, trained: GridTrained
) -> None:
    src = quantized(bits=2, linears=SOME_ON_8)
    stage = Recover(trained=trained, **BUDGET | {"learning_rate": 3e-2})
    _recover(stage, src, out := tmp_path / "out", tiny("llama"))
    dequantize_student(out, empty(tmp_path / "plain"))
    ids = random_ids(1, 64)
    expected = logits(load(tmp_path / "plain"), ids)
    exporter = load_plugin("exporters", format_name)()
    exporter.export(Student(out), empty(tmp_path / format_name), context_tokens=256)
    runtime = load_plugin("runtimes", exporter.runtime)()
    with runtime.open(tmp_path / format_name, context_tokens=256, threads=1) as session:
        found = np.concatenate(list(session.stream_logits(ids[0].tolist())))
    # Activations are rounded to 8 bits; what was trained moved the logits far more.
    assert mean_kl(expected, torch.from_numpy(found)[None]) < 0.02
    dequantize_student(src, empty(tmp_path / "before"))
    assert mean_kl(expected, logits(load(tmp_path / "before"), ids)) > 0.2


def test_what_cannot_be_recovered_is_refused(
    tiny: Tiny, quantized: Quantized, tmp_path: Path
) -> None:
    facts = Student(tiny("llama")).facts
    assert Recover().problems(facts, quantized=True) == []
    assert Recover().problems_on([Grid(2, 64), Grid(8, 32)]) == []
    assert "folded into matrices on 8 bits" in Recover().problems_on([Grid(2, 64)])[0]
    with pytest.raises(InputError, match="no matrix of the blocks has 8 bits"):
        _recover(Recover(**BUDGET), quantized(bits=2), tmp_path / "none", tiny("llama"))
    assert "not quantized" in Recover().problems(facts, quantized=False)[0]
    with pytest.raises(InputError, match="not quantized"):
        _recover(Recover(**BUDGET), tiny("llama"), tmp_path / "float", tiny("llama"))
    with pytest.raises(InputError, match="no teacher"):
        Recover().run(quantized(bits=2), tmp_path)
    other = edited(tiny("llama"), tmp_path / "other", lambda name, values: values)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="another tokenizer"):
        _recover(Recover(**BUDGET), quantized(bits=2), tmp_path / "out", other)
    worse = Recover(trained="scales", **BUDGET | {"learning_rate": 1.0})
    with pytest.raises(StageError, match=r"did not lower|held-out KL is"):
        _recover(worse, quantized(bits=4), tmp_path / "worse", tiny("llama"))


def test_a_float_rung_that_wants_recovery_is_a_mistake_in_the_recipe(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE.replace("  float: []", "  float: [recover: {{}}]")
    with pytest.raises(RecipeError, match="behind the stage that quantizes"):
        load_recipe(write_recipe(tmp_path, tiny("llama"), text))


def test_an_adapter_that_nothing_holds_is_a_mistake_in_the_recipe(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE.replace("trained: scales, ", "")
    with pytest.raises(RecipeError, match=r"linears: \{v: \{bits: 8\}"):
        load_recipe(write_recipe(tmp_path, tiny("llama"), text))
    for held in (
        "quantize_rtn: {{bits: 2, linears: {{v: {{bits: 8}}}}}}",
        # Which of its matrices a mixture puts on 8 bits is not known yet.
        "quantize_mixed: {{bits_per_weight: 3.5}}",
    ):
        holding = text.replace("quantize_rtn: {{bits: 2}}", held)
        load_recipe(write_recipe(tmp_path, tiny("llama"), holding))


def test_plain_two_bits_are_warned_of_and_recovered_ones_are_not(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, tiny("llama"), RECIPE)
    plan = preview(Options(recipe=path, cache=tmp_path / "cache"))
    assert len(plan.warnings) == 1
    assert plan.warnings[0].startswith("rungs.plain: quantize_rtn")
    assert f"warning: {plan.warnings[0]}" in list(describe(plan))
    checked = CliRunner().invoke(app, ["check", str(path)])
    assert checked.exit_code == 0
    assert checked.stderr.count("warning: rungs.") == 1


@pytest.mark.parametrize(("bits", "warned"), [(3.5, True), (6.0, False)])
def test_a_mixture_is_warned_of_where_its_target_wants_two_bits(
    tiny: Tiny, tmp_path: Path, bits: float, warned: bool
) -> None:
    mixed = f"quantize_mixed: {{{{bits_per_weight: {bits}}}}}"
    text = RECIPE.replace("quantize_rtn: {{bits: 2}}", mixed)
    plan = preview(Options(recipe=write_recipe(tmp_path, tiny("llama"), text), cache=tmp_path))
    assert [warning.startswith("rungs.plain:") for warning in plan.warnings] == [True] * warned


@pytest.mark.slow
def test_a_rung_is_quantized_and_then_recovered_by_the_reference(
    tiny: Tiny, tmp_path: Path
) -> None:
    loaded = load_recipe(write_recipe(tmp_path, tiny("llama"), RECIPE))
    steps = plan_build(loaded.recipe, tiny("llama"), machine="m")
    small = next(a for a in steps.artifacts if a.rung == "small")
    by_label = {step.label: step for step in steps.ordered()}
    recover = by_label["small: recover"]
    assert recover.inputs["teacher"] is steps.reference
    said: list[str] = []
    pipeline = Pipeline(Cache(tmp_path / "cache"), said.append)
    pipeline.run([small.student])
    out = pipeline.output(small.student)
    assert out is not None, said
    assert (out / RECOVERY_FILE).exists()
    assert Student(out).is_quantized
    assert not (tmp_path / "cache" / "work" / recover.key).exists()
