"""Training in several processes and on a GPU: the same steps, the same bytes again, told failures.

No GPU is needed: torch's meta device stands for one, and nothing may mix it with another.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgedistill.calibration import Calibration
from edgedistill.distill import Distillation, DistillSettings
from edgedistill.distill_loss import LossSettings
from edgedistill.errors import UnavailableError
from edgedistill.grid_learner import GridLearner
from edgedistill.learner import Learner
from edgedistill.pruned_student import drop_layers
from edgedistill.stages.heal import Heal
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.stages.recover import Recover
from edgedistill.student import Student
from edgedistill.team import Team
from edgedistill.team_launch import run_in_team
from edgedistill.trainable_decoder import TrainableDecoder
from edgedistill.training_text import Recorded, TrainingText
from tests.interrupted import Interruption
from tests.pruned import empty, file_bytes, heal, random_ids

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
GPU = torch.device("meta")  # stands for one
SHORT = Calibration(sequence_tokens=64)
BUDGET: dict[str, Any] = {
    "tokens": 1024,
    "batch_tokens": 192,  # 3 sequences: of two processes one has more to do
    "held_out_tokens": 192,
    "evaluations": 2,
    "calibration": SHORT,
}


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama without its middle block."""
    out = tmp_path_factory.mktemp("pruned")
    drop_layers(Student(tiny("llama")), out, (1,))
    return out


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, v and o on 8 bits, all else on 2."""
    out = tmp_path_factory.mktemp("quantized")
    grids = {"bits": 2, "linears": {"v": {"bits": 8}, "o": {"bits": 8}}}
    QuantizeRtn.model_validate(grids).run(tiny("llama"), out)
    return out


@pytest.mark.parametrize("more", [{}, {"trained": "lora", "on_policy": 0.5}, {"processes": 3}])
def test_processes_take_the_steps_of_one(
    tiny: Tiny, pruned: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    alone = Heal.model_validate({**BUDGET, **more, "processes": 1})
    together = Heal.model_validate({"processes": 2, **BUDGET, **more})
    one = heal(alone, pruned, tmp_path / "one", tiny("llama"))
    several = heal(together, pruned, tmp_path / "several", tiny("llama"))
    for expected, found in zip(one.curve, several.curve, strict=True):
        assert found.held_out_kl == pytest.approx(expected.held_out_kl, rel=1e-4)
    losses = [[point.loss for point in run.curve[1:]] for run in (several, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    healed, expected_weights = Student(tmp_path / "several"), Student(tmp_path / "one")
    before = Student(pruned)
    for name in before.names():
        moved = expected_weights.read(name) - before.read(name)
        apart = healed.read(name) - expected_weights.read(name)
        assert np.linalg.norm(apart) <= 0.02 * np.linalg.norm(moved)


def test_an_adapter_is_recovered_together_as_alone(
    tiny: Tiny, quantized: Path, tmp_path: Path
) -> None:
    curves = []
    for processes in (1, 2):
        stage = Recover.model_validate({**BUDGET, "processes": processes})
        dst = empty(tmp_path / str(processes))
        stage.run_beside(quantized, dst, teacher=tiny("llama"), work=None)
        curve = json.loads((dst / "recovery.json").read_text())["curve"]
        curves.append([point["held_out_kl"] for point in curve])
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)  # a code may round the other way
    assert curves[0][-1] < curves[0][0]


def test_a_team_that_was_killed_ends_in_the_bytes_of_one_that_was_not(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, work = Heal(processes=2, **BUDGET), empty(tmp_path / "work")
    heal(stage, pruned, tmp_path / "whole", tiny("llama"))
    interruption = Interruption(monkeypatch, after=3)  # of the first process
    with pytest.raises(KeyboardInterrupt):
        heal(stage, pruned, tmp_path / "killed", tiny("llama"), work)
    assert not list((tmp_path / "killed").iterdir())
    interruption.lift()
    heal(stage, pruned, tmp_path / "resumed", tiny("llama"), work)
    assert interruption.taken == 3  # from the evaluation after 2 of 5 steps
    assert file_bytes(tmp_path / "resumed") == file_bytes(tmp_path / "whole")


def _add_up(team: Team, *, out: Path) -> None:
    tensor = torch.full((3,), float(team.rank + 1))
    team.add_up([tensor])
    total = team.total(0.1 * (team.rank + 1))
    shares = [list(team.share(range(7))), team.size, team.leads]
    (out / str(team.rank)).write_text(json.dumps([tensor.tolist(), total, shares]))


def test_all_have_the_sum_and_each_its_share(tmp_path: Path) -> None:
    for _ in range(2):  # one team after another in one process
        run_in_team(partial(_add_up, out=tmp_path), "cpu", 3)
        found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
        assert [sums for sums, _, _ in found] == [[6.0] * 3] * 3
        assert [total for _, total, _ in found] == pytest.approx([0.6] * 3)
        assert sorted(n for _, _, shares in found for n in shares[0]) == list(range(7))
        assert [shares[1:] for _, _, shares in found] == [[3, True], [3, False], [3, False]]
    assert "RANK" not in os.environ


def _die(team: Team) -> None:
    if not team.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    team.total(1.0)


def test_a_process_that_dies_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        run_in_team(_die, "cpu", 2)
    assert "a process that trained along ended with -9" in capfd.readouterr().err


def test_gpus_that_are_not_there_are_told(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    stage = Heal(device="gpu", processes=2, **BUDGET)
    with pytest.raises(UnavailableError, match="2 GPUs are asked for, and torch finds 1") as error:
        heal(stage, pruned, tmp_path / "out", tiny("llama"))
    assert "device: cpu" in str(error.value)


@pytest.mark.parametrize("stage", [Heal, Recover])
def test_more_processes_than_sequences_are_refused(
    tiny: Tiny, stage: type[Heal] | type[Recover]
) -> None:
    many = stage.model_validate({**BUDGET, "processes": 4})
    facts = Student(tiny("llama")).facts
    (problem,) = many.problems(facts, stage is Recover)
    assert "processes: 4 cannot share the 3 sequences of a step" in problem
    assert "256" in problem
    few = stage.model_validate({**BUDGET, "processes": 3})
    assert not few.problems(facts, stage is Recover)


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a GPU does: operations on tensors of two devices, copies excepted."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if len({tensor.device for tensor in tensors}) > 1 and "copy" not in str(func):
            raise RuntimeError(f"{func} on tensors of two devices")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a device of its own that have no values: what is asked for falls every time."""
    values: Iterator[float] = (1.0 / count for count in range(1, 1_000_000))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: next(values))
    plain = torch.optim.AdamW
    # There is no fused kernel for it, as there is for GPUs.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **k: plain(groups, **k))
    with OneDevice():  # type: ignore[no-untyped-call]
        yield


