"""Verification passes good artifacts and catches planted faults, each by the check meant for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import InputError, StageError
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.results import Verification
from edgedistill.stages.quantize_rtn import GridChoice, QuantizeRtn
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.artifact import verify_artifact
from edgedistill.verify.divergence import AdapterEffect, Divergence, kl_divergence, log_softmax
from edgedistill.verify.judge import read_judge_logits, write_judge_logits
from edgedistill.verify.texts import load_texts

FORMATS = plugin_names("exporters")
CONTEXT = 256
TEXTS = {name: text[:160] for name, text in load_texts({}).items()}


@dataclass(frozen=True)
class Bench:
    """A student, its base before "the adapter", and the judge's log-probabilities on both."""

    student: Path
    base: Path
    judge: Path
    base_judge: Path


def rewrite(source: Path, target: Path, edit: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """A copy of a student with its tensors edited."""
    target.mkdir(parents=True)
    student = Student(source)
    with StudentWriter(target, student) as writer:
        for name in student.names():
            writer.write(name, edit(name, student.read(name)))
    return target


@pytest.fixture(scope="module")
def bench(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(3)

    def adapt(name: str, values: np.ndarray) -> np.ndarray:
        moved = values + rng.normal(0, 0.08, values.shape).astype(np.float32)
        return moved if ".q_proj.weight" in name or ".up_proj.weight" in name else values

    base = tiny("llama")
    made = Bench(rewrite(base, root / "student", adapt), base, root / "judge", root / "base")
    for student, judge in ((made.student, made.judge), (made.base, made.base_judge)):
        judge.mkdir()
        write_judge_logits(student, TEXTS, judge, chat=Chat(), threads=1, context_tokens=CONTEXT)
    return made


def verify(bench: Bench, exported: Path, root: Path, format_name: str) -> Verification:
    """Export one student and hold the artifact against the bench's."""
    artifact = root / f"artifact-{format_name}"
    artifact.mkdir()
    load_plugin("exporters", format_name)().export(
        Student(exported), artifact, context_tokens=CONTEXT
    )
    return verify_artifact(
        artifact,
        format_name,
        student=bench.student,
        weights_judge=bench.judge,
        reference_judge=bench.judge,
        base_judge=bench.base_judge,
        context_tokens=CONTEXT,
        threads=1,
    )


def failed(verification: Verification) -> set[str]:
    return {check.name.split(":")[0] for check in verification.checks if not check.passed}


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_good_artifact_passes_every_check(bench: Bench, tmp_path: Path, format_name: str) -> None:
    verification = verify(bench, bench.student, tmp_path, format_name)
    assert failed(verification) == set(), verification.checks
    assert {c.name.split(":")[0] for c in verification.checks} == {
        "logits",
        "cache",
        "positions",
        "tokenizer",
        "template",
        "tokens",
        "adapter",
        "lint",
    }
    assert [t.text for t in verification.against_weights] == list(TEXTS)
    effect = next(c for c in verification.checks if c.name.startswith("adapter"))
    assert effect.value == pytest.approx(1.0, abs=0.02)


def swap_layers(name: str, student: Student) -> np.ndarray:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    for here, there in other.items():
        if here in name:
            return student.read(name.replace(here, there))
    return student.read(name)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("fault", ["layers swapped", "norm zeroed", "rope theta", "rows swapped"])
def test_a_fault_in_the_weights_fails_the_logits(
    bench: Bench, tmp_path: Path, format_name: str, fault: str
) -> None:
    student = Student(bench.student)

    def edit(name: str, values: np.ndarray) -> np.ndarray:
        if fault == "layers swapped":
            return swap_layers(name, student)
        if fault == "norm zeroed" and name == student.facts.norms(1)["ffn"]:
            return np.zeros_like(values)
        if fault == "rows swapped" and name == student.facts.embedding:
            values = values.copy()
            values[[40, 70]] = values[[70, 40]]
        return values

    faulty = rewrite(bench.student, tmp_path / "faulty", edit)
    if fault == "rope theta":
        config = json.loads((faulty / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 100.0
        (faulty / "config.json").write_text(json.dumps(config))
    assert "logits" in failed(verify(bench, faulty, tmp_path, format_name))


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_adapter_that_was_not_merged_is_named(
    bench: Bench, tmp_path: Path, format_name: str
) -> None:
    verification = verify(bench, bench.base, tmp_path, format_name)
    assert "adapter" in failed(verification)
    effect = next(c for c in verification.checks if c.name.startswith("adapter"))
    assert effect.value == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("format_name", FORMATS)
def test_lost_digit_splitting_fails_the_tokenizer_and_nothing_else(
    bench: Bench, tmp_path: Path, format_name: str
) -> None:
    faulty = tmp_path / "faulty"
    shutil.copytree(bench.student, faulty)
    tokenizer = json.loads((faulty / "tokenizer.json").read_text())
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    tokenizer["pre_tokenizer"] = next(s for s in steps if s["type"] == "ByteLevel")
    # A merge of two digits shows what the splitting forbids.
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    first = next(iter(merges))
    last_token = next(t for t, i in vocabulary.items() if i == len(vocabulary) - 1)
    assert isinstance(first, list | str)
    merges.append(["1", "2"] if isinstance(first, list) else "1 2")
    vocabulary["12"] = vocabulary.pop(last_token)
    merges[:] = [
        m for m in merges if "".join(m if isinstance(m, list) else m.split()) in vocabulary
    ]
    (faulty / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert failed(verify(bench, faulty, tmp_path, format_name)) == {"tokenizer"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_quantized_artifact_is_judged_on_its_own_weights(
    bench: Bench, tmp_path: Path, format_name: str
) -> None:
    quantized, judge = tmp_path / "quantized", tmp_path / "judge"
    quantized.mkdir()
    judge.mkdir()
    QuantizeRtn(bits=4, embeddings=GridChoice(bits=8)).run(bench.student, quantized)
    write_judge_logits(quantized, TEXTS, judge, chat=Chat(), threads=1, context_tokens=CONTEXT)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    load_plugin("exporters", format_name)().export(
        Student(quantized), artifact, context_tokens=CONTEXT
    )
    verification = verify_artifact(
        artifact,
        format_name,
        student=quantized,
        weights_judge=judge,
        reference_judge=bench.judge,
        base_judge=bench.base_judge,
        context_tokens=CONTEXT,
        threads=1,
    )
    own = np.mean([t.kl_mean for t in verification.against_weights])
    other = np.mean([t.kl_mean for t in verification.against_reference])
    assert own < other / 3


def test_kl_is_that_of_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 3, (5, 100)).astype(np.float32) for _ in range(2))
    judge = log_softmax(a).astype(np.float32)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(b).double(), -1),
        torch.from_numpy(judge).double(),
        log_target=True,
        reduction="none",
    ).sum(-1)
    np.testing.assert_allclose(kl_divergence(judge, log_softmax(b)), expected.numpy(), rtol=1e-6)


def test_nan_logits_are_infinitely_far_away() -> None:
    judge = log_softmax(np.zeros((1, 4), dtype=np.float32)).astype(np.float32)
    broken = np.array([[0.0, np.nan, 0.0, 0.0]], dtype=np.float32)
    divergence = Divergence("text")
    divergence.add(judge, log_softmax(broken))
    assert divergence.summary().kl_mean == np.inf


@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 2.0])
def test_adapter_effect_is_the_share_of_the_shift(times: float) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, (50, 40))
    shift = rng.normal(0, 0.05, (50, 40))
    noise = rng.normal(0, 0.01, (50, 40))
    effect = AdapterEffect()
    effect.add(
        log_softmax(base.astype(np.float32)).astype(np.float32),
        log_softmax((base + shift).astype(np.float32)).astype(np.float32),
        log_softmax((base + times * shift + noise).astype(np.float32)),
    )
    assert effect.share == pytest.approx(times, abs=0.1)


