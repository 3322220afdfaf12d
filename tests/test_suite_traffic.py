from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import InputError, RecipeError, StageError
from edgedistill.evaluate.first_tokens import (
    POSITIONS,
    Answer,
    answer_prompts,
    coarse_kl,
    disagreements,
)
from edgedistill.evaluate.suite import load_suite
from edgedistill.evaluate.traffic import find_disagreements, read_reference
from edgedistill.evaluate.traffic_clusters import TrafficPrompt, find_clusters
from edgedistill.plan import plan_build
from edgedistill.recipe_load import load_recipe
from edgedistill.runtimes.torch_reference import TorchReference
from edgedistill.tasks import ReadTraffic, Traffic
from edgedistill.traffic_results import TrafficFindings
from tests.recipes import MINIMAL, write_recipe, write_suite
from tests.sentiment_logs import real_cases, write_log
from tests.tiny import write_student

Tiny = Callable[..., Path]
CONTEXT = 256
NUMBERS = [
    "what is {} plus {}", "add {} to {} please", "{} times {} makes", "subtract {} from {}",
]  # fmt: skip


def change_rows(student: Path, out: Path, tokens: list[int]) -> Path:
    """A copy of a student whose embeddings of some tokens are other ones."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for file in student.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(out / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    rows[tokens] = torch.randn(len(tokens), rows.shape[1], generator=torch.manual_seed(1))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("untied"), "llama3")


@pytest.fixture(scope="module")
def bad_at_numbers(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(untied / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    digits = [vocabulary[str(digit)] for digit in range(10)]
    return change_rows(untied, tmp_path_factory.mktemp("bad") / "student", digits)


def texts_without_digits(count: int, offset: int = 0) -> list[str]:
    texts = [case["messages"][0]["content"] for case in real_cases(3 * count, offset=offset)]
    return [t for t in texts if len(t) < 120 and not any(c.isdigit() for c in t)][:count]


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(4)
    shared = [rng.randrange(3, 200) for _ in range(5)]
    return [
        [*shared[: rng.randrange(6)], *(rng.randrange(3, 200) for _ in range(rng.randrange(1, 9)))]
        for _ in range(count)
    ]


def answers_of(student: Path, prompts: list[list[int]], ends: frozenset[int]) -> list[Answer]:
    with TorchReference().open(student, context_tokens=CONTEXT, threads=1) as session:
        found = dict(answer_prompts(session, prompts, ends))
    return [found[i] for i in range(len(prompts))]


def full_log_probs(student: Path, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [tokens, vocab] by a whole forward pass of transformers, nothing cached."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    found: np.ndarray[Any, np.dtype[np.float64]] = logits.log_softmax(-1).numpy()
    return found


def test_disagreements_are_a_tight_lower_bound_of_the_whole_divergence(
    untied: Path, bad_at_numbers: Path
) -> None:
    prompts = random_prompts(12)
    answers = answers_of(untied, prompts, frozenset())
    with TorchReference().open(bad_at_numbers, context_tokens=CONTEXT, threads=1) as session:
        found = dict(disagreements(session, prompts, answers))
    seen_any = 0
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = prompt + answer.tokens.tolist()
        assert len(answer.tokens) == POSITIONS
        last = slice(len(prompt) - 1, len(ids) - 1)
        reference, artifact = (full_log_probs(s, ids)[last] for s in (untied, bad_at_numbers))
        assert reference.argmax(-1).tolist() == answer.tokens.tolist()  # greedy
        whole = (np.exp(reference) * (reference - artifact)).sum(-1).mean()
        assert found[index].kl <= whole + 1e-6
        assert found[index].kl >= 0.9 * whole - 1e-6
        agrees = artifact.argmax(-1) == answer.tokens
        assert found[index].changed is not bool(agrees.all())
        if not agrees.all():
            first = int(np.argmin(agrees))
            assert found[index].said == [*answer.tokens[:first], int(artifact[first].argmax())]
        seen_any += whole > 0.01
    assert seen_any  # or this test shows nothing


def test_a_model_agrees_with_itself(untied: Path) -> None:
    prompts = random_prompts(6)
    answers = answers_of(untied, prompts, frozenset())
    with TorchReference().open(untied, context_tokens=CONTEXT, threads=1) as session:
        for index, found in disagreements(session, prompts, answers):
            assert found.kl < 1e-9
            assert not found.changed
            assert found.said == answers[index].tokens.tolist()


def test_an_answer_ends_with_an_end_token(untied: Path) -> None:
    (prompt,) = random_prompts(1)
    (whole,) = answers_of(untied, [prompt], frozenset())
    second = int(whole.tokens[1])
    assert second != whole.tokens[0]
    (ended,) = answers_of(untied, [prompt], frozenset([second]))
    assert ended.tokens.tolist() == whole.tokens[:2].tolist()
    assert ended.log_probs == pytest.approx(whole.log_probs[:2])


def test_a_coarser_divergence_is_never_larger() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = rng.dirichlet(np.full(40, 0.3), 2) + 1e-12
        coarse = [np.append(x[:10], x[10:].sum()) for x in (p, q)]
        whole = float((p * np.log(p / q)).sum())
        lower = float(coarse_kl(*(np.log(x)[None] for x in coarse))[0])
        assert 0 <= lower <= whole + 1e-9
    nothing_left = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    certain = [np.append(x, [[-np.inf]], axis=1) for x in nothing_left]
    assert coarse_kl(*certain) == pytest.approx(coarse_kl(*nothing_left))


def test_logits_that_are_not_finite_are_an_error(untied: Path) -> None:
    prompts = random_prompts(2)
    answers = answers_of(untied, prompts, frozenset())
    with TorchReference().open(untied, context_tokens=CONTEXT, threads=1) as session:
        session._model.lm_head.weight.data[7] = np.nan  # type: ignore[attr-defined]
        with pytest.raises(StageError, match="not finite"):
            list(disagreements(session, prompts, answers))


def traffic_rows() -> list[dict[str, Any]]:
    """Real texts and, a sixth of them, sums."""
    rng = random.Random(11)
    rows: list[dict[str, Any]] = [{"prompt": text} for text in texts_without_digits(150)]
    rows += [
        {"prompt": rng.choice(NUMBERS).format(rng.randrange(10**4), rng.randrange(10**4))}
        for _ in range(30)
    ]
    rng.shuffle(rows)
    return rows


def write_cases(path: Path, texts: list[str]) -> Path:
    return write_log(
        path,
        [
            {
                "id": f"c{i}",
                "kind": "choice",
                "messages": [{"role": "user", "content": text}],
                "choices": ["good", "bad"],
                "answer": i % 2,
            }
            for i, text in enumerate(texts)
        ],
    )


@pytest.fixture(scope="module")
def read(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's answers to the traffic."""
    directory = tmp_path_factory.mktemp("traffic")
    rows = [
        *traffic_rows(),
        {"prompt": "word " * 400},
        {"prompt": "My mail is ann@mail.example, where is it"},
    ]
    log = write_log(directory / "traffic.jsonl", ["{broken", *rows])
    (directory / "out").mkdir()
    read_reference(
        untied,
        log,
        directory / "out",
        sample=500,
        chat=Chat(),
        threads=1,
        context_tokens=CONTEXT,
    )
    return directory / "out"


