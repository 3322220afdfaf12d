"""Dropping blocks: what is written, what the search picks, what it tells."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill.block_importance import angular_distance, block_influence, nearest_run
from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.depth_search import search_depth
from edgedistill.errors import InputError
from edgedistill.held_out import split_text
from edgedistill.pruned_student import drop_layers
from edgedistill.pruning_results import PRUNING_FILE, DomainLoss, Pruning, second_loses_more
from edgedistill.stages.prune_depth import PruneDepth
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student, read_json, write_json
from tests.pruned import edited, empty, load, logits, mean_kl, random_ids, without_effect
from tests.tiny import FAMILY_CONFIGS, write_student

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
SHORT = Calibration(sequence_tokens=64)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of six blocks."""
    return write_student(tmp_path_factory.mktemp("deep") / "student", num_hidden_layers=6)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_shallower_student_equals_the_whole_one_with_blocks_skipped(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    whole = tiny(family)
    drop_layers(Student(whole), empty(tmp_path / "out"), (1,))
    model = load(whole)
    del model.model.layers[1]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    layers = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers - 1
    if getattr(model.config, "layer_types", None):
        del model.config.layer_types[1]
    pruned = load(tmp_path / "out")
    assert len(pruned.model.layers) == layers - 1
    ids = random_ids()
    assert torch.equal(logits(pruned, ids), logits(model, ids))
    assert not torch.allclose(logits(pruned, ids), logits(load(whole), ids), atol=0.1)


def test_lists_of_the_config_lose_the_entries_of_dropped_layers(tiny: Tiny, tmp_path: Path) -> None:
    student = Student(tiny("llama"))
    student.config["layer_types"] = ["full_attention", "other", "full_attention"]
    student.config["eos_token_id"] = [2, 0, 1]
    drop_layers(student, tmp_path, (1,))
    written = read_json(tmp_path / "config.json")
    assert written["layer_types"] == ["full_attention", "full_attention"]
    assert written["eos_token_id"] == [2, 0, 1]
    assert Student(tmp_path).facts.layers == 2
    assert set(Student(tmp_path).names()) == set(Student(tmp_path).facts.tensor_shapes())


@pytest.mark.parametrize("silent", [(0,), (3,), (2, 4)], ids=str)
def test_search_picks_the_blocks_that_do_nothing(
    deep: Path, tmp_path: Path, silent: tuple[int, ...]
) -> None:
    student = without_effect(deep, tmp_path / "silent", silent)
    found = search_depth(student, random_ids(), drop=len(silent), candidates=6, beam=1)
    assert found.dropped == silent
    assert found.kl < 1e-9


def test_search_keeps_a_block_that_hardly_turns_the_states_but_decides_the_answer(
    tmp_path: Path,
) -> None:
    """Block 3 writes a little into one channel, which only the head reads, and very loudly."""
    plain = write_student(tmp_path / "plain", num_hidden_layers=6, tie_word_embeddings=False)

    def change(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[: -1 if "layers.3." in name else 0] = 0.0
            values[-1] *= 0.3 if "layers.3." in name else 0.0
        elif name == "model.norm.weight":
            values[-1] = 60.0
        return values

    student = edited(plain, tmp_path / "student", change)
    found = search_depth(student, random_ids(), drop=1, candidates=6, beam=1)
    by_search, by_influence, _ = found.sets
    assert by_influence.blocks == [3]
    assert found.dropped != (3,)
    assert by_influence.kl > 2 * by_search.kl


def test_told_kl_is_what_transformers_measures(deep: Path, tmp_path: Path) -> None:
    ids = random_ids()
    whole = logits(load(deep), ids)
    found = search_depth(deep, ids, drop=2, candidates=2, beam=1)
    for number, (blocks, kl) in enumerate(
        [(tuple(s.blocks), s.kl) for s in found.sets]
        + [(tuple(sorted([*t.dropped, t.block])), t.kl) for t in found.tried]
    ):
        drop_layers(Student(deep), out := empty(tmp_path / str(number)), blocks)
        assert kl == pytest.approx(mean_kl(whole, logits(load(out), ids)), rel=1e-3)


def test_a_wide_search_finds_the_best_pair_of_all(deep: Path, tmp_path: Path) -> None:
    ids = random_ids(1, 24)
    whole = logits(load(deep), ids)
    costs = {}
    for pair in itertools.combinations(range(6), 2):
        drop_layers(Student(deep), out := empty(tmp_path / f"{pair}"), pair)
        costs[pair] = mean_kl(whole, logits(load(out), ids))
    found = search_depth(deep, ids, drop=2, candidates=6, beam=6)
    assert found.dropped == min(costs, key=costs.__getitem__)
    greedy = search_depth(deep, ids, drop=2, candidates=6, beam=1)
    assert found.kl <= greedy.kl


def test_scores_are_the_papers_by_hand() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 5, 7)) for _ in range(5)]
    states = [torch.from_numpy(a.astype(np.float32)) for a in arrays]

    def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.asarray(np.einsum("stc,stc->st", a, b) / lengths)

    by_hand = [1 - cosines(a, b).mean() for a, b in itertools.pairwise(arrays)]
    np.testing.assert_allclose(block_influence(states), by_hand, rtol=1e-5)
    angles = [np.arccos(cosines(arrays[i], arrays[i + 2])).mean() / np.pi for i in range(3)]
    assert angular_distance(states[0], states[2]) == pytest.approx(angles[0], rel=1e-5)
    start, distance = nearest_run(states, 2)
    assert start == int(np.argmin(angles))
    assert distance == pytest.approx(min(angles), rel=1e-5)


