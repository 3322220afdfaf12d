"""Text that a student continues itself: whose it is, what is learned on it, killed runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill import distill
from edgedistill.calibration import Calibration
from edgedistill.continuation import continued
from edgedistill.distill import Distillation, DistillSettings
from edgedistill.distill_loss import LossSettings
from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.learner import Learner
from edgedistill.on_policy import is_drawn
from edgedistill.pruned_student import drop_layers
from edgedistill.stages.heal import Heal
from edgedistill.student import Student
from edgedistill.trainable_decoder import TrainableDecoder
from edgedistill.training_text import TrainingText
from tests.interrupted import Interruption
from tests.pruned import edited, empty, load, logits, random_ids
from tests.tiny import FAMILY_CONFIGS, write_student

Tiny = Callable[[str], Path]
BUDGET: dict[str, Any] = {
    "tokens": 1024,
    "batch_tokens": 128,
    "held_out_tokens": 256,
    "evaluations": 4,
    "calibration": Calibration(sequence_tokens=64),
}


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama without its middle block."""
    out = tmp_path_factory.mktemp("pruned")
    drop_layers(Student(tiny("llama")), out, (1,))
    return out


def _continued(student: Path, text: TrainingText, seed: int = 0) -> TrainingText:
    rows = range(len(text.ids))
    return continued(TrainableDecoder(Student(student), "full"), text, rows, rows, seed)