def findings(artifact: Path, student: Path, read: Path, suite: list[Path]) -> TrafficFindings:
    return find_disagreements(
        artifact, "torch_reference", student, read, suite, threads=1, context_tokens=CONTEXT
    )


def test_a_capability_that_broke_and_no_case_measures_is_named(
    untied: Path, bad_at_numbers: Path, read: Path, tmp_path: Path
) -> None:
    suite = write_cases(tmp_path / "suite.jsonl", texts_without_digits(150, offset=1))
    found = findings(bad_at_numbers, untied, read, [suite])
    assert (found.skipped, found.left_out) == (1, 1)
    assert found.prompts == found.distinct - 1
    worst = found.clusters[0]
    assert worst.measured is False
    assert "digits" in worst.properties
    assert worst.kl_mean > 0.1
    assert worst.kl_mean > 3 * found.kl_mean
    assert all(any(c.isdigit() for c in example.prompt) for example in worst.examples)
    assert all(any(c.isdigit() for c in example.prompt) for example in found.loudest)
    assert worst in found.unmeasured
    measured = sum(c.traffic_share for c in found.clusters if c.measured)
    assert measured > 0.6
    for cluster in found.clusters:
        if "digits" not in cluster.properties and cluster is not worst:
            assert cluster.kl_mean < 0.2 * worst.kl_mean


