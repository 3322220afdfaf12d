"""Bits of the KV cache: what a recipe may ask for, what it does, and that all measure with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.artifact_source import find_artifact
from edgedistill.bench.roofline import bytes_per_token
from edgedistill.build import Options, build
from edgedistill.errors import EdgedistillError, RecipeError, StageError, UsageError
from edgedistill.exporters.gguf import Gguf
from edgedistill.kv_cache import kv_cache_bits_of
from edgedistill.manifest import MANIFEST_FILE, Manifest
from edgedistill.pipeline import Step
from edgedistill.plan import plan_build
from edgedistill.plugins import load_runtime
from edgedistill.readme import readme_of
from edgedistill.recheck import Verifier
from edgedistill.recipe_load import load_recipe
from edgedistill.results import GoldenVector, Verification
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student
from edgedistill.tasks import VERIFICATION_FILE
from tests.manifests import write_manifest
from tests.recipes import MINIMAL, write_recipe, write_suite
from tests.tiny import write_student

Tiny = Callable[[str], Path]
Logits = npt.NDArray[np.float32]
IDS: list[int] = np.random.default_rng(7).integers(3, 512, 200).tolist()
TARGETS = MINIMAL.replace("export: [gguf]", "targets:\n")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 numbers: a block of llama.cpp's 8-bit type."""
    return write_student(tmp_path_factory.mktemp("heads") / "student", head_dim=32)


@pytest.fixture(scope="module")
def artifact(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact")
    Gguf().export(Student(student), directory, context_tokens=256)
    return directory


def streamed(artifact: Path, bits: int) -> Logits:
    runtime = load_runtime("llama_cpp", bits)
    with runtime.open(artifact, context_tokens=256, threads=1) as session:
        return np.concatenate(list(session.stream_logits(IDS)))


def kl(judge: Logits, found: Logits) -> float:
    """Mean KL(judge || found) over positions, in nats."""
    expected, other = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (judge.astype(np.float64), found.astype(np.float64))
    )
    return float((np.exp(expected) * (expected - other)).sum(axis=-1).mean())


