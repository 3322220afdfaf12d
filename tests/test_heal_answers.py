"""Healing on answers: recorded ones, likeliest tokens, weights, states; each by its definition."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgedistill.calibration import Calibration, calibration_pieces
from edgedistill.chat import Chat
from edgedistill.cli import app
from edgedistill.distill_loss import LossSettings, bucket_loss, teaching
from edgedistill.errors import InputError
from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.pruned_student import drop_layers
from edgedistill.stages.heal import Heal
from edgedistill.student import Student
from edgedistill.training_text import Emphasis, TrainingSplit, training_split
from tests.interrupted import Interruption
from tests.pruned import empty, load, logits
from tests.tiny import write_student

Tiny = Callable[[str], Path]
CHAT = Chat(system="Rate.")
WORDS = ("bad", "good", "The quick brown fox.")
LENGTH = 128


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama without its middle block."""
    out = tmp_path_factory.mktemp("pruned")
    drop_layers(Student(tiny("llama")), out, (1,))
    return out


def _rows(count: int = 120) -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"Film {i} was {WORDS[i % 2]}, I say."}],
            "answer": WORDS[i % 3],
            "reasoning": f"because of number {i}",
        }
        for i in range(count)
    ]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    return _write(tmp_path / "talks.jsonl", _rows())


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _split(student: Path, file: Path, emphasis: Emphasis) -> TrainingSplit:
    text = Calibration(file=file, tokens=2048, sequence_tokens=LENGTH)
    return training_split(student, text, CHAT, emphasis, held_out_tokens=256)


def _budget(file: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tokens": 2048,
        "batch_tokens": 256,
        "held_out_tokens": 256,
        "evaluations": 4,
        "calibration": Calibration(file=file, sequence_tokens=LENGTH),
        "chat": CHAT,
    }
    return fields | changes


