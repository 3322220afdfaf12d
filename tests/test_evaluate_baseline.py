from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import log_softmax, rel_entr

from edgedistill.chat import Chat
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.baseline import (
    BaselineCase,
    BaselineRecorder,
    read_baseline,
    write_baseline,
)
from edgedistill.evaluate.baseline_divergence import coarse_divergence, compare_baseline
from edgedistill.evaluate.prompts import Prompt, render_prompts
from edgedistill.evaluate.reference import score_reference
from edgedistill.evaluate.suite import ChoiceCase, load_suite
from edgedistill.runtimes.torch_reference import TorchReference
from tests.tiny import write_student

Tiny = Callable[..., Path]
Floats = npt.NDArray[np.float64]
CHAT = Chat(system="Rate it.")
VOCAB = 700


def draw(rng: np.random.Generator, rows: int, peak: float, noise: float) -> tuple[Floats, Floats]:
    """Log-probabilities of a reference and of an artifact near it, float64 [rows, VOCAB]."""
    logits = rng.normal(0.0, peak, (rows, VOCAB))
    disturbed = logits + rng.normal(0.0, noise, logits.shape)
    return log_softmax(logits, axis=1), log_softmax(disturbed, axis=1)


def record(reference: Floats, top_tokens: int, tmp_path: Path) -> BaselineCase:
    """A case whose answer has as many tokens as the reference has rows, written and read back."""
    answer = tuple(range(len(reference)))
    prompt = Prompt("a", (5, 6, 7), ((9,), answer))
    recorder = BaselineRecorder({"a": 1}, top_tokens)
    recorder.add_first(prompt, reference[0])
    if len(reference) > 1:
        recorder.add_later(prompt, 1, reference[1:])
    path = recorder.write(tmp_path)
    assert path is not None
    (case,) = read_baseline(path)
    return case


@pytest.mark.parametrize("noise", [0.003, 0.1, 2.0])
@pytest.mark.parametrize("peak", [0.5, 3.0, 8.0])
def test_the_divergence_never_exceeds_that_of_the_whole_vocabulary(
    tmp_path: Path, peak: float, noise: float
) -> None:
    rng = np.random.default_rng(0)
    reference, _ = draw(rng, 60, peak, noise)
    artifact = log_softmax(reference + rng.normal(0.0, noise, reference.shape), axis=1)
    whole = rel_entr(np.exp(reference), np.exp(artifact)).sum(axis=1)
    before = np.zeros(60)
    for top_tokens in (1, 16, 64, VOCAB):
        found = coarse_divergence(record(reference, top_tokens, tmp_path), artifact)
        rounding = 1e-6 * np.sqrt(whole) + 1e-9  # float32 of the stored log-probabilities
        assert (found <= whole + rounding).all()
        assert (found >= before - rounding).all()  # more tokens come nearer
        before = found
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-9)  # all tokens: exact
    if peak == 8.0:
        kept = coarse_divergence(record(reference, 64, tmp_path), artifact)
        assert kept.mean() > 0.7 * whole.mean()  # a bound that says something


def test_rounding_to_float16_would_break_the_bound(tmp_path: Path) -> None:
    """Why the file holds float32."""
    rng = np.random.default_rng(1)
    reference, _ = draw(rng, 200, 5.0, 0.0)
    artifact = log_softmax(reference + rng.normal(0.0, 0.003, reference.shape), axis=1)
    whole = rel_entr(np.exp(reference), np.exp(artifact)).sum(axis=1)
    case = record(reference, 64, tmp_path)
    assert (coarse_divergence(case, artifact) <= whole * (1 + 1e-3) + 1e-9).all()
    rounded = BaselineCase(
        case.id,
        case.ids,
        case.tokens,
        case.log_probs.astype(np.float16).astype(np.float32),
        case.tail,
    )
    assert (coarse_divergence(rounded, artifact) > 1.1 * whole).mean() > 0.1


def test_the_stored_tokens_are_the_most_probable_and_the_tail_is_the_rest(tmp_path: Path) -> None:
    reference, _ = draw(np.random.default_rng(2), 5, 4.0, 0.0)
    case = record(reference, 16, tmp_path)
    for row, (tokens, values, tail) in enumerate(
        zip(case.tokens, case.log_probs, case.tail, strict=True)
    ):
        expected = sorted(range(VOCAB), key=lambda t: (-reference[row, t], t))[:16]
        assert tokens.tolist() == expected
        np.testing.assert_allclose(values, reference[row, expected], rtol=1e-6)
        assert tail == pytest.approx(1.0 - np.exp(reference[row, expected]).sum(), rel=1e-5)
    assert (case.prompt, case.ids) == ((5, 6, 7), (5, 6, 7, 0, 1, 2, 3))


def test_a_broken_artifact_is_infinitely_far_away(tmp_path: Path) -> None:
    reference, artifact = draw(np.random.default_rng(3), 2, 4.0, 0.1)
    case = record(reference, 16, tmp_path)
    artifact[1] = np.nan
    found = coarse_divergence(case, artifact)
    assert np.isfinite(found[0])
    assert np.isinf(found[1])


