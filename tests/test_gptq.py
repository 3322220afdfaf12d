"""GPTQ against its own mathematics on small cases, and as a stage on tiny students."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill import gptq_head, hidden_stream
from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.errors import InputError, StageError
from edgedistill.gptq import (
    TRIANGLE_SIZE,
    Gptq,
    GptqSettings,
    Inputs,
    Order,
    column_order,
    invert_lower,
    output_error,
)
from edgedistill.gptq_cost import HELD_BYTES
from edgedistill.gptq_polish import polish, refit_scales
from edgedistill.gptq_student import quantize_student
from edgedistill.grid_choice import GridChoice, MatrixGrids
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Bits, Grid, QTensor
from edgedistill.stages.quantize_gptq import QuantizeGptq
from edgedistill.stages.quantize_rtn import QuantizeRtn, round_to_grid
from edgedistill.student import Student, StudentWriter, dequantize_student
from tests.artifact_tensors import FORMATS
from tests.pruned import folded_multiplier
from tests.tiny import FAMILY_CONFIGS

Tiny = Callable[[str], Path]
Floats = npt.NDArray[np.float32]

GRIDS = [
    Grid(8, 32),
    Grid(5, 32),
    Grid(4, 32),
    Grid(4, 64),
    Grid(4, 32, "integer"),
    Grid(3, 32),
    Grid(2, 64),
]
ORDERS: tuple[Order, ...] = ("given", "columns", "groups")
BARE = GptqSettings(damping=0.01, compensation=0.0, polish=0)


def weights_of(rows: int = 24, columns: int = 128, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)


def inputs_of(columns: int = 128, tokens: int = 512, seed: int = 1) -> Floats:
    """Correlated, some channels much larger than others: [tokens, columns]."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(tokens, columns)) @ draw.normal(size=(columns, columns))
    return (mixed * np.exp(draw.normal(size=columns))).astype(np.float32)


def hessian_of(x: Floats) -> Floats:
    return (x.T @ x / len(x)).astype(np.float32)


def squared_error(x: Floats, weights: Floats, quantized: QTensor) -> float:
    """Of the outputs themselves, in float64, from the definition."""
    off = weights.astype(np.float64) - quantized.dequantize()
    return float(np.square(x.astype(np.float64) @ off.T).sum())


def run_gptq(x: Floats, weights: Floats, grid: Grid, settings: GptqSettings) -> QTensor:
    return Gptq(Inputs(hessian_of(x)), grid.group_size, settings).quantize(weights, grid)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_are_nearer_than_by_rounding(grid: Grid, order: Order) -> None:
    x, weights = inputs_of(), weights_of()
    rounded = squared_error(x, weights, round_to_grid(weights, grid))
    settings = replace(BARE, order=order)
    assert squared_error(x, weights, run_gptq(x, weights, grid, settings)) < 0.8 * rounded


@pytest.mark.parametrize("bits", [(2, 3, 4), (4, 5, 8)], ids=["3", "5"])
def test_more_bits_lose_less(bits: tuple[Bits, Bits, Bits]) -> None:
    x, weights, settings = inputs_of(), weights_of(), GptqSettings()
    few, some, many = (
        squared_error(x, weights, run_gptq(x, weights, Grid(b, 32), settings)) for b in bits
    )
    # Squared: a bit more is a quarter; 8 bits are three bits more than 5.
    assert 2.5 * 4 ** (bits[2] - bits[1] - 1) * many < some < 0.4 * few


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_importance_order_and_polish_pay(grid: Grid) -> None:
    x, weights = inputs_of(), weights_of()

    def error(settings: GptqSettings) -> float:
        return squared_error(x, weights, run_gptq(x, weights, grid, settings))

    given, groups = error(replace(BARE, order="given")), error(replace(BARE, order="groups"))
    assert groups < given
    assert error(replace(BARE, polish=2)) < 0.9 * groups


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_with_inputs_that_are_not_correlated_it_is_rounding(grid: Grid, order: Order) -> None:
    weights = weights_of()
    identity = Inputs(np.eye(128, dtype=np.float32))
    found = Gptq(identity, grid.group_size, replace(BARE, order=order)).quantize(weights, grid)
    expected = round_to_grid(weights, grid)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.zero_points(), expected.zero_points())


