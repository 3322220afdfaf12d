"""Rungs with fewer tokens on their whole way: plan, all formats, all gates, suite and traffic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import RecipeError
from edgedistill.evaluate.score import SCORES_FILE
from edgedistill.evaluate.traffic import find_disagreements, read_reference
from edgedistill.kept_vocabulary import read_kept
from edgedistill.pipeline import Step
from edgedistill.plan import BuildSteps, plan_build
from edgedistill.recipe_load import load_recipe
from edgedistill.results import Verification
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student, dequantize_student
from edgedistill.task import WORK
from edgedistill.tasks import EVALUATION_FILE, VERIFICATION_FILE
from edgedistill.verify.kept_logits import write_kept_logits
from tests.mutations import ALL
from tests.peaked import TEXTS, Good, Judged, export, make_good, verify
from tests.pruned import empty, load
from tests.recipes import write_recipe, write_suite
from tests.small_vocabulary import DOMAIN, SIZE, pruned, stage

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
calibration: {{file: domain.txt, tokens: 256, sequence_tokens: 64}}
rungs:
  int8: [quantize_rtn: {{bits: 8, group_size: 32}}]
  small:
    - prune_depth: {{layers: 1, search_tokens: 64}}
    - heal: {{tokens: 256, batch_tokens: 64, held_out_tokens: 64, evaluations: 2,
             calibration: {{sequence_tokens: 64}}}}
    - prune_vocabulary: {{vocab_size: 448}}
    - quantize_rtn: {{bits: 8, group_size: 32}}
export: [gguf]
suite: suite.jsonl
build: {{threads: 1}}
"""


def _plan(tiny: Tiny, directory: Path, text: str = RECIPE) -> BuildSteps:
    directory.mkdir(exist_ok=True)
    (directory / "domain.txt").write_text(DOMAIN * 40, encoding="utf-8")
    write_suite(directory / "suite.jsonl", 4)
    loaded = load_recipe(write_recipe(directory, tiny("llama"), text))
    return plan_build(loaded.recipe, tiny("llama"), machine="m")


def _in_kept_tokens(judge: Judged, student: Path, dst: Path) -> Judged:
    write_kept_logits(judge.student, student, TEXTS, empty(dst), chat=Chat(), threads=1)
    return Judged(judge.student, dst)


def test_good_artifacts_pass_all_gates_in_all_formats_and_broken_ones_do_not(
    tmp_path: Path,
) -> None:
    stages = [stage(tmp_path)]
    made = make_good(tmp_path, "llama", {"float": stages, "int8": [*stages, QuantizeRtn(bits=8)]})
    alarms = []
    for rung, good in made.items():
        judges = (good.reference, good.base)
        reference, base = (
            _in_kept_tokens(judge, good.rung.student, tmp_path / f"kept-{rung}-{number}")
            for number, judge in enumerate(judges)
        )
        held = Good(good.rung, reference, base)
        assert Student(good.rung.student).facts.vocab_size == SIZE
        for name in ALL:
            artifact = export(good.rung.student, tmp_path / f"{rung}-{name}", name)
            found = verify(held, artifact, name)
            alarms += [
                f"{rung}/{name} {c.name}: {c.value} against {c.limit}: {c.detail}"
                for c in found.checks
                if not c.passed
            ]
            # Of the kept tokens the reference says what its own rows say.
            assert max(t.kl_mean for t in found.against_reference) < 0.02
            assert all(0 < (t.removed_mass or 0) < 1 for t in found.against_reference)
            assert found.golden is not None
        if rung == "int8":
            _break(held, tmp_path)
    assert alarms == []


def _break(good: Good, tmp_path: Path) -> None:
    """A merge that is missing, and ids that are off by one, in what is exported."""
    for fault in ("merge", "ids"):
        broken = tmp_path / f"broken-{fault}"
        shutil.copytree(good.rung.student, broken)
        path = broken / "tokenizer.json"
        file = json.loads(path.read_text(encoding="utf-8"))
        if fault == "merge":
            file["model"]["merges"].pop(0)
        else:
            vocabulary = file["model"]["vocab"]
            last = max(vocabulary.values())
            names = {i: token for token, i in vocabulary.items()}
            vocabulary |= {names[last]: last - 1, names[last - 1]: last}
        path.write_text(json.dumps(file), encoding="utf-8")
        artifact = export(broken, tmp_path / f"artifact-{fault}", "gguf")
        failed = {c.name for c in verify(good, artifact, "gguf").checks if not c.passed}
        assert "tokenizer: ids" in failed, fault