def _learners(pruned: Path, quantized: Path) -> dict[str, Callable[[], Learner]]:
    return {
        "full": lambda: TrainableDecoder(Student(pruned), "full", device=GPU),
        "lora": lambda: TrainableDecoder(Student(pruned), "lora", 4, device=GPU),
        "adapter": lambda: GridLearner(Student(quantized), "adapter", device=GPU),
    }


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("trained", ["full", "lora", "adapter"])
@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_everything_that_a_gpu_trains_with_is_on_it(
    tiny: Tiny,
    pruned: Path,
    quantized: Path,
    trained: str,
    on_policy: float,
) -> None:
    text = TrainingText.plain(random_ids(4, 48))
    loss = LossSettings(2.0, 0.3, 0.5)
    settings = DistillSettings(
        tokens=384, batch_tokens=96, evaluations=2, loss=loss, on_policy=on_policy
    )
    learner = _learners(pruned, quantized)[trained]()
    run = Distillation(learner, Student(tiny("llama")), settings, team=Team(device=GPU))
    state = run.train(text, text)
    assert state.step == 4
    assert {tensor.device.type for tensor in learner.trained()} == {"meta"}


@pytest.mark.usefixtures("pretended")
def test_a_record_is_learned_on_a_gpu(pruned: Path) -> None:
    ids = random_ids(4, 48)
    recorded = Recorded(ids[..., None], torch.zeros(*ids.shape, 1))
    text = TrainingText(ids, torch.ones(ids.shape), recorded)
    learner = TrainableDecoder(Student(pruned), "norms", device=GPU)
    run = Distillation(learner, None, DistillSettings(192, 96), team=Team(device=GPU))
    assert run.train(text, text).step == 2


@pytest.mark.usefixtures("pretended")
def test_a_tensor_that_stayed_behind_is_found(pruned: Path) -> None:
    """The pretended GPU is no rubber stamp."""
    learner = TrainableDecoder(Student(pruned), "full", device=GPU)
    with pytest.raises(RuntimeError, match="device"):
        learner.last_hidden(random_ids(1, 8))
