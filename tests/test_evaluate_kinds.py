from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.generate import Voice, generate_answers
from edgedistill.evaluate.grade import count_items, find_json_object, grade_answer
from edgedistill.evaluate.prompts import render_prompts
from edgedistill.evaluate.reference import score_reference
from edgedistill.evaluate.score import Answer, Score, TextBits, read_scores, score_artifact
from edgedistill.evaluate.suite import Case, GenerateCase, load_suite
from edgedistill.exporters.gguf import Gguf
from edgedistill.runtimes.torch_reference import TorchReference, TorchSession
from edgedistill.session import Logits
from edgedistill.student import Student

Tiny = Callable[..., Path]
CHAT = Chat(system="Be brief.")
QUESTIONS = ["Who jumps?", "2 + 2", "I love this film!", "naïve café 🙂", "Who jumps over?"]
TEXTS = ["The quick brown fox jumps.", "Größe, 你好世界", "def add(a, b):\n    return a + b\n"]


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": text,
        "kind": "generate",
        "messages": [{"role": "user", "content": text}],
        "exact": ["fox"],
        "max_tokens": 12,
    } | fields


def read(words: str, **fields: Any) -> dict[str, Any]:
    return {"id": words, "kind": "text", "text": words} | fields


def choose(text: str) -> dict[str, Any]:
    return {
        "id": f"choose {text}",
        "kind": "choice",
        "messages": [{"role": "user", "content": text}],
        "choices": ["good", "bad"],
        "answer": 0,
    }


def write(path: Path, *cases: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return path


def mixed_suite(path: Path) -> Path:
    """All kinds, in no order."""
    answering = [{"role": "user", "content": "Write a line."}]
    return write(
        path,
        choose("fox"),
        read(TEXTS[0]),
        *(ask(q) for q in QUESTIONS),
        read(TEXTS[1], messages=answering),
        choose("dog"),
        read(TEXTS[2]),
    )


def score(student: Path, suite: Path, dst: Path, runtime: str | None) -> dict[str, Score]:
    """By the reference's own way (None), or by a session of a runtime."""
    dst.mkdir()
    if runtime is None:
        score_reference(student, [suite], dst, chat=CHAT, threads=1, context_tokens=256)
    else:
        artifact = student
        if runtime == "llama_cpp":
            artifact = dst / "artifact"
            artifact.mkdir()
            Gguf().export(Student(student), artifact, context_tokens=256)
        score_artifact(
            artifact,
            runtime,
            student,
            [suite],
            dst,
            sample=None,
            chat=CHAT,
            threads=1,
            context_tokens=256,
        )
    return read_scores(dst)


def open_model(student: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()


def conversation(student: Path, text: str) -> str:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    tokenizer = load_tokenizer(student)
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def bits_per_byte(student: Path, before: str, text: str) -> float:
    """The definition: one whole pass of transformers."""
    import torch

    tokenizer = load_tokenizer(student)
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = open_model(student)(torch.tensor([ids])).logits[0].double()
    log_probs = torch.log_softmax(logits, dim=-1)
    nats = -sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))
    return nats / math.log(2) / len(text.encode())


def greedy(student: Path, text: str, tokens: int = 12) -> list[int]:
    """What ``transformers`` generates after a question, its own loop and cache."""
    import torch

    ids = load_tokenizer(student)(conversation(student, text), add_special_tokens=False)
    prompt = torch.tensor([ids["input_ids"]])
    with torch.inference_mode():
        out = open_model(student).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=2,
        )
    generated: list[int] = out[0, prompt.shape[1] :].tolist()
    return generated


