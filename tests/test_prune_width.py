"""Narrower blocks: exactly the masked student, by channels that carry least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from edgedistill.calibration import Calibration
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.hidden_importance import hidden_importance, largest
from edgedistill.pruned_student import BlockWidth, Places, narrow
from edgedistill.pruning_results import PRUNING_FILE, Pruning
from edgedistill.stages.prune_width import PruneWidth
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student
from edgedistill.width_choice import WidthChoice
from tests.pruned import (
    edited,
    empty,
    folded_multiplier,
    load,
    logits,
    mean_kl,
    random_ids,
    without_effect,
)
from tests.tiny import FAMILY_CONFIGS, write_student

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
SHORT = Calibration(sequence_tokens=64)
# What goes, of each kind alone and of all together.
CHANGES: dict[str, dict[str, int]] = {
    "ffn": {"ffn_size": 96},
    "heads": {"kv_heads": 1},
    "hidden": {"hidden_size": 48},
    "all": {"ffn_size": 64, "kv_heads": 1, "hidden_size": 32},
}


def _random_width(
    facts: DecoderFacts, after: DecoderFacts, seed: int = 0
) -> tuple[Places, list[BlockWidth]]:
    rng = np.random.default_rng(seed)

    def some(of: int, count: int) -> npt.NDArray[np.int64]:
        return np.sort(rng.choice(of, count, replace=False))

    blocks = [
        BlockWidth(
            ffn=some(facts.ffn_size, after.ffn_size),
            # Never the same ones in neighbouring layers.
            kv_groups=np.sort((layer + np.arange(after.kv_heads)) % facts.kv_heads),
        )
        for layer in range(facts.layers)
    ]
    return some(facts.hidden_size, after.hidden_size), blocks


def _mask(model: object, facts: DecoderFacts, hidden: Places, blocks: list[BlockWidth]) -> None:
    """Silence in ``transformers``' own modules all that is not kept."""
    inner = model.model  # type: ignore[attr-defined]
    silent = np.setdiff1d(np.arange(facts.hidden_size), hidden)
    group_width = facts.heads // facts.kv_heads * facts.head_dim
    with torch.no_grad():
        # A tied head reads silent channels as zeros in any case.
        inner.embed_tokens.weight[:, silent] = 0
        for layer, block in enumerate(inner.layers):
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight[silent] = 0
            channels = np.setdiff1d(np.arange(facts.ffn_size), blocks[layer].ffn)
            block.mlp.down_proj.weight[:, channels] = 0
            for group in set(range(facts.kv_heads)) - set(blocks[layer].kv_groups.tolist()):
                columns = slice(group * group_width, (group + 1) * group_width)
                block.self_attn.o_proj.weight[:, columns] = 0


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_narrow_student_equals_the_masked_one(
    tiny: Tiny, tmp_path: Path, family: str, change: str
) -> None:
    student = Student(tiny(family))
    after = PruneWidth.model_validate(CHANGES[change]).facts_after(student.facts)
    hidden, blocks = _random_width(student.facts, after)
    narrow(student, tmp_path, hidden, blocks, after)
    assert Student(tmp_path).facts == after
    whole, masked = load(student.path), load(student.path)
    _mask(masked, student.facts, hidden, blocks)
    ids = random_ids()
    expected, found = logits(masked, ids), logits(load(tmp_path), ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (logits(whole, ids) - expected).abs().max() > 0.1


def test_a_bias_of_the_output_is_scaled_with_the_stream(tmp_path: Path) -> None:
    source = write_student(tmp_path / "source", "qwen3", attention_bias=True)
    student = Student(source)
    after = PruneWidth(hidden_size=48).facts_after(student.facts)
    hidden, blocks = _random_width(student.facts, after)
    narrow(student, out := empty(tmp_path / "out"), hidden, blocks, after)
    masked = load(source)
    _mask(masked, student.facts, hidden, blocks)
    silent = np.setdiff1d(np.arange(64), hidden)
    with torch.no_grad():
        for block in masked.model.layers:
            block.self_attn.o_proj.bias[silent] = 0
    ids = random_ids()
    torch.testing.assert_close(logits(load(out), ids), logits(masked, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hidden_scores_are_the_outputs_of_the_norms_of_transformers(
    tiny: Tiny, family: str
) -> None:
    ids, model = random_ids(), load(tiny(family))
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_hook(lambda _, __, out: seen.append(out.abs().mean((0, 1))))
    logits(model, ids)
    assert len(seen) == 2 * model.config.num_hidden_layers + 1
    np.testing.assert_allclose(hidden_importance(tiny(family), ids), sum(seen), rtol=1e-3)


def test_what_does_nothing_goes_first_in_each_layer_by_itself(tiny: Tiny, tmp_path: Path) -> None:
    silent = {layer: np.arange(layer, 128, 2 + layer)[:32] for layer in range(3)}

    def change(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name.endswith("down_proj.weight"):
            values[:, silent[int(name.split(".")[2])]] = 0.0
        elif name.endswith("o_proj.weight"):
            group = int(name.split(".")[2]) % 2
            values[:, group * 32 : (group + 1) * 32] = 0.0
        return values

    student = edited(tiny("llama"), tmp_path / "student", change)
    stage = PruneWidth(ffn_share=0.75, kv_heads=1, multiple_of=32, calibration=SHORT)
    stage.run(student, out := empty(tmp_path / "out"))
    ids = random_ids()
    torch.testing.assert_close(
        logits(load(out), ids), logits(load(student), ids), atol=2e-4, rtol=1e-4
    )
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    assert found.losses[0].kl < 1e-6
    assert found.after["intermediate_size"] == 96
    assert [k.what for k in found.kept] == []  # nothing that carries anything went


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", "ffn"),
        ("llama", "heads"),
        ("qwen3", "all"),
        ("granite", "all"),
        ("granite", "ffn"),
        ("gemma2", "ffn"),
        ("gemma3", "ffn"),
    ],
)
def test_the_fit_makes_up_for_what_went(
    tiny: Tiny, tmp_path: Path, family: str, change: str
) -> None:
    """The same channels, with the matrices behind them as they were and as they are fitted."""
    student, ids = Student(tiny(family)), random_ids()
    after = PruneWidth.model_validate(CHANGES[change]).facts_after(student.facts)
    fitting = random_ids(count=64, seed=9)
    hidden = largest(hidden_importance(student.path, fitting), after.hidden_size)
    fitted = list(WidthChoice(student.path, fitting, hidden, after))
    plain = [BlockWidth(ffn=block.ffn, kv_groups=block.kv_groups) for block in fitted]
    whole = logits(load(student.path), ids)
    costs = []
    for name, blocks in (("fitted", fitted), ("plain", plain)):
        narrow(student, out := empty(tmp_path / name), hidden, blocks, after)
        costs.append(mean_kl(whole, logits(load(out), ids)))
    assert costs[0] < 0.9 * costs[1]


def test_the_fit_knows_a_residual_multiplier(tmp_path: Path) -> None:
    """It is the same model with that multiplied into its matrices: so is what is fitted."""
    fitted = []
    for path in folded_multiplier(tmp_path):
        after = PruneWidth(ffn_size=96).facts_after(Student(path).facts)
        fitted.append(list(WidthChoice(path, random_ids(count=16), np.arange(64), after)))
    for apart, folded in zip(*fitted, strict=True):
        assert (apart.ffn == folded.ffn).all()
        for short, matrix in folded.exits.items():
            np.testing.assert_allclose(apart.exits[short] / 2, matrix, atol=1e-4)


def test_a_chosen_width_costs_less_than_a_random_one(tiny: Tiny, tmp_path: Path) -> None:
    student, ids = Student(tiny("llama")), random_ids()
    after = PruneWidth(ffn_size=96).facts_after(student.facts)
    hidden = np.arange(64)
    chosen = list(WidthChoice(student.path, random_ids(count=64, seed=9), hidden, after))
    plain = [BlockWidth(ffn=block.ffn, kv_groups=block.kv_groups) for block in chosen]
    whole = logits(load(student.path), ids)
    costs = []
    for seed, blocks in enumerate(
        [plain, *(_random_width(student.facts, after, s)[1] for s in (1, 2, 3))]
    ):
        narrow(student, out := empty(tmp_path / str(seed)), hidden, blocks, after)
        costs.append(mean_kl(whole, logits(load(out), ids)))
    assert costs[0] < 0.9 * min(costs[1:])


def test_a_block_without_effect_is_pruned_like_any_other(tiny: Tiny, tmp_path: Path) -> None:
    student = without_effect(tiny("llama"), tmp_path / "student", (1,))
    PruneWidth(ffn_size=64, calibration=SHORT).run(student, out := empty(tmp_path / "out"))
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    (ffn,) = found.kept
    assert (ffn.what, ffn.least <= ffn.mean < 1.0) == ("FFN channels", True)
    assert logits(load(out), random_ids()).isfinite().all()


def test_stage_tells_sizes_parameters_and_shares(tiny: Tiny, tmp_path: Path) -> None:
    stage = PruneWidth(ffn_size=64, hidden_size=32, multiple_of=32, calibration=SHORT)
    stage.run(tiny("llama"), tmp_path)
    found = Pruning.model_validate_json((tmp_path / PRUNING_FILE).read_bytes())
    assert found.parameters_after == sum(p.numel() for p in load(tmp_path).parameters())
    assert (found.before["hidden_size"], found.after["hidden_size"]) == (64, 32)
    assert {k.what for k in found.kept} == {"FFN channels", "hidden channels"}
    assert all(0.5 < k.least <= k.mean < 1.0 for k in found.kept)


def test_impossible_widths_are_known_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    facts = Student(tiny("llama")).facts

    def problems(**fields: float) -> str:
        return " | ".join(PruneWidth.model_validate(fields).problems(facts, quantized=False))

    assert problems(ffn_size=64) == ""
    assert problems(hidden_size=32, multiple_of=32) == ""
    assert "not below" in problems(ffn_size=128)
    assert "multiple of 64" in problems(ffn_size=100)
    assert "kv_heads: 2 is not below" in problems(kv_heads=2)
    assert "query heads" in problems(hidden_size=30, multiple_of=2)
    assert "not below" in problems(ffn_share=0.01, multiple_of=256)
    both = problems(ffn_size=200, hidden_size=72)
    assert both.count("not below") == 2
    assert both.count("multiple of 64") == 2
    assert "quantized" in PruneWidth(ffn_size=64).problems(facts, quantized=True)[0]
    QuantizeRtn(bits=8).run(tiny("llama"), quantized := empty(tmp_path / "int8"))
    with pytest.raises(InputError, match="quantized"):
        PruneWidth(ffn_size=64).run(quantized, empty(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "nothing to prune"),
        ({"ffn_size": 64, "ffn_share": 0.5}, "one of them"),
        ({"ffn_share": 1.0}, "less than 1"),
        ({"kv_heads": 0}, "greater than or equal to 1"),
    ],
)
def test_a_stage_that_says_nothing_or_two_things_is_refused(
    fields: dict[str, float], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        PruneWidth.model_validate(fields)


def test_the_fit_of_wide_blocks_takes_more_than_their_passes(tiny: Tiny) -> None:
    facts = Student(tiny("llama")).facts
    wide = dataclasses.replace(facts, ffn_size=64 * facts.ffn_size)

    def passes(of: DecoderFacts) -> float:
        return PruneWidth(ffn_share=0.5, multiple_of=1).cost(of).forward_tokens

    text = 2 * 16384 + 4 * 2048
    assert text < passes(facts) < passes(wide)
    # Twice as many operations a parameter where the matrix that is fitted is twice as wide.
    assert passes(dataclasses.replace(wide, ffn_size=2 * wide.ffn_size)) > 1.8 * passes(wide)