def test_judge_is_stored_as_the_log_probabilities_of_the_first_tokens(bench: Bench) -> None:
    for judged in read_judge_logits(bench.judge):
        assert judged.log_probs.shape == (len(judged.ids), 512)
        np.testing.assert_allclose(np.exp(judged.log_probs).sum(axis=-1), 1.0, atol=1e-4)


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama"), tmp_path / "copied")


def judged_text(student: Path, root: Path, text: str, chat: Chat = Chat()) -> str:  # noqa: B008
    """What the judge read, special tokens spelt out."""
    from transformers import AutoTokenizer

    root.mkdir()
    write_judge_logits(student, {"text": text}, root, chat=chat, threads=1)
    (judged,) = read_judge_logits(root)
    read: str = AutoTokenizer.from_pretrained(str(student)).decode(judged.ids)
    return read


def test_texts_are_read_as_the_users_message(copied: Path, tmp_path: Path) -> None:
    template = "<{{ messages[0].content }}|{{ messages[1].content }}|{{ mood }}>"
    (copied / "chat_template.jinja").write_text(template)
    chat = Chat(system="Be brief.", template_args={"mood": "calm"})
    read = judged_text(copied, tmp_path / "judge", "\nHello there. \n", chat)
    assert read == "<Be brief.|Hello there.|calm>"


def test_what_stands_before_a_text_does_not_count_towards_its_tokens(
    copied: Path, tmp_path: Path
) -> None:
    template = "{{ 'so ' * 30 }}{{ messages[0].content }} and the end"
    (copied / "chat_template.jinja").write_text(template)
    opening = judged_text(copied, tmp_path / "short", "xyz").partition("xyz")[0]
    judged_text(copied, tmp_path / "judge", "Hello there. " * 600)
    (judged,) = read_judge_logits(tmp_path / "judge")
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(str(copied))(opening, add_special_tokens=False)
    assert opening == "so " * 30
    assert len(judged.ids) == min(256, len(before.input_ids) + 400)


def test_without_a_template_a_text_follows_the_beginning_of_sequence(
    copied: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (copied / "chat_template.jinja").unlink()
    bos = AutoTokenizer.from_pretrained(str(copied)).bos_token
    assert bos
    assert judged_text(copied, tmp_path / "judge", "Hello there.") == f"{bos}Hello there."


def test_judges_that_read_other_ids_are_not_compared(
    bench: Bench, copied: Path, tmp_path: Path
) -> None:
    (copied / "chat_template.jinja").write_text("Today is Monday. {{ messages[0].content }}")
    monday = tmp_path / "monday"
    monday.mkdir()
    write_judge_logits(copied, TEXTS, monday, chat=Chat(), threads=1)
    with pytest.raises(StageError, match="different token ids"):
        verify(replace(bench, base_judge=monday), copied, tmp_path, "gguf")


def test_texts_of_a_recipe_join_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Mein Text.")
    (tmp_path / "empty.txt").write_text("  ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert load_texts({"own": tmp_path / "own.txt"})["own"] == "Mein Text."
    assert len(load_texts({"own": tmp_path / "own.txt"})) == 4
    for name in ("empty", "latin", "missing"):
        with pytest.raises(InputError, match=name):
            load_texts({"x": tmp_path / f"{name}.txt"})


def test_built_in_texts_have_over_a_thousand_words_worth_of_text() -> None:
    assert all(len(text) > 1200 for text in load_texts({}).values())