@pytest.mark.parametrize("runtime", [None, "torch_reference"])
def test_texts_cost_the_bits_of_one_whole_pass(
    tiny: Tiny, tmp_path: Path, runtime: str | None
) -> None:
    scores = score(tiny(), mixed_suite(tmp_path / "s.jsonl"), tmp_path / "out", runtime)
    begins = load_tokenizer(tiny()).bos_token
    before = [begins, conversation(tiny(), "Write a line."), begins]
    for text, beginning in zip(TEXTS, before, strict=True):
        found = scores[text]
        assert isinstance(found, TextBits)
        assert found.size_bytes == len(text.encode())
        expected = bits_per_byte(tiny(), beginning, text)
        assert found.bits_per_byte == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("runtime", [None, "torch_reference"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_are_what_transformers_generates(
    tiny: Tiny, tmp_path: Path, family: str, runtime: str | None
) -> None:
    student = tiny(family)
    scores = score(student, mixed_suite(tmp_path / "s.jsonl"), tmp_path / "out", runtime)
    tokenizer = load_tokenizer(student)
    for question in QUESTIONS:
        found = scores[question]
        assert isinstance(found, Answer)
        expected = tokenizer.decode(greedy(student, question), skip_special_tokens=True)
        assert found.text == expected
    assert list(scores) == [case.id for case in load_suite([tmp_path / "s.jsonl"])]


def test_kinds_do_not_disturb_each_other(tiny: Tiny, tmp_path: Path) -> None:
    mixed = score(tiny(), mixed_suite(tmp_path / "s.jsonl"), tmp_path / "all", "torch_reference")
    for number, case in enumerate(load_suite([tmp_path / "s.jsonl"])):
        line = case.model_dump(mode="json", exclude_unset=True)
        alone = write(tmp_path / f"{number}.jsonl", line)
        (found,) = score(tiny(), alone, tmp_path / str(number), "torch_reference").values()
        if isinstance(found, Answer):
            assert found == mixed[case.id]
        elif isinstance(found, TextBits):
            text = mixed[case.id]
            assert isinstance(text, TextBits)
            assert found.bits_per_byte == pytest.approx(text.bits_per_byte, abs=1e-4)
        else:
            both = mixed[case.id]
            assert isinstance(both, np.ndarray)
            np.testing.assert_allclose(found, both, atol=1e-4)


def copy_student(src: Path, dst: Path) -> Path:
    shutil.copytree(src, dst)
    return dst


def answer_of(student: Path, tmp_path: Path, **fields: Any) -> str:
    suite = write(tmp_path / "one.jsonl", ask("Who jumps?", **fields))
    cases = [c for c in load_suite([suite]) if isinstance(c, GenerateCase)]
    prompts = render_prompts(student, cases, CHAT, context_tokens=256)
    with TorchReference().open(student, context_tokens=256, threads=1) as session:
        voice = Voice.of(student, CHAT)
        return generate_answers(session, {c.id: c for c in cases}, prompts, voice)["Who jumps?"]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_answer_ends_at_every_stated_end_token(tiny: Tiny, tmp_path: Path, file: str) -> None:
    ids = greedy(tiny(), "Who jumps?")
    end = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    student = copy_student(tiny(), tmp_path / "student")
    path = student / file
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"eos_token_id": [2, ids[end]]}))
    expected = load_tokenizer(student).decode(ids[:end], skip_special_tokens=True)
    assert answer_of(student, tmp_path) == expected
    assert answer_of(tiny(), tmp_path) != expected


def test_an_answer_ends_where_the_template_ends_a_turn(tiny: Tiny, tmp_path: Path) -> None:
    student = copy_student(tiny(), tmp_path / "student")
    assert Voice.of(student, CHAT).end_ids == {2}
    template = (student / "chat_template.jinja").read_text()
    turn = template.replace("<|im_end|>", "<|endoftext|>")
    (student / "chat_template.jinja").write_text(turn)
    assert Voice.of(student, CHAT).end_ids == {0, 2}
    # A turn that ends in plain text has no end token of its own.
    (student / "chat_template.jinja").write_text(template.replace("<|im_end|>", " over"))
    assert Voice.of(student, CHAT).end_ids == {2}


def test_an_answer_is_cut_before_the_first_stop_text(tiny: Tiny, tmp_path: Path) -> None:
    whole = answer_of(tiny(), tmp_path)
    assert len(whole) > 8
    late, early = whole[6:8], whole[3:5]
    cut = min(whole.find(late), whole.find(early))
    assert answer_of(tiny(), tmp_path, stop=[late, early, "never"]) == whole[:cut]
    assert answer_of(tiny(), tmp_path, stop="never") == whole


def test_a_shorter_answer_is_the_beginning_of_a_longer_one(tiny: Tiny, tmp_path: Path) -> None:
    ids = greedy(tiny(), "Who jumps?")
    decode = load_tokenizer(tiny()).decode
    for tokens in (1, 5):
        expected = decode(ids[:tokens], skip_special_tokens=True)
        assert answer_of(tiny(), tmp_path, max_tokens=tokens) == expected


class Overflowing(TorchSession):
    """Breaks after a few tokens, as a float16 cache does when it overflows."""

    def step(self, token: int) -> Logits:
        logits = super().step(token).copy()
        logits[5] = np.nan
        return logits


def test_an_answer_of_infinite_logits_is_an_error_that_names_the_case(
    tiny: Tiny, tmp_path: Path
) -> None:
    suite = write(tmp_path / "one.jsonl", ask("Who jumps?"))
    cases = [c for c in load_suite([suite]) if isinstance(c, GenerateCase)]
    prompts = render_prompts(tiny(), cases, CHAT, context_tokens=256)
    plain = TorchReference().open(tiny(), context_tokens=256, threads=1)
    assert isinstance(plain, TorchSession)
    session = Overflowing(plain._model, tiny(), 256)
    with pytest.raises(StageError, match=r"case Who jumps\? are not finite after 1 tokens"):
        generate_answers(session, {c.id: c for c in cases}, prompts, Voice.of(tiny(), CHAT))