def test_with_cases_for_it_the_same_capability_is_measured(
    untied: Path, bad_at_numbers: Path, read: Path, tmp_path: Path
) -> None:
    rng = random.Random(12)
    sums = [
        rng.choice(NUMBERS).format(rng.randrange(10**4), rng.randrange(10**4)) for _ in "x" * 40
    ]
    suite = write_cases(tmp_path / "suite.jsonl", texts_without_digits(150, offset=1) + sums)
    found = findings(bad_at_numbers, untied, read, [suite])
    assert "digits" in found.clusters[0].properties
    assert found.clusters[0].measured is True
    assert found.clusters[0].nearest_case is not None
    assert int(found.clusters[0].nearest_case[1:]) >= len(texts_without_digits(150, offset=1))


def make_prompts(count: int) -> list[TrafficPrompt]:
    rng = random.Random(5)
    return [
        TrafficPrompt(
            text=text,
            question=text,
            weight=rng.choice([0.5, 3.0]),
            properties=("question",) if "?" in text else (),
            kl=rng.random(),
            changed=rng.random() < 0.3,
            reference_answer="",
            artifact_answer="",
        )
        for text in texts_without_digits(count)
    ]


def test_the_figures_of_a_cluster_are_weighted_by_what_each_prompt_stands_for() -> None:
    prompts = make_prompts(11)  # too few to be divided
    (cluster,) = find_clusters(prompts, [])
    weight = sum(p.weight for p in prompts)
    assert cluster.traffic_share == pytest.approx(1)
    assert cluster.kl_mean == pytest.approx(sum(p.weight * p.kl for p in prompts) / weight)
    assert cluster.changed_share == pytest.approx(
        sum(p.weight * p.changed for p in prompts) / weight
    )
    assert [e.kl for e in cluster.examples] == sorted((p.kl for p in prompts), reverse=True)[:3]
    assert cluster.measured is False  # there is no suite
    many = make_prompts(120)
    clusters = find_clusters(many, [])
    assert 5 <= len(clusters) <= 10
    assert [c.kl_mean for c in clusters] == sorted((c.kl_mean for c in clusters), reverse=True)
    assert sum(c.prompts for c in clusters) >= 110
    assert find_clusters(many, []) == clusters


def test_a_suite_too_small_to_tell_says_so(tmp_path: Path) -> None:
    small, enough = (
        load_suite([write_cases(tmp_path / f"{n}.jsonl", texts_without_digits(n, offset=1))])
        for n in (18, 19)
    )
    prompts = make_prompts(30)
    assert {cluster.measured for cluster in find_clusters(prompts, small)} == {None}
    assert None not in {cluster.measured for cluster in find_clusters(prompts, enough)}