def _coarse(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[positions, k + 1] probabilities in float64: of some tokens, and of all others by a loop."""
    p = log_probs.double().exp()
    rows = []
    for row, kept in zip(p, ids.tolist(), strict=True):
        others = sum(float(v) for token, v in enumerate(row) if token not in kept)
        rows.append([float(row[token]) for token in kept] + [others])
    return torch.tensor(rows, dtype=torch.float64)


def test_bucket_loss_is_the_divergence_of_the_coarse_distributions() -> None:
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(6, 20, generator=generator) * 3
    teacher = (torch.randn(6, 20, generator=generator) * 3).log_softmax(-1)
    log_probs, ids = teacher.topk(4)
    p, q = _coarse(teacher, ids), _coarse(own.log_softmax(-1), ids)
    expected = (p * (p / q).log()).sum(-1)
    np.testing.assert_allclose(bucket_loss(own, ids, log_probs), expected, rtol=1e-4)
    # Places that hold fewer: the empty ones name a token again, without probability.
    ids[:, 3], log_probs[:, 3] = ids[:, 0], -torch.inf
    p, q = _coarse(teacher, ids[:, :3]), _coarse(own.log_softmax(-1), ids[:, :3])
    own.requires_grad_()
    found = bucket_loss(own, ids, log_probs)
    np.testing.assert_allclose(found.detach(), (p * (p / q).log()).sum(-1), rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    assert gradient.isfinite().all()


def test_a_word_alone_is_learned_by_next_token_loss() -> None:
    own = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    words = torch.tensor([1, 8, 0, 4, 4])
    found = bucket_loss(own, words[:, None], torch.zeros(5, 1))
    expected = torch.nn.functional.cross_entropy(own, words, reduction="none")
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-5)
    gradient = torch.autograd.grad(found.sum(), own)[0]
    np.testing.assert_allclose(gradient, own.softmax(-1).detach() - torch.eye(9)[words], atol=1e-6)


@pytest.mark.parametrize(
    ("reasoning", "said"),
    [
        (None, "{answer}"),
        ("<think>{reasoning}</think>{answer}", "<think>{reasoning}</think>{answer}"),
    ],
)
def test_answers_alone_count_with_what_ends_them(
    tiny: Tiny, talks: Path, reasoning: str | None, said: str
) -> None:
    student = tiny("llama")
    tokenizer = load_tokenizer(student)
    text = _split(student, talks, Emphasis(recorded=True, reasoning=reasoning)).fitting
    spoken: list[str] = []
    for ids, answers in zip(text.ids, text.weights > 0, strict=True):
        run: list[int] = []
        for place in range(LENGTH - 1):
            if answers[place]:
                run.append(int(ids[place + 1]))
            elif run:
                spoken.append(tokenizer.decode(run))
                run = []
    written = {said.format(**row) + "<|im_end|>" for row in _rows()}
    assert len(spoken) > 10
    assert set(spoken) <= written
    assert float(text.weights.mean()) == pytest.approx(1.0, rel=1e-5)
    assert (text.weights[:, -1] == 0).all()  # nothing is known to follow


def load_tokenizer(student: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(student), local_files_only=True)


def _last_hidden(student: Path, ids: torch.Tensor) -> torch.Tensor:
    """What enters the final norm in transformers: [sequences, tokens, hidden]."""
    model, seen = load(student), []
    model.model.norm.register_forward_pre_hook(lambda _, entered: seen.append(entered[0]))
    logits(model, ids)
    found: torch.Tensor = seen[0]
    return found


def test_the_loss_is_what_transformers_says(tiny: Tiny, pruned: Path, talks: Path) -> None:
    """KL, next token and hidden states, with weights on answers, written out by hand."""
    text = _split(pruned, talks, Emphasis(answer_weight=7.0)).fitting
    own, other = (logits(load(path), text.ids)[2] for path in (pruned, tiny("llama")))
    p, log_q = other.softmax(-1), own.log_softmax(-1)
    states, others = (_last_hidden(path, text.ids)[2] for path in (pruned, tiny("llama")))
    answers = text.weights > text.weights.min()
    mean_weight = float(torch.where(answers, 7.0, 1.0).mean())
    expected = 0.0
    for place in range(LENGTH):
        loss = float((p[place] * (p[place].log() - log_q[place])).sum())
        if place + 1 < LENGTH:
            loss -= 0.5 * float(log_q[place, text.ids[2, place + 1]])
        x, y = states[place].double(), others[place].double()
        loss += 3.0 * (1.0 - float(x @ y / (x @ x * (y @ y)).sqrt()))
        expected += loss * (7.0 if answers[2, place] else 1.0) / mean_weight
    settings = LossSettings(next_token_weight=0.5, hidden_weight=3.0)
    (target,) = teaching(Student(tiny("llama")), settings).targets(text, [2])
    found = sum(
        float(target.loss(rows, own[rows], states[rows])) for rows in (slice(0, 80), slice(80, 160))
    )
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 6])
def test_a_student_learns_from_a_record_what_its_teacher_said(
    tiny: Tiny, pruned: Path, talks: Path, tmp_path: Path, top_k: int
) -> None:
    """The record against ``generate`` and the logits of transformers; then healing from it."""
    teacher, out = tiny("llama"), tmp_path / "record.jsonl"
    arguments = ["record", str(teacher), str(talks), "--out", str(out), "--system", "Rate."]
    arguments += ["--top-k", str(top_k), "--max-tokens", "5", "--threads", "1"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 120
    tokenizer, model = load_tokenizer(teacher), load(teacher)
    for row in rows[::40]:
        turns = [{"role": "system", "content": "Rate."}, *row["messages"]]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt).input_ids])
        said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True)
        if top_k:
            assert row["tokens"] == said.tolist()
            whole = torch.cat([ids[0], said])[None]
            log_probs = logits(model, whole)[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            values, tokens = log_probs.topk(top_k)
            assert row["top_tokens"] == tokens.tolist()
            np.testing.assert_allclose(row["top_log_probs"], values, atol=1e-4)
    stage = Heal.model_validate(_budget(talks, recorded=out))
    assert not stage.wants_teacher
    stage.run(pruned, empty(healed := tmp_path / "healed"))
    found = Healing.model_validate_json((healed / HEALING_FILE).read_bytes())
    assert found.kl_after < 0.9 * found.kl_before
    held_out = _split(pruned, out, Emphasis(recorded=True)).held_out
    expected = logits(load(pruned), held_out.ids).log_softmax(-1)
    if not top_k:  # the divergence from words is their next-token loss
        plain = -expected[:, :-1].gather(2, held_out.ids[:, 1:, None])[..., 0]
        mean = float(plain[held_out.weights[:, :-1] > 0].mean())
        assert found.kl_before == pytest.approx(mean, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["recorded", "answers"])
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    tiny: Tiny,
    pruned: Path,
    talks: Path,
    tmp_path: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, dict[str, Any]] = {
        "recorded": {"recorded": talks},
        "answers": {"answer_weight": 9.0, "hidden_weight": 1.0, "trained": "lora"},
    }
    stage, work = Heal.model_validate(_budget(talks, **options[option])), empty(tmp_path / "work")

    def heal(dst: Path, work: Path | None) -> dict[str, bytes]:
        stage.run_beside(pruned, empty(dst), teacher=tiny("llama"), work=work)
        return {path.name: path.read_bytes() for path in sorted(dst.iterdir())}

    whole = heal(tmp_path / "whole", None)
    interruption = Interruption(monkeypatch, after=5)
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path / "killed", work)
    interruption.lift()
    assert heal(tmp_path / "resumed", work) == whole
    assert interruption.taken == 4  # from the evaluation after 4 steps to the 8th


def test_rare_slices_are_drawn_earlier_by_the_stated_power(tiny: Tiny, tmp_path: Path) -> None:
    """100 lines, 4 of them rare: the first line drawn is rare with the odds of both counts."""
    names = dict.fromkeys(range(4), ("rare", "all"))
    rows = [
        {"prompt": f"{'rare' if i in names else 'common'} {i}", "slices": names.get(i, ("all",))}
        for i in range(100)
    ]
    file = _write(tmp_path / "lines.jsonl", rows)
    tokenizer = load_tokenizer(tiny("llama"))

    def rare_first(power: float, draws: int) -> float:
        found: Counter[bool] = Counter()
        for seed in range(draws):
            text = Calibration(file=file, tokens=32, sequence_tokens=32, seed=seed)
            (piece,) = calibration_pieces(tiny("llama"), text, Chat(), tail_power=power)
            found["user\nrare" in tokenizer.decode(piece.ids[:12])] += 1
        return found[True] / draws

    # Rates 25**power for 4 lines, 1 for 96.
    assert rare_first(1.0, 40) == pytest.approx(4 * 25 / (4 * 25 + 96), abs=0.2)
    assert rare_first(0.0, 40) < 0.15


def test_states_of_another_width_cannot_be_matched(pruned: Path, tmp_path: Path) -> None:
    teacher = write_student(tmp_path / "wide", hidden_size=96)
    stage = Heal(teacher=teacher, hidden_weight=1.0)
    (problem,) = stage.problems(Student(pruned).facts, quantized=False)
    assert "states have 96 numbers, the student's 64" in problem
    assert Heal(teacher=teacher).problems(Student(pruned).facts, quantized=False) == []
    with pytest.raises(InputError, match="states have 96 numbers"):  # found out while running
        Heal(hidden_weight=1.0).run_beside(
            pruned, empty(tmp_path / "out"), teacher=teacher, work=None
        )


def test_what_means_nothing_beside_a_record_is_refused(pruned: Path, talks: Path) -> None:
    facts = Student(pruned).facts
    stage = Heal(recorded=talks, data=talks, temperature=2.0, hidden_weight=0.5)
    problems = stage.problems(facts, quantized=False)
    assert [problem.partition(":")[0] for problem in problems] == [
        "data",
        "temperature",
        "hidden_weight",
    ]
    assert Heal(recorded=talks).problems(facts, quantized=False) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": [9, 600]}, "go from 9 to 600, the student knows 512"),
        ({"tokens": [9], "top_tokens": [[9, 9]], "top_log_probs": [[-1, -2]]}, "repeats a token"),
        ({"tokens": [9], "top_tokens": [[9]], "top_log_probs": [[-1, -2]]}, "not of one shape"),
        ({"tokens": [9, 4], "top_tokens": [[9]], "top_log_probs": [[-1]]}, "for each of tokens"),
        ({"tokens": [9], "top_tokens": [[9]], "top_log_probs": [[0.5]]}, "not a logarithm"),
        ({"tokens": [9], "top_tokens": [[9, 4]], "top_log_probs": [[0, 0]]}, "a probability of 2"),
        ({"tokens": [9], "answer": "no such word"}, "its answer 'no such word'"),
        ({"answer": ""}, "holds no answers"),
    ],
)
def test_damaged_records_are_told(
    pruned: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    file = _write(tmp_path / "record.jsonl", [row | {"answer": None} | change for row in _rows()])
    with pytest.raises(InputError, match=named) as caught:
        _split(pruned, file, Emphasis(recorded=True))
    assert "record.jsonl" in str(caught.value)


def test_a_record_of_plain_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = _write(tmp_path / "texts.jsonl", [{"text": "No question at all."}])
    result = CliRunner().invoke(
        app, ["record", str(tiny("llama")), str(file), "--out", str(tmp_path / "out.jsonl")]
    )
    assert result.exit_code != 0
    assert not (tmp_path / "out.jsonl").exists()