def test_stage_writes_a_student_and_what_it_found(deep: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text("x = [i ** 2 for i in range(10)]\n" * 200, encoding="utf-8")
    stage = PruneDepth(layers=2, search_tokens=256, second=second, calibration=SHORT)
    stage.run(deep, out := empty(tmp_path / "out"))
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    facts = Student(deep).facts
    assert Student(out).facts == stage.facts_after(facts)
    assert found.after == {"num_hidden_layers": 4}
    assert found.parameters_after == sum(p.numel() for p in load(out).parameters())
    assert found.parameters_before - found.parameters_after == sum(
        p.numel()
        for layer in found.dropped_layers
        for p in load(deep).model.layers[layer].parameters()
    )
    assert [s.chosen_by for s in found.sets] == ["search", "block influence", "angular distance"]
    assert [loss.domain for loss in found.losses] == ["calibration", "second"]
    text = split_text(deep, SHORT, Chat(), held_out_tokens=256).held_out
    whole, pruned = (logits(load(path), text) for path in (deep, out))
    assert found.losses[0].kl == pytest.approx(mean_kl(whole, pruned), rel=1e-3)


def test_stage_writes_the_same_bytes_again(deep: Path, tmp_path: Path) -> None:
    stage = PruneDepth(layers=1, search_tokens=128, calibration=SHORT)
    runs = [empty(tmp_path / name) for name in ("a", "b")]
    for out in runs:
        stage.run(deep, out)
    first, again = ({p.name: p.read_bytes() for p in out.iterdir()} for out in runs)
    assert first == again


def test_a_second_domain_that_loses_much_more_raises_the_flag() -> None:
    def losses(second: float) -> list[DomainLoss]:
        pairs = (("calibration", 0.2), ("second", second))
        return [DomainLoss.model_validate({"domain": d, "tokens": 9, "kl": k}) for d, k in pairs]

    assert second_loses_more(losses(0.31))
    assert not second_loses_more(losses(0.29))
    assert not second_loses_more(losses(9.0)[:1])


def test_impossible_depths_are_known_before_any_work(deep: Path, tmp_path: Path) -> None:
    facts = Student(deep).facts
    assert PruneDepth(layers=5).problems(facts, quantized=False) == []
    assert "leaves none" in PruneDepth(layers=6).problems(facts, quantized=False)[0]
    assert "quantized" in PruneDepth(layers=1).problems(facts, quantized=True)[0]
    with pytest.raises(InputError, match="leaves none"):
        PruneDepth(layers=9).run(deep, tmp_path)
    QuantizeRtn(bits=8).run(deep, quantized := empty(tmp_path / "int8"))
    with pytest.raises(InputError, match="quantized"):
        PruneDepth(layers=1).run(quantized, tmp_path)


def test_a_text_too_short_to_hold_any_out_is_refused(deep: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The quick brown fox. " * 40, encoding="utf-8")
    calibration = Calibration(file=file, tokens=64, sequence_tokens=64)
    with pytest.raises(InputError, match="held out"):
        PruneDepth(layers=1, calibration=calibration).run(deep, empty(tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "counted", "dropped"),
    [
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 2}, (0,)),
        ("gemma2", {"layer_types": None}, (0,)),
        ("qwen3_sliding", {"layer_types": None, "max_window_layers": 1}, (0,)),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, (0,)),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 1, 1]}, (0,)),
    ],
    ids=str,
)
def test_layers_keep_their_kind_where_the_config_counts_them(
    tiny: Tiny, tmp_path: Path, family: str, counted: dict[str, Any], dropped: tuple[int, ...]
) -> None:
    """A pattern that is stated as a number would give the layer that is last now another kind."""
    source = Path(shutil.copytree(tiny(family), tmp_path / "source"))
    config = read_json(source / "config.json") | counted
    write_json(source / "config.json", {k: v for k, v in config.items() if v is not None})
    drop_layers(Student(source), empty(tmp_path / "out"), dropped)
    before, after = Student(source).facts, Student(tmp_path / "out").facts
    kept = [layer for layer in range(before.layers) if layer not in dropped]
    for new, old in enumerate(kept):
        assert after.window_of(new) == before.window_of(old)
        assert after.rope_of(new) == before.rope_of(old)
    whole, pruned = load(source), load(tmp_path / "out")
    for new, old in enumerate(kept):
        theirs = [m.model.layers[i].self_attn for m, i in ((whole, old), (pruned, new))]
        for attribute in ("sliding_window", "use_rope"):
            assert len({getattr(one, attribute, None) for one in theirs}) == 1