@pytest.mark.slow
def test_eight_bits_move_the_logits_by_a_little_and_not_by_nothing(
    student: Path, artifact: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        judge = model(torch.tensor([IDS])).logits[0].numpy()
    whole, eight = streamed(artifact, 16), streamed(artifact, 8)
    assert 1e-5 < kl(whole, eight) < 5e-3
    # What weights in 8 bits are held to; one in 16 is a hundred times nearer.
    limits = LlamaCpp(8).agreement(quantized=False)
    assert 10 * kl(judge, whole) < kl(judge, eight) < limits.kl_mean
    assert np.mean(judge.argmax(1) == eight.argmax(1)) > limits.top1
    assert limits == LlamaCpp().agreement(quantized=True)
    assert LlamaCpp().agreement(quantized=False).kl_mean < kl(judge, eight)


@pytest.mark.slow
def test_a_cache_of_8_bits_is_stepped_rewound_and_shared_like_any(artifact: Path) -> None:
    expected = streamed(artifact, 8)
    with LlamaCpp(8).open(artifact, context_tokens=256, threads=1) as session:
        stepped = np.stack([session.step(token) for token in IDS])
        session.rewind(50)
        tails = [IDS[50:60], IDS[50:70], IDS[50:51]]
        together = np.stack(list(session.prefill_each(tails)))
        rewound = session.prefill(IDS[50:])
    assert kl(expected, stepped) < 2e-3
    assert kl(expected[[59, 69, 50]], together) < 2e-3
    assert kl(expected[-1:], rewound[None]) < 2e-3
    assert kl(expected[[60, 70, 51]], together) > 0.1


def test_heads_that_blocks_do_not_fill_are_refused_by_the_runtime_too(
    tiny: Tiny, tmp_path: Path
) -> None:
    Gguf().export(Student(tiny("llama")), tmp_path, context_tokens=64)  # heads of 16
    with pytest.raises(StageError, match=r"cache of 8 bits: .*block size 32 does not divide"):
        LlamaCpp(8).open(tmp_path, context_tokens=64, threads=1)


@pytest.mark.parametrize(
    ("name", "bits", "words"),
    [
        ("llama_cpp", 4, "in 8 or 16 bits, not in 4"),
        ("onnx_runtime", 16, "no choice of bits"),
        ("core_ml", 8, "no choice of bits"),
        ("torch_reference", 8, "no choice of bits"),
    ],
)
def test_a_runtime_without_the_choice_says_so(name: str, bits: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_runtime(name, bits)
    assert load_runtime(name).kv_cache_bits in (16, None)


def refused(student: Path, directory: Path, targets: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(directory, student, TARGETS + targets))
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("format_name", "bits", "words"),
    [
        ("onnx", 8, "onnx runs in onnx_runtime: it has no choice of bits"),
        ("onnx", 16, "onnx runs in onnx_runtime: it has no choice of bits"),
        ("coreml", 8, "coreml runs in core_ml: it has no choice of bits"),
        ("gguf", 4, "gguf runs in llama_cpp: it caches keys and values in 8 or 16 bits, not in 4"),
    ],
)
def test_a_target_is_refused_what_its_runtime_does_not_have(
    student: Path, tmp_path: Path, format_name: str, bits: int, words: str
) -> None:
    target = f"  phone: {{{{format: {format_name}, kv_cache_bits: {bits}}}}}\n"
    told = refused(student, tmp_path, target)
    assert words in told
    assert "targets.phone.kv_cache_bits" in told
    assert ("choose the format gguf" in told) == (format_name != "gguf")


def test_heads_that_blocks_do_not_fill_are_refused_before_any_work(
    tiny: Tiny, tmp_path: Path
) -> None:
    told = refused(tiny("llama"), tmp_path, "  phone: {{format: gguf, kv_cache_bits: 8}}\n")
    assert "32 numbers with one scale, and a head of this student has 16" in told


@pytest.mark.parametrize("other", ["format: gguf", "format: gguf, kv_cache_bits: 16"])
def test_one_artifact_has_one_cache(student: Path, tmp_path: Path, other: str) -> None:
    targets = f"  old: {{{{{other}}}}}\n  new: {{{{format: gguf, kv_cache_bits: 8}}}}\n"
    told = refused(student, tmp_path, targets)
    assert "targets.new.kv_cache_bits" in told
    assert "the target old ships the same artifact, float/gguf, with 16" in told


def test_rungs_of_one_format_may_differ_and_16_is_what_nobody_asks_for(
    student: Path, tmp_path: Path
) -> None:
    targets = (
        "  old: {{format: gguf, rungs: [float], kv_cache_bits: 16}}\n"
        "  same: {{format: gguf, rungs: [float]}}\n"
        "  new: {{format: gguf, rungs: [int8], kv_cache_bits: 8}}\n"
        "  web: {{format: onnx}}\n"
    )
    recipe = load_recipe(write_recipe(tmp_path, student, TARGETS + targets)).recipe
    found = {
        (rung, name): kv_cache_bits_of(recipe, rung, name)
        for rung in recipe.rungs
        for name in recipe.formats_of(rung)
    }
    assert found == {
        ("float", "gguf"): 16,
        ("float", "onnx"): None,
        ("int8", "gguf"): 8,
        ("int8", "onnx"): None,
    }


def test_other_bits_repeat_whatever_runs_the_artifact_and_nothing_else(
    student: Path, tmp_path: Path
) -> None:
    def keys(directory: Path, choice: str, more: str) -> dict[str, str]:
        text = TARGETS + f"  phone: {{{{format: gguf{choice}}}}}\nsuite: suite.jsonl\n" + more
        path = write_recipe(directory, student, text)
        write_suite(directory / "suite.jsonl")
        shutil.copy(directory / "suite.jsonl", directory / "log.jsonl")
        recipe = load_recipe(path).recipe
        steps = plan_build(recipe, student, ["float"], machine="m").ordered()
        return {step.label: step.key for step in steps}

    early = "traffic: log.jsonl\nfloor: {{score: 0.1}}\nevaluate: {{stop_early: true}}\n"
    for more in ("", early):
        default = keys(tmp_path / "default", "", more)
        assert keys(tmp_path / "stated", ", kv_cache_bits: 16", more) == default
        eight = keys(tmp_path / "eight", ", kv_cache_bits: 8", more)
        assert {label for label in default if default[label] != eight[label]} == {
            *("float/gguf: verify", "float/gguf: score", "float/gguf: judge", "float/gguf: bench"),
            *(["float/gguf: traffic"] if more else []),
        }


def test_decoding_reads_half_the_cache(student: Path) -> None:
    facts = Student(student).facts
    none, whole, half = (
        bytes_per_token(facts, {}, 1000, depth, kv_cache_bits=bits)
        for depth, bits in ((0, 8), (100, 16), (100, 8))
    )
    assert whole - none == 2 * (half - none) == 100 * 2 * 3 * 2 * 32 * 2


def published(artifact: Path, directory: Path, bits: int | None) -> Path:
    """The artifact with a manifest that states these bits, and what it says with 8."""
    shutil.copytree(artifact, directory)
    with LlamaCpp(8).open(directory, context_tokens=256, threads=1) as session:
        session.prefill(IDS[:20])
        logits = session.step(IDS[20])
        steps: list[int] = []
        leads: list[float] = []
        for _ in range(8):
            second, first = np.sort(logits)[-2:]
            steps.append(int(logits.argmax()))
            leads.append(float(first - second))
            logits = session.step(steps[-1])
    golden = GoldenVector(prompt="", ids=IDS[:21], steps=steps, leads=leads)
    write_manifest(directory, "gguf", [golden])
    file = directory / MANIFEST_FILE
    manifest = Manifest.model_validate_json(file.read_bytes())
    changed = manifest.model_copy(update={"kv_cache_bits": bits})
    file.write_text(changed.model_dump_json(indent=2))
    return directory


class InThisProcess(Verifier):
    """Runs its one step here, and not in a process of its own."""

    def run_step(self, step: Step) -> tuple[Verification | None, EdgedistillError | None]:
        place = Path(self.cache)
        place.mkdir(parents=True, exist_ok=True)
        step.task.run({}, place)
        return Verification.model_validate_json((place / VERIFICATION_FILE).read_bytes()), None


@pytest.mark.parametrize(("bits", "cache"), [(8, "q8_0"), (16, "float16"), (None, "float16")])
def test_verify_opens_the_cache_of_the_manifest(
    artifact: Path, tmp_path: Path, bits: int | None, cache: str
) -> None:
    directory = published(artifact, tmp_path / "artifact", bits)
    (found,) = InThisProcess(tmp_path / "cache", threads=1).recheck([directory]).artifacts
    assert found.verification.settings["cache"] == cache
    assert any(check.name.startswith("golden") for check in found.verification.checks)
    if bits == 8:
        assert found.verification.passed, found.verification.checks


def test_an_artifact_that_lies_somewhere_claims_its_cache(artifact: Path, tmp_path: Path) -> None:
    for bits in (8, None):
        directory = published(artifact, tmp_path / str(bits), bits)
        assert find_artifact(directory).claims.kv_cache_bits == bits


def test_the_readme_opens_the_cache_that_was_measured(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    directory = published(artifact, tmp_path / "artifact", 8)
    manifest = Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes())
    text = readme_of(manifest)
    assert "--cache-type-k q8_0 --cache-type-v q8_0" in text
    assert "cache" not in readme_of(manifest.model_copy(update={"kv_cache_bits": 16}))
    lines = text.partition("```python\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(directory)
    said: dict[str, llama_cpp.Llama] = {}
    exec("\n".join(lines[:-1]).replace("n_ctx", "verbose=False, n_ctx"), said)
    opened = said["model"].context_params
    assert opened.type_k == opened.type_v == llama_cpp.GGML_TYPE_Q8_0
    said["model"].close()


@pytest.mark.slow
def test_a_build_verifies_and_times_the_cache_that_ships(student: Path, tmp_path: Path) -> None:
    text = TARGETS.replace("  int8: [quantize_rtn: {{bits: 8}}]\n", "")
    text += "  phone: {{format: gguf, kv_cache_bits: 8}}\nsuite: suite.jsonl\n"
    recipe = write_recipe(tmp_path, student, text + "build: {{threads: 1}}\n")
    write_suite(tmp_path / "suite.jsonl")
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports")
    built, _ = build(options, lambda _: None)
    (report,) = built.artifacts
    assert report.verification is not None
    assert report.verification.passed, report.verification.checks
    assert report.verification.settings["cache"] == "q8_0"
    assert report.bench is not None
    assert report.bench.settings["cache"] == "q8_0"
    assert report.kv_cache_bits == 8
    file = tmp_path / "exports" / report.path / MANIFEST_FILE
    assert Manifest.model_validate_json(file.read_bytes()).kv_cache_bits == 8