def _surprise(student: Path, ids: torch.Tensor, given: int) -> float:
    """How far the tokens behind ``given`` are from draws of the student in ``transformers``.

    Its surprise at them less what it would be on average, in standard deviations.
    """
    log_p = logits(load(student), ids)[:, given - 1 : -1].double().log_softmax(-1)
    p = log_p.exp()
    seen = -log_p.gather(2, ids[:, given:, None])[..., 0]
    mean = -(p * log_p).sum(-1)
    variance = (p * log_p.square()).sum(-1) - mean.square()
    return float((seen - mean).sum() / variance.sum().sqrt())


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_what_is_written_is_drawn_from_what_transformers_predicts(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    student, ids = tiny(family), random_ids(10, 64)
    found = _continued(student, TrainingText.plain(ids.clone()))
    assert found.given == 32
    assert torch.equal(found.ids[:, :32], ids[:, :32])
    assert abs(_surprise(student, found.ids, 32)) < 4
    assert abs(_surprise(student, ids, 32)) > 8
    assert abs(_surprise(write_student(tmp_path / "other", family, seed=1), found.ids, 32)) > 8


def test_a_student_that_knows_one_token_writes_it(tiny: Tiny, tmp_path: Path) -> None:
    """Channel 0 of its stream is large at every token, and one row of the head alone reads it."""

    def change(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name == "model.embed_tokens.weight":
            values[:, 0] = 1000.0
        elif name == "lm_head.weight":
            values[:] = 0.0
            values[77, 0] = 100.0
        return values

    student = edited(tiny("mistral"), tmp_path / "one", change)
    ids = random_ids(2, 40)
    found = _continued(student, TrainingText.plain(ids.clone()))
    assert torch.equal(found.ids[:, :20], ids[:, :20])
    assert (found.ids[:, 20:] == 77).all()


def test_a_sequence_is_written_by_its_seed_and_number_alone(tiny: Tiny) -> None:
    learner = TrainableDecoder(Student(tiny("llama")), "lora", rank=2)
    text = TrainingText.plain(random_ids(1, 24).expand(10, 24).clone())

    def write(numbers: Sequence[int], seed: int = 0) -> torch.Tensor:
        return continued(learner, text, [0] * len(numbers), numbers, seed).ids

    torch.manual_seed(1)
    together = write(range(10))
    torch.manual_seed(2)
    assert torch.equal(write(range(10)), together)
    assert len(torch.unique(together, dim=0)) == 10
    assert torch.equal(write([9])[0], together[9])
    assert not torch.equal(write(range(10), seed=1), together)


def test_places_of_unknown_text_share_the_weight_of_what_they_replace(tiny: Tiny) -> None:
    ids = random_ids(2, 20)
    weights = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    text = TrainingText(ids, weights.clone())
    found = _continued(tiny("llama"), text).weights
    assert torch.equal(text.weights, weights)
    assert torch.equal(found[:, :9], weights[:, :9])
    for row in (0, 1):
        expected = sum(float(weights[row, place]) for place in range(9, 20)) / 11
        np.testing.assert_allclose(found[row, 9:], expected, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_the_share_is_kept_in_every_stretch(share: float) -> None:
    drawn = [is_drawn(number, share) for number in range(1000)]
    for start in range(0, 980, 7):
        assert abs(sum(drawn[start : start + 20]) - 20 * share) <= 1.0
    assert abs(sum(drawn) - 1000 * share) <= 1.0
    if share in (0.0, 1.0):
        assert set(drawn) == {bool(share)}


def test_the_loss_is_that_of_the_text_as_it_was_written(
    tiny: Tiny, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence as given, whose teacher was asked before, and one continued; in transformers."""
    seen: list[torch.Tensor] = []

    def watched(student: Learner, *args: Any) -> TrainingText:
        text = continued(student, *args)
        seen.append(text.ids)
        return text

    monkeypatch.setattr(distill, "continued", watched)
    text = TrainingText.plain(random_ids(2, 32))
    settings = DistillSettings(
        tokens=128,
        batch_tokens=64,
        learning_rate=1e-3,
        loss=LossSettings(next_token_weight=0.3),
        evaluations=2,
        on_policy=0.5,
    )
    learner = TrainableDecoder(Student(pruned), "full")
    state = Distillation(learner, Student(tiny("llama")), settings).train(text, text)
    assert [ids.shape for ids in seen] == [(1, 32)] * 2
    begun = [torch.equal(ids[:16], seen[0][0, :16]) for ids in text.ids]
    assert sorted(begun) == [False, True]
    both = torch.stack([text.ids[begun.index(False)], seen[0][0]])
    own, other = (logits(load(path), both) for path in (pruned, tiny("llama")))
    p, log_q = other.softmax(-1), own.log_softmax(-1)
    kl = float((p * (p.log() - log_q)).sum())
    plain = -log_q[:, :-1].gather(2, both[:, 1:, None])[..., 0]
    # Of its own words a student has nothing to learn: the last given token is predicted at 14.
    expected = kl + 0.3 * float(plain[0].sum() + plain[1, :15].sum())
    assert state.curve[1].loss == pytest.approx(expected / 64, rel=1e-4)
    # What decides is the KL on the text as it was given.
    own, other = (logits(load(path), text.ids) for path in (pruned, tiny("llama")))
    p = other.softmax(-1)
    held_out = float((p * (p.log() - own.log_softmax(-1))).sum(-1).mean())
    assert state.curve[0].held_out_kl == pytest.approx(held_out, rel=1e-4)


def test_a_plan_counts_what_is_written(tiny: Tiny) -> None:
    facts = Student(tiny("llama")).facts
    plain = Heal().cost(facts)
    # 32 steps, of 4 sequences: 256 given tokens each, then 256 places at the price of 20 tokens.
    for share, given in ((1.0, 4), (0.5, 2), (0.25, 1)):
        more = Heal(on_policy=share).cost(facts).forward_tokens - plain.forward_tokens
        assert more == 32 * (256 * given + 20 * 256)
    rare = Heal(on_policy=0.125).cost(facts).forward_tokens - plain.forward_tokens
    assert rare == 16 * (256 + 20 * 256)
    assert Heal(on_policy=1.0).cost(facts).held_bytes >= plain.held_bytes
    wide = facts.__class__(**{**vars(facts), "kv_heads": 4096})
    many = Heal(on_policy=1.0).cost(wide).held_bytes - Heal().cost(wide).held_bytes
    keys_and_values = 2 * 4 * 3 * 4096 * facts.head_dim * 512 * 4
    assert keys_and_values * 0.9 < many <= keys_and_values


def test_nothing_is_written_beside_a_record(tiny: Tiny, tmp_path: Path) -> None:
    facts = Student(tiny("llama")).facts
    file = tmp_path / "record.jsonl"
    file.write_text(json.dumps({"prompt": "A film", "answer": "good"}) + "\n", encoding="utf-8")
    (problem,) = Heal(recorded=file, on_policy=0.5).problems(facts, quantized=False)
    assert problem == "on_policy: means nothing beside `recorded`"
    assert Heal(on_policy=0.5).problems(facts, quantized=False) == []


def _heal(stage: Heal, src: Path, dst: Path, teacher: Path, work: Path | None = None) -> Healing:
    stage.run_beside(src, empty(dst), teacher=teacher, work=work)
    return Healing.model_validate_json((dst / HEALING_FILE).read_bytes())


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.slow
def test_own_text_lowers_the_held_out_kl_and_a_killed_run_writes_it_again(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, work = Heal(on_policy=1.0, **BUDGET), empty(tmp_path / "work")
    found = _heal(stage, pruned, tmp_path / "whole", tiny("llama"))
    assert found.kl_after < 0.98 * found.kl_before
    interruption = Interruption(monkeypatch, after=5)
    with pytest.raises(KeyboardInterrupt):
        _heal(stage, pruned, tmp_path / "killed", tiny("llama"), work)
    interruption.lift()
    _heal(stage, pruned, tmp_path / "resumed", tiny("llama"), work)
    assert interruption.taken == 4  # from the evaluation after 4 steps to the 8th
    assert _files(tmp_path / "resumed") == _files(tmp_path / "whole")


@pytest.mark.slow
def test_without_a_share_nothing_is_written(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _heal(Heal(on_policy=0.5, **BUDGET), pruned, tmp_path / "half", tiny("llama"))
    monkeypatch.delattr(distill, "continued")
    for name, stage in {"none": Heal(on_policy=0.0, **BUDGET), "plain": Heal(**BUDGET)}.items():
        _heal(stage, pruned, tmp_path / name, tiny("llama"))
    assert _files(tmp_path / "none") == _files(tmp_path / "plain") != _files(tmp_path / "half")