def test_the_order_of_work_does_not_show_in_the_layout() -> None:
    """Groups in another order, columns within them too: the same integers in that order."""
    grid = Grid(4, 32, "integer")
    x, weights = inputs_of(), weights_of()
    draw = np.random.default_rng(3)
    groups = draw.permutation(4)
    moved = np.concatenate([g * 32 + draw.permutation(32) for g in groups])
    settings = replace(BARE, order="groups", clipping="diagonal")
    there = run_gptq(x, weights, grid, settings)
    here = run_gptq(x[:, moved], weights[:, moved], grid, settings)
    same = here.codes == there.codes[:, moved]
    assert same.mean() > 0.99  # sums in another order may decide a tie otherwise
    np.testing.assert_allclose(
        here.scales.astype(float), there.scales[:, groups].astype(float), rtol=0.05
    )


@pytest.mark.parametrize("order", ORDERS)
def test_every_column_has_one_turn_and_groups_stay_together(order: Order) -> None:
    importance = np.random.default_rng(0).random(128)
    turns = column_order(importance, 32, order)
    assert sorted(turns) == list(range(128))
    if order == "groups":
        assert len({tuple(set(turns[i : i + 32] // 32)) for i in range(0, 128, 32)}) == 4
    if order != "given":
        assert turns[0] == importance.argmax()


def test_polish_ends_between_the_best_codes_of_all_and_the_rounding() -> None:
    """All 4^6 rows of codes are tried, under the scale that was found and under many others."""
    grid, x = Grid(2, 6), inputs_of(6, 64)
    weights = weights_of(16, 6)
    rounded = round_to_grid(weights, grid)
    found = polish(rounded, weights, hessian_of(x), 8)
    codes = np.array(list(itertools.product(range(4), repeat=6)), dtype=np.float64) - 1
    outputs = x.astype(np.float64) @ codes.T

    def least(row: int, scale: float) -> float:
        wanted = x.astype(np.float64) @ weights[row]
        return float(np.square(wanted[:, None] - scale * outputs).sum(axis=0).min())

    best_of_scale = [least(row, float(found.scales[row, 0])) for row in range(16)]
    best = sum(min(least(row, s) for s in np.linspace(0.005, 0.12, 100)) for row in range(16))
    polished = squared_error(x, weights, found)
    assert polished < 0.5 * squared_error(x, weights, rounded)
    assert sum(best_of_scale) * (1 - 1e-6) <= polished
    assert polished < 2 * best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_refitting_scales_never_costs_and_finds_the_least_squares_fit(grid: Grid) -> None:
    x, weights = inputs_of(grid.group_size), weights_of(40, grid.group_size)
    start = round_to_grid(weights, grid)
    found = refit_scales(start, weights @ hessian_of(x), hessian_of(x))
    assert squared_error(x, weights, found) <= squared_error(x, weights, start) * (1 + 1e-6)
    np.testing.assert_array_equal(found.codes, start.codes)
    steps = start.codes.astype(np.float64) - start.zero_points()
    fits = [
        np.linalg.lstsq((x @ s)[:, None], x.astype(np.float64) @ w, rcond=None)[0][0]
        for s, w in zip(steps, weights, strict=True)
    ]
    bits = 7 if grid.zero == "integer" else 11
    np.testing.assert_allclose(found.scales[:, 0].astype(float), fits, rtol=1.1 * 2.0**-bits)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_stored_is_what_the_formats_hold(grid: Grid) -> None:
    settings = GptqSettings()
    quantized = run_gptq(inputs_of(), weights_of() + np.float32(0.02), grid, settings)
    assert quantized.grid == grid
    assert np.isfinite(quantized.scales).all()
    assert quantized.codes.max() <= grid.max_code
    if grid.bits == 8:
        assert quantized.codes.min() >= 1
    product = quantized.zero_points().astype(np.float32) * quantized.scales.astype(np.float32)
    np.testing.assert_array_equal(product.astype(np.float16).astype(np.float32), product)


@pytest.mark.parametrize("order", ORDERS)
def test_columns_that_read_nothing_are_rounded_to_nearest(order: Order) -> None:
    x, weights, grid = inputs_of(), weights_of(), Grid(4, 32)
    dead = np.arange(64, 96)
    x[:, dead] = 0.0
    found = run_gptq(x, weights, grid, replace(BARE, order=order))
    expected = round_to_grid(weights[:, dead].copy(), grid)
    np.testing.assert_array_equal(found.codes[:, dead], expected.codes)
    nothing = Gptq(Inputs(np.zeros((128, 128), dtype=np.float32)), 32, replace(BARE, order=order))
    np.testing.assert_array_equal(
        nothing.quantize(weights, grid).codes, round_to_grid(weights, grid).codes
    )


def test_fewer_tokens_than_columns_and_no_damping_still_work() -> None:
    x, weights = inputs_of(128, 5), weights_of()
    found = run_gptq(x, weights, Grid(4, 32), replace(BARE, damping=1e-12))
    rounded = round_to_grid(weights, Grid(4, 32))
    assert squared_error(x, weights, found) < squared_error(x, weights, rounded)


def test_hessians_that_are_none_are_refused() -> None:
    with pytest.raises(StageError, match="not positive definite"):
        Gptq(Inputs(-np.eye(64, dtype=np.float32)), 32, BARE)
    broken = np.eye(64, dtype=np.float32)
    broken[3, 5] = np.nan
    with pytest.raises(StageError, match="not finite"):
        Gptq(Inputs(broken), 32, BARE)


def test_compensation_undoes_what_came_before() -> None:
    """At 8 bits nothing is lost, so it has to reach what a float regression reaches."""
    before, weights = inputs_of(64, 2000), weights_of(16, 64)
    draw = np.random.default_rng(5)
    x = (before + 0.3 * before.std(axis=0) * draw.normal(size=before.shape)).astype(np.float32)
    lacking = (x[:, :16] * 0.01).astype(np.float32)
    inputs = Inputs(hessian_of(x), (before - x).T @ x / len(x), lacking.T @ x / len(x))
    wanted = before @ weights.T + lacking

    def error(share: float) -> float:
        settings = replace(BARE, damping=1e-6, compensation=share)
        quantized = Gptq(inputs, 32, settings).quantize(weights, Grid(8, 32))
        return float(np.square(x @ quantized.dequantize().T - wanted).sum())

    best = np.square(x @ np.linalg.lstsq(x, wanted, rcond=None)[0] - wanted).sum()
    assert error(1.0) < 1.02 * best
    assert error(1.0) < error(0.5) < error(0.0)


def dequantized_logits(student: Path, ids: list[npt.NDArray[np.int64]], scratch: Path) -> Floats:
    import torch
    from transformers import AutoModelForCausalLM

    scratch.mkdir()
    dequantize_student(student, scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    with torch.inference_mode():
        logits: Floats = model(torch.tensor(np.stack(ids))).logits.log_softmax(-1).numpy()
    return logits


def mean_kl(own: Floats, other: Floats) -> float:
    return float((np.exp(own) * (own - other)).sum(-1, dtype=np.float64).mean())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    from tests.tiny import CORPUS

    path = tmp_path / "text.txt"
    draw = np.random.default_rng(0)
    words = " ".join(CORPUS).split()
    path.write_text(" ".join(draw.choice(words, 9000)), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "smollm3", "granite", "gemma2", "gemma3"])
def test_a_student_is_nearer_in_sequence_and_nearer_still_when_errors_are_undone(
    tiny: Tiny, text: Path, tmp_path: Path, family: str
) -> None:
    """Also where a norm stands between a half block and the stream, as Gemma's do."""
    source = tiny(family)
    seen = Calibration(file=text, tokens=8192, sequence_tokens=128)
    ids = calibration_ids(source, seen, Chat())
    unseen = seen.model_copy(update={"seed": 1, "tokens": 1024})
    held_out = calibration_ids(source, unseen, Chat())
    choice, student = MatrixGrids(bits=2), Student(source)

    def grid_of(name: str) -> Grid:
        return choice.grid_of(name, student.facts)

    own = dequantized_logits(source, held_out, tmp_path / "own")

    def kl(name: str, run: Callable[[Path], None]) -> float:
        dst = tmp_path / name
        dst.mkdir()
        run(dst)
        return mean_kl(own, dequantized_logits(dst, held_out, tmp_path / f"{name}-float"))

    rounding = kl("rtn", lambda dst: QuantizeRtn(**choice.model_dump()).run(source, dst))

    def gptq(name: str, **changes: Any) -> float:
        # Lightly damped: so many tokens for so few columns fit no text too closely.
        settings = replace(GptqSettings(damping=0.05, compensation=0.0), **changes)

        def run(dst: Path) -> None:
            quantize_student(student, dst, ids, grid_of, settings, label=name)

        return kl(name, run)

    apart, after = gptq("apart", sequential=False), gptq("after")
    assert apart < 0.9 * rounding
    assert after < (1.0 if family in ("llama", "smollm3") else 1.1) * apart
    assert gptq("undone", compensation=1.0) < 0.8 * after


def test_what_the_stream_lacks_is_told_to_a_matrix_before_its_multiplier(tmp_path: Path) -> None:
    """A student with a residual multiplier, and the same with that in its matrices: same codes."""
    ids = list(np.random.default_rng(0).integers(3, 512, (16, 64)))
    settings, written = GptqSettings(damping=0.05, compensation=1.0), []
    for path in folded_multiplier(tmp_path):
        student = Student(path)
        (dst := tmp_path / f"{path.name}-out").mkdir()
        quantize_student(student, dst, ids, lambda _: Grid(4, 32), settings, label="gptq")
        written.append(Student(dst))
    for layer in range(3):
        for name in written[0].facts.linears(layer).values():
            apart, folded = (each.read_quantized(name) for each in written)
            assert (apart.codes != folded.codes).mean() < 0.01, name


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_stage_quantizes_matrices_and_carries_the_rest(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    source = Student(tiny(family))
    load_plugin("stages", "quantize_gptq").model_validate({"bits": 4}).run(source.path, tmp_path)
    written = Student(tmp_path)
    assert written.names() == source.names()
    assert set(written.grids) == set(source.facts.matrices())
    assert written.grids["model.embed_tokens.weight"] == Grid(8, 32)
    assert written.grids["model.layers.1.mlp.up_proj.weight"] == Grid(4, 32, "integer")
    for name in set(source.names()) - set(written.grids):
        np.testing.assert_array_equal(written.read(name), source.read(name))
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert (tmp_path / "chat_template.jinja").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_head_computes_is_nearer_than_by_rounding(
    tiny: Tiny, text: Path, tmp_path: Path, family: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what ``transformers`` gives the head of text that was not calibrated on."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(gptq_head, "ROWS", 100)  # several parts, and a shorter one
    source, facts = tiny(family), Student(tiny(family)).facts
    calibration = Calibration(file=text, tokens=4096, sequence_tokens=128)
    fields: dict[str, Any] = {"bits": 8, "embeddings": {"bits": bits}}
    for name in ("gptq", "rtn"):
        (tmp_path / name).mkdir()
    QuantizeGptq(**fields, calibration=calibration).run(source, tmp_path / "gptq")
    QuantizeRtn(**fields).run(source, tmp_path / "rtn")
    unseen = calibration.model_copy(update={"seed": 1, "tokens": 1024})
    ids = torch.from_numpy(np.stack(calibration_ids(source, unseen, Chat())))
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        x = model.model(ids).last_hidden_state.flatten(0, 1).numpy()
    whole = Student(source).read(facts.head)
    by_gptq, by_rounding = (
        squared_error(x, whole, Student(tmp_path / name).read_quantized(facts.head))
        for name in ("gptq", "rtn")
    )
    assert by_gptq < 0.7 * by_rounding
    if facts.head != facts.embedding:  # rows that are only looked up have no inputs
        embeddings = [
            Student(tmp_path / name).read_quantized(facts.embedding) for name in ("gptq", "rtn")
        ]
        assert (embeddings[0].codes == embeddings[1].codes).all()


def test_two_runs_and_hidden_states_in_files_give_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for number, held_bytes in enumerate([HELD_BYTES, HELD_BYTES, 0]):
        monkeypatch.setattr(hidden_stream, "HELD_BYTES", held_bytes)
        dst = tmp_path / str(number)
        dst.mkdir()
        QuantizeGptq(bits=2).run(tiny("qwen3"), dst)
        runs.append({p.name: p.read_bytes() for p in dst.iterdir()})
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("choice", [{"bits": 2}, {"bits": 4}, {"bits": 4, "zero": "fixed"}])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_every_format_carries_its_scales_as_they_are(
    tiny: Tiny, tmp_path: Path, name: str, choice: dict[str, object]
) -> None:
    quantized, artifact = tmp_path / "quantized", tmp_path / "artifact"
    quantized.mkdir()
    artifact.mkdir()
    QuantizeGptq.model_validate(choice).run(tiny("llama"), quantized)
    student = Student(quantized)
    load_plugin("exporters", name)().export(student, artifact, context_tokens=64)
    if name == "gguf" and choice["bits"] == 2:
        return  # its blocks are read by test_gguf
    stored = FORMATS[name](artifact, student.facts)
    for short, tensor in student.facts.linears(1).items():
        own = student.read_quantized(tensor)
        scales = np.asarray(stored.scales(tensor)).reshape(own.scales.shape)
        if name == "gguf" and short in "qk":  # rows in another order
            own_rows, rows = (s[np.lexsort(s.T)] for s in (own.scales, scales))
            np.testing.assert_array_equal(rows, own_rows)
        else:
            np.testing.assert_array_equal(scales.astype(np.float16), own.scales)


def test_impossible_choices_are_known_before_any_work(tiny: Tiny) -> None:
    facts = Student(tiny("llama")).facts
    assert QuantizeGptq(bits=4).problems(facts, quantized=False) == []
    assert "already" in QuantizeGptq(bits=4).problems(facts, quantized=True)[0]
    assert len(QuantizeGptq(bits=8, group_size=48, zero="integer").problems(facts, False)) >= 2
    assert "head" in QuantizeGptq(bits=4, head=GridChoice(bits=8)).problems(facts, False)[0]
    with pytest.raises(ValueError, match="calibration"):
        QuantizeGptq.model_validate({"bits": 4, "calibration": {"token": 1}})


def test_weights_that_are_not_finite_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source, broken, out = Student(tiny("llama")), tmp_path / "broken", tmp_path / "out"
    broken.mkdir()
    out.mkdir()
    with StudentWriter(broken, source) as writer:
        for name in source.names():
            values = source.read(name)
            if name.endswith("1.mlp.up_proj.weight"):
                values[3, 5] = np.nan
            writer.write(name, values)
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj"):
        QuantizeGptq(bits=8).run(broken, out)


def test_plan_knows_what_a_long_text_takes_and_what_it_does_not(tiny: Tiny) -> None:
    """States of any length lie in files beyond a bound; time goes on growing."""
    facts = Student(tiny("llama")).facts
    costs = [
        QuantizeGptq(bits=4, calibration=Calibration(tokens=tokens)).cost(facts)
        for tokens in (4096, 65536, 10**8, 10**9)
    ]
    assert costs[0].held_bytes < costs[1].held_bytes < costs[2].held_bytes
    assert costs[2].held_bytes == costs[3].held_bytes
    assert costs[3].forward_tokens == pytest.approx(10 * costs[2].forward_tokens, rel=1e-4)


def test_a_triangle_is_inverted_in_place() -> None:
    size = 3 * TRIANGLE_SIZE + 17
    lower = torch.randn(size, size, dtype=torch.float64).tril() / size**0.5
    lower.diagonal().add_(3.0)
    inverse = lower.clone()
    invert_lower(inverse)
    torch.testing.assert_close(inverse, torch.linalg.inv(lower), rtol=1e-9, atol=1e-12)
    assert not inverse.triu(1).any()


def test_a_wide_hessian_in_float32_decides_as_one_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((600, 512)).astype(np.float32)
    x[:, 7] *= 300  # a column of massive activations
    weights = rng.standard_normal((48, 512)).astype(np.float32)
    hessian = x.T @ x / np.float32(len(x))
    found = []
    for exact_columns in (4096, 0):
        monkeypatch.setattr("edgedistill.gptq.EXACT_COLUMNS", exact_columns)
        quantized = Gptq(Inputs(hessian), 32, GptqSettings()).quantize(weights, Grid(4, 32))
        found.append((quantized, output_error(weights, quantized, hessian)))
    (exact, error), (short, short_error) = found
    assert short_error == pytest.approx(error, rel=1e-3)
    assert (exact.codes != short.codes).mean() < 1e-3