def test_the_same_weights_agree_on_all_traffic(untied: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", traffic_rows()[:12])
    settings: dict[str, Any] = {"sample": 12, "chat": Chat(system="Rate it."), "threads": 1}
    read_reference(untied, log, tmp_path, context_tokens=CONTEXT, **settings)
    same = findings(untied, untied, tmp_path, [])
    assert same.prompts == 12
    assert same.kl_max < 1e-9
    assert same.changed_share == 0
    assert all(e.reference_answer == e.artifact_answer for e in same.loudest)


def test_personal_data_does_not_reach_the_report(read: Path) -> None:
    text = (read / "prompts.jsonl").read_text(encoding="utf-8")
    assert "ann@mail.example" not in text
    assert "[EMAIL_1]" in text


def test_traffic_that_does_not_fit_is_an_error_with_its_reason(
    untied: Path, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log.jsonl", [{"prompt": "word " * 400}])
    settings: dict[str, Any] = {"sample": 5, "chat": Chat(), "threads": 1}
    with pytest.raises(InputError, match="no prompt of the sample fits into context_tokens = 64"):
        read_reference(untied, log, tmp_path, context_tokens=64, **settings)


RECIPE = MINIMAL + "suite: suite.jsonl\ntraffic: log.jsonl\nevaluate: {{traffic_sample: 40}}\n"


def test_a_recipe_with_traffic_gets_its_steps_and_one_without_none(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE.replace("[gguf]", "[coreml, onnx, gguf]")
    path = write_recipe(tmp_path, tiny("llama"), text)
    write_suite(tmp_path / "suite.jsonl")
    write_log(tmp_path / "log.jsonl", traffic_rows())
    recipe = load_recipe(path).recipe
    steps = plan_build(recipe, tiny("llama"), machine="m")
    tasks = [step.task for step in steps.ordered()]
    assert sum(isinstance(task, ReadTraffic) for task in tasks) == 1
    assert {a.format for a in steps.artifacts if a.traffic} == {"gguf"}
    keys = {s.label: s.key for s in steps.ordered()}
    write_log(tmp_path / "log.jsonl", traffic_rows()[1:])
    after = plan_build(load_recipe(path).recipe, tiny("llama"), machine="m")
    changed = {s.label for s in after.ordered() if keys[s.label] != s.key}
    assert changed == {"reference: traffic", "float/gguf: traffic", "int8/gguf: traffic"}
    plain = write_recipe(tmp_path / "plain", tiny("llama"))
    without = plan_build(load_recipe(plain).recipe, tiny("llama"), machine="m")
    assert not any(isinstance(s.task, ReadTraffic | Traffic) for s in without.ordered())


def test_a_traffic_file_that_is_no_log_is_a_problem_of_the_recipe(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, tiny("llama"), MINIMAL + "traffic: log.jsonl\n")
    write_log(tmp_path / "log.jsonl", ["nonsense"])
    with pytest.raises(RecipeError, match=r"recipe\.yaml:8: traffic: .*cannot be understood"):
        load_recipe(path)


@pytest.mark.slow
def test_a_build_reports_what_the_traffic_shows(tiny: Tiny, tmp_path: Path) -> None:
    from edgedistill.build import Options, build

    path = write_recipe(tmp_path, tiny("llama"), RECIPE.replace("  float: []\n", ""))
    write_suite(tmp_path / "suite.jsonl")
    write_log(tmp_path / "log.jsonl", [{"prompt": t} for t in texts_without_digits(40)])
    text = path.read_text(encoding="utf-8").replace("context_tokens: 64", "context_tokens: 256")
    path.write_text(text, encoding="utf-8")
    report, _ = build(Options(path, cache=tmp_path / "cache", exports=tmp_path / "exports"))
    (artifact,) = report.artifacts
    assert artifact.traffic is not None
    assert artifact.traffic.prompts == 40
    assert artifact.traffic.runtime == "llama_cpp"
    assert 0 < artifact.traffic.kl_mean < 0.1
    stored = json.loads((tmp_path / "exports" / "tiny" / "report.json").read_text())
    assert stored["artifacts"][0]["traffic"]["requests"] == 40