def test_an_answer_has_to_fit_the_context(tiny: Tiny, tmp_path: Path) -> None:
    suite = write(tmp_path / "one.jsonl", ask("Who jumps?", max_tokens=250))
    with pytest.raises(InputError, match=r"1 of 1 cases do not fit .* = 256"):
        render_prompts(tiny(), load_suite([suite]), CHAT, context_tokens=256)


def test_a_text_alone_needs_a_token_that_begins_texts(tiny: Tiny, tmp_path: Path) -> None:
    student = copy_student(tiny(), tmp_path / "student")
    config = json.loads((student / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        config.pop(name)
    (student / "tokenizer_config.json").write_text(json.dumps(config))
    suite = write(tmp_path / "one.jsonl", read("The quick brown fox"))
    with pytest.raises(InputError, match="has no token that begins or ends texts"):
        render_prompts(student, load_suite([suite]), CHAT, context_tokens=256)


def test_llama_cpp_answers_and_predicts_as_the_reference(tiny: Tiny, tmp_path: Path) -> None:
    suite = mixed_suite(tmp_path / "s.jsonl")
    expected = score(tiny(), suite, tmp_path / "reference", None)
    found = score(tiny(), suite, tmp_path / "llama", "llama_cpp")
    same = sum(found[q] == expected[q] for q in QUESTIONS)
    assert same >= len(QUESTIONS) - 1  # float16 weights may turn one near tie
    for text in TEXTS:
        ours, theirs = found[text], expected[text]
        assert isinstance(ours, TextBits)
        assert isinstance(theirs, TextBits)
        assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=0.01)


def case_of(**fields: Any) -> GenerateCase:
    return GenerateCase.model_validate(
        {"id": "a", "kind": "generate", "messages": [{"role": "user", "content": "?"}]} | fields
    )


@pytest.mark.parametrize(
    ("fields", "answer", "grade"),
    [
        ({"exact": "Paris"}, " Paris\n", 1.0),
        ({"exact": "Paris"}, "paris", 0.0),
        ({"exact": ["Paris", "paris "]}, "paris", 1.0),
        ({"exact": "Paris"}, "Paris.", 0.0),
        ({"regex": r"^(yes|yeah)\b"}, "yeah, sure", 1.0),
        ({"regex": r"^(yes|yeah)\b"}, "oh yes", 0.0),
        ({"regex": r"\d{4}$"}, "in 1984 ", 1.0),
        ({"json_fields": {"a": 1, "b": "x"}}, '{"a": 1.0, "b": " x"}', 1.0),
        ({"json_fields": {"a": 1, "b": "x"}}, 'Sure:\n```json\n{"b": "x", "a": 1}\n```', 1.0),
        ({"json_fields": {"a": 1, "b": "x"}}, '{"a": 1}', 2 / 3),
        ({"json_fields": {"a": 1, "b": "x"}}, '{"a": 1, "b": "y"}', 1 / 2),
        ({"json_fields": {"a": 1}}, '{"a": true}', 0.0),
        ({"json_fields": {"a": "1"}}, '{"a": 1}', 0.0),
        ({"json_fields": {"a": 1}}, '{"a": 1, "made up": 2}', 2 / 3),
        ({"json_fields": {"a": None}}, "{}", 1.0),
        ({"json_fields": {"a": None}}, '{"a": null}', 1.0),
        ({"json_fields": {"a": None}}, '{"a": 1}', 0.0),
        ({"json_fields": {"t": ["x", "y"]}}, '{"t": ["y", "z"]}', 1 / 2),
        ({"json_fields": {"t": ["x", "x"]}}, '{"t": ["x"]}', 2 / 3),
        ({"json_fields": {"p": {"city": "Oslo", "zip": 1}}}, '{"p": {"city": "Oslo"}}', 2 / 3),
        ({"json_fields": {"i": [{"n": 1, "m": 2}]}}, '{"i": [{"m": 2, "n": 1}]}', 1.0),
        ({"json_fields": {"a": 1}}, "no object { at all", 0.0),
        ({"json_fields": {"a": 1}}, '{"a": ' + "[" * 5000, 0.0),
        ({"json_fields": {"a": 1}}, '{broken {"a": 1}', 1.0),
    ],
)
def test_an_answer_is_graded(fields: dict[str, Any], answer: str, grade: float) -> None:
    assert grade_answer(case_of(**fields), answer) == pytest.approx(grade)


def test_the_grade_of_fields_is_the_f1_of_their_items() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    names, values = list("abcdef"), ["x", "y", 3]
    items = [(name, value) for name in names for value in values]
    for _ in range(200):
        asked, given = (
            {n: values[rng.integers(3)] for n in names if rng.random() < 0.6} for _ in range(2)
        )
        if not asked:
            continue
        wanted = [asked.get(name) == value for name, value in items]
        found = [given.get(name) == value for name, value in items]
        expected = metrics.f1_score(wanted, found, zero_division=1.0)
        case = case_of(json_fields=asked)
        assert grade_answer(case, json.dumps(given)) == pytest.approx(expected)


def test_items_are_counted_by_field() -> None:
    expected = {"who": "Ada", "tags": ["x", "y"], "at": {"year": 1843}}
    counts = count_items(expected, '{"who": "Bob", "tags": ["y"], "at": {"year": 1843, "day": 1}}')
    found = {name: (c.right, c.wrong, c.missed) for name, c in counts.items()}
    assert found == {
        "who": (0, 1, 1),
        "tags": (1, 0, 1),
        "at.year": (1, 0, 0),
        "at.day": (0, 1, 0),
    }
    assert find_json_object('[1, {"a": 2}] {"b": 3}') == {"a": 2}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (ask("a", exact=[]), "one of exact, regex, json_fields grades the answer, not none"),
        (ask("a", regex="x"), "grades the answer, not exact and regex"),
        (ask("a", exact=[], regex="("), "regex = '(' is not valid: missing )"),
        (ask("a", exact=[""]), 'exact.0 = ""'),
        (ask("a", exact=[], json_fields={}), "json_fields = {}"),
        (ask("a", exact=[], json_fields=["x"]), 'json_fields = ["x"]'),
        (ask("a", max_tokens=0), "max_tokens = 0"),
        (ask("a", stop=[1]), "stop.0 = 1"),
        (ask("a", messages=[]), "messages = []"),
        (ask("a", choices=["x", "y"]), 'choices = ["x", "y"]'),
        (read("a", text=""), 'text = ""'),
        (read("a", value=0), "value = 0"),
        (read("a", answer=1), "answer = 1"),
        (read("a", kind="speak"), 'kind = "speak" cannot be scored'),
        (read("a", kind=["text"]), 'kind = ["text"] cannot be scored'),
    ],
)
def test_a_wrong_case_of_each_kind_is_named(
    tmp_path: Path, case: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "suite.jsonl", read("fine"), case)
    with pytest.raises(InputError) as raised:
        load_suite([path])
    assert message in str(raised.value)
    assert f"{path}:2: " in str(raised.value)