def write_suite(path: Path, choices: list[str], count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    words = ["I", "love", "terrible", "plot", "12", "naïve", "🙂", "the", "quick", "fox"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            case = {
                "id": f"c{i}",
                "kind": "choice",
                "messages": [
                    {"role": "user", "content": " ".join(rng.choice(words, rng.integers(1, 9)))}
                ],
                "choices": choices,
                "answer": i % len(choices),
            }
            file.write(json.dumps(case) + "\n")
    return path


def whole_divergences(reference: Path, artifact: Path, suite: Path) -> dict[str, list[float]]:
    """Case -> KL at each answer position, by transformers, a pass a case, nothing shared."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (reference, artifact)
    ]
    cases = [case for case in load_suite([suite]) if isinstance(case, ChoiceCase)]
    found = {}
    for case, prompt in zip(
        cases, render_prompts(reference, cases, CHAT, context_tokens=256), strict=True
    ):
        answer = prompt.choices[case.answer]
        with torch.inference_mode():
            ids = torch.tensor([prompt.ids + answer])
            own, other = (
                torch.log_softmax(m(ids).logits[0].double(), -1)[len(prompt.ids) - 1 : -1].numpy()
                for m in models
            )
        found[case.id] = rel_entr(np.exp(own), np.exp(other)).sum(axis=1).tolist()
    return found


def write_reference(student: Path, suite: Path, dst: Path) -> Path:
    dst.mkdir()
    score_reference(student, [suite], dst, chat=CHAT, threads=1, context_tokens=256)
    (path,) = dst.glob("baseline-*")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("choices", [["A", "B"], ["terrible", "bad", "A", "quick brown fox"]])
def test_an_artifact_is_measured_at_every_answer_position_without_the_reference(
    tiny: Tiny, tmp_path: Path, choices: list[str]
) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", choices)
    baseline = write_reference(tiny(), suite, tmp_path / "reference")
    with TorchReference().open(tiny(), context_tokens=256, threads=1) as session:
        same = compare_baseline(session, baseline)
    assert same.kl_max < 1e-6
    assert same.top1 == 1.0
    other = write_student(tmp_path / "other", seed=1)
    with TorchReference().open(other, context_tokens=256, threads=1) as session:
        found = compare_baseline(session, baseline)
    whole = whole_divergences(tiny(), other, suite)
    positions = [kl for values in whole.values() for kl in values]
    assert (found.cases, found.positions) == (24, len(positions))
    assert (len(positions) > 24) == (len(choices) > 2)
    assert 0.6 * np.mean(positions) < found.kl_mean <= np.mean(positions)
    assert found.kl_max <= max(positions)
    assert found.kl_p99 <= found.kl_max
    assert max(whole[found.worst_case]) >= found.kl_max
    assert found.top1 < 0.5
    assert 0.0 < found.tail_mean < 0.5


def test_a_baseline_is_named_by_its_content_and_the_same_again(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", ["A", "B"])
    once = write_reference(tiny(), suite, tmp_path / "once")
    twice = write_reference(tiny(), suite, tmp_path / "twice")
    assert once.name == twice.name
    assert once.name == f"baseline-{hashlib.sha256(once.read_bytes()).hexdigest()}.safetensors"
    assert [case.id for case in read_baseline(once)] == [f"c{i}" for i in range(24)]
    assert once.stat().st_size < 24 * 700 + 2000  # a few hundred bytes a case


def some_cases(count: int = 3) -> list[BaselineCase]:
    rng = np.random.default_rng(4)
    reference, _ = draw(rng, count, 4.0, 0.0)
    return [
        BaselineCase(
            f"c{i}",
            (1, 2, 3 + i),
            np.arange(8, dtype=np.int32)[None],
            reference[i : i + 1, :8].astype(np.float32),
            np.array([0.1], dtype=np.float32),
        )
        for i in range(count)
    ]


def test_a_changed_or_renamed_file_is_refused(tmp_path: Path) -> None:
    path = write_baseline(some_cases(), tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not what its name says"):
        read_baseline(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_baseline(tmp_path / "baseline-0.safetensors")


@pytest.mark.parametrize("part", ["case_ids", "ids", "ends", "positions", "tokens", "tail"])
@pytest.mark.parametrize("damage", ["gone", "short", "shape", "negative"])
def test_a_file_that_is_no_baseline_is_refused_whatever_its_name(
    tmp_path: Path, part: str, damage: str
) -> None:
    from safetensors.numpy import load, save

    tensors = load(write_baseline(some_cases(), tmp_path).read_bytes())
    if damage == "gone":
        del tensors[part]
    elif damage == "short":
        tensors[part] = np.ascontiguousarray(tensors[part][:-1])
    elif damage == "shape":
        if part == "case_ids":
            pytest.skip("it is read as bytes")
        tensors[part] = np.ascontiguousarray(tensors[part].reshape(1, -1))
    elif part in ("ids", "tokens", "tail", "case_ids"):
        pytest.skip("a value, whose range the artifact's vocabulary decides")
    else:
        tensors[part] = -tensors[part]
    data = save(tensors)
    path = tmp_path / f"baseline-{hashlib.sha256(data).hexdigest()}.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_baseline(path)


def test_a_baseline_of_another_vocabulary_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (first, *rest) = some_cases()
    strange = BaselineCase(first.id, first.ids, first.tokens + 510, first.log_probs, first.tail)
    path = write_baseline([strange, *rest], tmp_path)
    with (
        TorchReference().open(tiny(), context_tokens=256, threads=1) as session,
        pytest.raises(InputError, match="token 517 of case c0"),
    ):
        compare_baseline(session, path)


def test_a_case_that_was_not_recorded_to_its_end_is_an_error(tmp_path: Path) -> None:
    reference, _ = draw(np.random.default_rng(5), 1, 4.0, 0.0)
    recorder = BaselineRecorder({"a": 0})
    recorder.add_first(Prompt("a", (1,), ((2, 3), (4,))), reference[0])
    with pytest.raises(StageError, match="1 of 2 answer positions"):
        recorder.write(tmp_path)
    assert BaselineRecorder({"b": 0}).write(tmp_path) is None