def test_a_rung_with_fewer_tokens_is_judged_in_its_own(tiny: Tiny, tmp_path: Path) -> None:
    steps = _plan(tiny, tmp_path)
    whole, small = steps.artifacts
    by_label = {step.label: step for step in steps.ordered()}
    pruning = by_label["small: prune_vocabulary"]
    assert whole.score is not None
    assert small.score is not None
    assert small.compare is not None
    assert whole.score.inputs["student"] is steps.reference
    assert small.score.inputs["student"] is small.student
    assert "vocabulary" not in whole.verify.inputs["reference_judge"].inputs
    assert small.verify.inputs["reference_judge"].inputs["vocabulary"] is pruning
    done: dict[str, Path] = {}
    verified, judged = (_run(s, tmp_path / "steps", done) for s in (small.verify, small.compare))
    student, scores = done[small.student.key], done[small.score.key]
    found = Verification.model_validate_json((verified / VERIFICATION_FILE).read_bytes())
    assert [c for c in found.checks if not c.passed] == []
    assert (judged / EVALUATION_FILE).exists()
    assert read_kept(student) is not None
    expected = _score_first_case(student, tmp_path)
    line = json.loads((scores / SCORES_FILE).read_text().split("\n")[0])
    assert line["log_probs"] == pytest.approx(expected, rel=0.02)


def _run(step: Step, root: Path, done: dict[str, Path]) -> Path:
    """The output of a step and of all before it, run here and not in processes of their own."""
    if step.key not in done:
        inputs = {name: _run(source, root, done) for name, source in step.inputs.items()}
        if step.task.keeps_work():
            inputs[WORK] = empty(root / f"{step.key}-work")
        out = empty(root / step.key)
        step.task.run(inputs, out)
        done[step.key] = out
    return done[step.key]


def _score_first_case(student: Path, tmp_path: Path) -> list[float]:
    """By ``transformers`` on the rung's own dequantized weights, all at once."""
    case = json.loads((tmp_path / "suite.jsonl").read_text().split("\n")[0])
    tokenizer = load_tokenizer(student)
    prompt = tokenizer.apply_chat_template(
        case["messages"], tokenize=False, add_generation_prompt=True
    )
    dequantize_student(student, copy := empty(tmp_path / "copy"))
    model, before = load(copy), tokenizer(prompt).input_ids
    expected = []
    for choice in case["choices"]:
        ids = [*before, *tokenizer(choice).input_ids]
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(before), len(ids))
        expected.append(float(sum(rows[place - 1, ids[place]] for place in places)))
    return expected


def test_traffic_is_read_in_the_artifacts_own_tokens(tiny: Tiny, tmp_path: Path) -> None:
    small, reference = pruned(tiny("llama"), tmp_path), empty(tmp_path / "reference")
    log = tmp_path / "log.jsonl"
    texts = ["I love this film!", "the quick brown fox jumps.", "def add(a: int, b: int)"]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {"threads": 1, "context_tokens": 128}
    read_reference(tiny("llama"), log, reference, sample=10, chat=Chat(), **common)
    found = find_disagreements(
        small, "torch_reference", tiny("llama"), reference, (), vocabulary=small, **common
    )
    assert found.prompts == 3
    # What is cut as before is answered as before, among the tokens that stayed; code is not.
    kl = {prompt.prompt: prompt.kl for prompt in found.loudest}
    assert kl.pop(texts[2]) > 0.5
    # Tokens that went are still in what the reference did not name, beyond 256 of 512.
    assert all(value < 0.01 for value in kl.values()), kl


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("vocab_size: 448", "vocab_size: 512"), "not below"),
        (("file: domain.txt, ", ""), "no text of the domain"),
        (
            ("    - prune_vocabulary", "    - quantize_rtn: {{bits: 8}}\n    - prune_vocabulary"),
            "q",
        ),
    ],
)
def test_impossible_rungs_are_refused(
    tiny: Tiny, tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        _plan(tiny, tmp_path, RECIPE.replace(*change))