def test_cases_of_all_kinds_carry_weight_and_value(tmp_path: Path) -> None:
    cases = load_suite(
        [write(tmp_path / "s.jsonl", ask("a", weight=2, value=3), read("b", weight=0.5))]
    )
    assert [case.importance for case in cases] == [6.0, 0.5]
    assert [type(case).__name__ for case in cases] == ["GenerateCase", "TextCase"]
    assert all(isinstance(case, Case) for case in cases)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "kind": "generate", "answer": "x", "grade": 1.5}',
        '{"id": "a", "kind": "generate", "answer": "x", "grade": NaN}',
        '{"id": "a", "kind": "generate", "grade": 1}',
        '{"id": "a", "kind": "text", "bits_per_byte": Infinity, "bytes": 3}',
        '{"id": "a", "kind": "text", "bits_per_byte": 1, "bytes": 0}',
        '{"id": "a", "kind": "sing", "log_probs": [1]}',
        '{"id": "a", "log_probs": [[1]]}',
        '["a"]',
        "[" * 5000,
    ],
)
def test_damaged_scores_of_any_kind_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "scores.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"scores\.jsonl:1: "):
        read_scores(tmp_path)


def test_the_examples_of_the_docs_are_cases_and_scores(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "suites.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```json\n")[1:]]
    scores = [block for block in blocks if "log_probs" in block]
    (tmp_path / "suite.jsonl").write_text("".join(b for b in blocks if b not in scores))
    cases = {case.id: case for case in load_suite([tmp_path / "suite.jsonl"])}
    assert {case.kind for case in cases.values()} == {"choice", "generate", "text"}
    (tmp_path / "scores.jsonl").write_text("".join(scores))
    for case_id, score in read_scores(tmp_path).items():
        case = cases[case_id]
        if isinstance(case, GenerateCase):
            assert isinstance(score, Answer)
            assert grade_answer(case, score.text) == pytest.approx(score.grade, abs=1e-6)
        if isinstance(score, TextBits):
            assert score.size_bytes == len(case.question.encode())
