"""Healing: the loss and the training against transformers, what is written, killed runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.distill import Distillation, DistillSettings
from edgedistill.distill_loss import LossSettings, soft_loss
from edgedistill.errors import InputError, StageError
from edgedistill.held_out import split_text
from edgedistill.pruned_student import drop_layers
from edgedistill.stages.heal import Heal
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student
from edgedistill.trainable_decoder import TrainableDecoder, Trained
from edgedistill.training_text import TrainingText
from tests.interrupted import Interruption
from tests.pruned import edited, empty, file_bytes, heal, load, logits, mean_kl, random_ids
from tests.tiny import FAMILY_CONFIGS, parts_of

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
SHORT = Calibration(sequence_tokens=64)
BUDGET: dict[str, Any] = {
    "tokens": 2048,
    "batch_tokens": 128,
    "held_out_tokens": 256,
    "evaluations": 4,
    "calibration": SHORT,
}


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama without its middle block."""
    out = tmp_path_factory.mktemp("pruned")
    drop_layers(Student(tiny("llama")), out, (1,))
    return out


def test_loss_is_hintons_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    own, teacher = (rng.normal(0, 3, (5, 17)) for _ in range(2))

    def softened(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        e = np.exp(x / 2.5)
        return np.asarray(e / e.sum(axis=-1, keepdims=True))

    p, q = softened(teacher), softened(own)
    expected = 2.5**2 * (p * np.log(p / q)).sum()
    found = soft_loss(torch.from_numpy(own), torch.from_numpy(teacher), 2.5)
    assert float(found.sum()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_first_step_is_the_one_that_transformers_and_its_gradients_take(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    """One step at a tiny rate: AdamW moves each weight by the rate, against its gradient's sign."""
    student = Student(tiny(family))
    drop_layers(student, tmp_path, (0,))
    pruned = Student(tmp_path)
    ids = random_ids(2, 300)  # more positions than lie in memory at once
    decoder = TrainableDecoder(pruned, "full")
    settings = DistillSettings(
        tokens=600, batch_tokens=600, learning_rate=1e-4, loss=LossSettings(2.0, 0.3)
    )
    text = TrainingText.plain(ids)
    state = Distillation(decoder, student, settings).train(text, text)
    model = load(tmp_path)
    own, teacher = model(ids).logits, logits(load(student.path), ids)
    p, log_q = (teacher / 2).softmax(-1), (own / 2).log_softmax(-1)
    kl = 4 * (p * (p.log() - log_q)).sum()
    log_probs = own[:, :-1].log_softmax(-1)
    plain = -log_probs.gather(2, ids[:, 1:, None]).sum()
    loss = (kl + 0.3 * plain) / 600
    loss.backward()
    assert state.curve[1].loss == pytest.approx(float(loss), rel=1e-4)
    moved = dict(decoder.merged())
    same = total = 0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        step = np.concatenate([moved[part] - pruned.read(part) for part in parts_of(name)])[clear]
        same += int((np.sign(step) == -np.sign(gradient[clear])).sum())
        total += step.size
    assert same / total > 0.999


@pytest.mark.parametrize("trained", ["full", "lora", "norms"])
def test_healing_lowers_the_kl_that_transformers_measures(
    tiny: Tiny, pruned: Path, tmp_path: Path, trained: Trained
) -> None:
    teacher = tiny("llama")
    found = heal(Heal(trained=trained, **BUDGET), pruned, out := tmp_path / "out", teacher)
    text = split_text(pruned, SHORT, Chat(), held_out_tokens=256).held_out
    expected = logits(load(teacher), text)
    before, after = (mean_kl(expected, logits(load(path), text)) for path in (pruned, out))
    assert after < 0.98 * before
    assert found.kl_before == pytest.approx(before, rel=1e-3)
    assert found.kl_after == pytest.approx(after, rel=1e-3)
    assert found.kl_after == min(point.held_out_kl for point in found.curve)
    assert [point.step for point in found.curve] == [0, 4, 8, 12, 16]
    assert found.curve[-1].tokens == 2048
    assert Student(out).facts == Student(pruned).facts


def test_only_what_is_trained_moves(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    teacher, source = tiny("llama"), Student(pruned)
    for trained in ("norms", "lora"):
        stage = Heal.model_validate({"trained": trained, "rank": 4, **BUDGET})
        found = heal(stage, pruned, out := tmp_path / trained, teacher)
        healed = Student(out)
        moved = {n for n in source.names() if (healed.read(n) != source.read(n)).any()}
        assert moved
        assert all(("norm" in name) == (trained == "norms") for name in moved)
        if trained == "lora":
            linears = [n for layer in range(2) for n in source.facts.linears(layer).values()]
            assert moved == set(linears)
            for name in linears:
                change = healed.read(name).astype(np.float64) - source.read(name)
                sizes = np.linalg.svd(change, compute_uv=False)
                assert sizes[4] < 1e-5 * sizes[0] + 1e-6
            numbers = sum(4 * sum(source.shape(name)) for name in linears)
            assert found.parameters_trained == numbers


def test_healing_twice_writes_the_same_bytes(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        heal(Heal(trained="lora", **BUDGET), pruned, tmp_path / name, tiny("llama"))
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_run_that_was_killed_ends_in_the_bytes_of_one_that_was_not(
    tiny: Tiny, pruned: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, work = Heal(trained=trained, **BUDGET), empty(tmp_path / "work")
    heal(stage, pruned, tmp_path / "whole", tiny("llama"))
    interruption = Interruption(monkeypatch, after=10)
    with pytest.raises(KeyboardInterrupt):
        heal(stage, pruned, tmp_path / "killed", tiny("llama"), work)
    assert not list((tmp_path / "killed").iterdir())
    interruption.lift()
    heal(stage, pruned, tmp_path / "resumed", tiny("llama"), work)
    assert interruption.taken == 8  # from the evaluation after 8 steps to the 16th
    assert file_bytes(tmp_path / "resumed") == file_bytes(tmp_path / "whole")


def test_training_stops_when_the_held_out_kl_ceases_to_fall_and_keeps_the_best(
    tiny: Tiny, pruned: Path, tmp_path: Path
) -> None:
    """At a rate that first helps and then destroys."""
    settings = BUDGET | {"tokens": 8192, "evaluations": 64, "patience": 2}
    stage = Heal(learning_rate=0.006, **settings)
    found = heal(stage, pruned, out := tmp_path / "out", tiny("llama"))
    assert found.stopped_early
    assert found.curve[-1].step == found.kept_step + 2 * (found.curve[1].step)
    assert found.kl_after < found.curve[-1].held_out_kl
    text = split_text(pruned, SHORT, Chat(), held_out_tokens=256).held_out
    kl = mean_kl(logits(load(tiny("llama")), text), logits(load(out), text))
    assert kl == pytest.approx(found.kl_after, rel=1e-3)


def test_healing_that_makes_it_worse_is_an_error(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    stage = Heal(learning_rate=1.0, **BUDGET)
    with pytest.raises(StageError, match=r"did not lower|held-out KL is"):
        heal(stage, pruned, tmp_path / "out", tiny("llama"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_text_of_its_own_is_read_as_often_as_told(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("I love this film! It was terrible, though.\n" * 150, encoding="utf-8")
    fields = BUDGET | {"tokens": 1024, "data": data}
    found = heal(Heal(passes=2, **fields), pruned, tmp_path / "out", tiny("llama"))
    assert found.curve[-1].tokens == 1024
    with pytest.raises(InputError, match="tokens"):
        heal(Heal(**fields | {"tokens": 65536}), pruned, tmp_path / "more", tiny("llama"))


def test_teachers_that_do_not_fit_are_refused(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    facts = Student(pruned).facts
    assert Heal(teacher=tiny("llama")).problems(facts, quantized=False) == []
    assert "quantized" in Heal().problems(facts, quantized=True)[0]
    assert "no config.json" in Heal(teacher=tmp_path).problems(facts, quantized=False)[0]
    assert "rank" in Heal(trained="lora", rank=100).problems(facts, quantized=False)[0]
    with pytest.raises(InputError, match="no teacher"):
        Heal().run(pruned, tmp_path)
    other = edited(tiny("llama"), tmp_path / "other", lambda name, values: values)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="another tokenizer"):
        Heal(teacher=other, **BUDGET).run(pruned, empty(tmp_path / "out"))
    QuantizeRtn(bits=8).run(pruned, quantized := empty(tmp_path / "int8"))
    with pytest.raises(InputError, match="quantized"):
        heal(Heal(**BUDGET), quantized, tmp_path / "none", tiny("llama"))


def test_a_teacher_of_another_size_of_vocabulary_is_refused(pruned: Path, tmp_path: Path) -> None:
    from tests.tiny import write_student

    teacher = write_student(tmp_path / "teacher", vocab_size=600)
    problems = Heal(teacher=teacher).problems(Student(pruned).facts, quantized=False)
    assert "600 tokens" in problems[0]


def test_weights_that_are_not_numbers_are_told(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    def change(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name == "model.norm.weight":
            values[0] = math.nan
        return values

    broken = edited(pruned, tmp_path / "broken", change)
    with pytest.raises(StageError, match="before any training"):
        heal(Heal(**BUDGET), broken, tmp_path / "out", tiny("llama"))


def test_a_damaged_checkpoint_is_told_with_its_place(
    tiny: Tiny, pruned: Path, tmp_path: Path
) -> None:
    work = empty(tmp_path / "work")
    (work / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(StageError, match=r"state\.pt") as caught:
        heal(Heal(**BUDGET), pruned, tmp_path / "out", tiny("llama"), work)
    assert "delete it" in str(caught.value)
