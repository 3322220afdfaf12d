from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgedistill.chat import Chat, load_tokenizer
from edgedistill.errors import InputError
from edgedistill.evaluate.prompts import render_prompts
from edgedistill.evaluate.suite import ChoiceCase, load_suite, sample_cases

GOOD: dict[str, Any] = {
    "id": "a",
    "kind": "choice",
    "messages": [{"role": "user", "content": "I love this film!"}],
    "choices": ["terrible", "bad", "good"],
    "answer": 2,
}


def write(path: Path, *cases: dict[str, Any] | str) -> Path:
    lines = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cases]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_cases_come_back_in_order_over_all_files(tmp_path: Path) -> None:
    full = GOOD | {
        "id": "b",
        "soft_label": [0.0, 0.33, 0.67],
        "slices": ["domain=tweets", "short"],
        "weight": 2,
    }
    first = write(tmp_path / "1.jsonl", full, "", GOOD | {"id": "line\u2028separator"})
    cases = load_suite([first, write(tmp_path / "2.jsonl", GOOD)])
    assert [case.id for case in cases] == ["b", "line\u2028separator", "a"]
    full_case, _, plain = (case for case in cases if isinstance(case, ChoiceCase))
    assert full_case.soft_label == (0.0, 0.33, 0.67)
    assert (full_case.slices, full_case.weight) == (("domain=tweets", "short"), 2.0)
    assert (plain.soft_label, plain.slices, plain.weight) == (None, (), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sing"}, 'kind = "sing" cannot be scored'),
        ({"kind": "text"}, "text: Field required"),
        ({"answer": 3}, "answer = 3 is not the index of one of 3 choices"),
        ({"answer": "2"}, 'answer = "2"'),
        ({"answer": True}, "answer = true"),
        ({"choices": ["only"]}, 'choices = ["only"]'),
        ({"choices": ["a", "b", "a"]}, "repeats a choice"),
        ({"soft_label": [0.5, 0.1, 0.1]}, "sum 0.7, not 3 with the sum 1"),
        ({"soft_label": [0.5, 0.5]}, "soft_label has 2 shares"),
        ({"soft_label": [1.5, -0.5, 0.0]}, "soft_label.1 = -0.5"),
        ({"weight": 0}, "weight = 0"),
        ({"weight": float("nan")}, "weight = NaN"),
        ({"slices": ["all"]}, "uses 'all'"),
        ({"slices": ["x", "x"]}, "repeats one"),
        ({"messages": []}, "messages = []"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'messages.0.role = "robot"'),
        ({"anwser": 1}, "anwser = 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "suite.jsonl", GOOD | {"id": "fine"}, GOOD | change)
    with pytest.raises(InputError) as raised:
        load_suite([path])
    assert message in str(raised.value)
    assert f"{path}:2: " in str(raised.value)


def test_all_problems_are_reported_at_once_up_to_ten(tmp_path: Path) -> None:
    missing = {key: value for key, value in GOOD.items() if key != "answer"}
    bad = [GOOD | {"id": f"bad{i}", "answer": 9} for i in range(12)]
    path = write(tmp_path / "suite.jsonl", GOOD, GOOD, "{not json", "[1]", missing, *bad)
    with pytest.raises(InputError) as raised:
        load_suite([path])
    text = str(raised.value)
    assert text.startswith("16 problems in the suite")
    assert f'{path}:2: id = "a" was given before, at {path}:1' in text
    assert f"{path}:3: is not JSON" in text
    assert f"{path}:4: is list, not a JSON object" in text
    assert f"{path}:5: answer: Field required" in text
    assert f"{path}:11: " in text
    assert f"{path}:12: " not in text
    assert text.endswith("- and 6 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\n\n", "holds no case"), (b"\xff\xfe{}", "is not UTF-8")],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "suite.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_suite([path])


def make_cases(count: int) -> list[ChoiceCase]:
    fields = [
        {"id": f"c{i}", "answer": i % 3, "slices": ["rare"] if i % 10 == 0 else ["common"]}
        for i in range(count)
    ]
    return [ChoiceCase.model_validate(GOOD | change) for change in fields]


def test_a_sample_holds_every_stratum_in_proportion() -> None:
    cases = make_cases(3000)
    sample = sample_cases(cases, 300)
    assert len({case.id for case in sample}) == 300
    counts = Counter((case.slices[0], case.stratum) for case in sample)
    for answer in range(3):
        assert abs(counts["rare", answer] - 10) <= 1
        assert abs(counts["common", answer] - 90) <= 1


def test_a_sample_depends_on_the_cases_alone_and_keeps_suite_order() -> None:
    cases = make_cases(100)
    sample = sample_cases(cases, 37)
    ids = [case.id for case in cases]
    positions = [ids.index(case.id) for case in sample]
    assert positions == sorted(positions)
    again = sample_cases(list(reversed(cases)), 37)
    assert {case.id for case in again} == {case.id for case in sample}
    assert sample_cases(cases, None) == cases
    assert sample_cases(cases, 1000) == cases


def test_a_prompt_is_the_chat_template_with_the_recipes_system_message(tiny: Any) -> None:
    case = ChoiceCase.model_validate(GOOD)
    (prompt,) = render_prompts(tiny(), [case], Chat(system="Rate it."), context_tokens=256)
    tokenizer = load_tokenizer(tiny())
    assert tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nRate it.<|im_end|>\n"
        "<|im_start|>user\nI love this film!<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(choice) for choice in prompt.choices] == ["terrible", "bad", "good"]


def test_a_system_message_of_the_case_stands(tiny: Any) -> None:
    messages = [{"role": "system", "content": "Mine."}, *GOOD["messages"]]
    case = ChoiceCase.model_validate(GOOD | {"messages": messages})
    (prompt,) = render_prompts(tiny(), [case], Chat(system="Rate it."), context_tokens=256)
    text = load_tokenizer(tiny()).decode(prompt.ids)
    assert "Mine." in text
    assert "Rate it." not in text


def test_a_choice_that_merges_with_the_prompt_is_tokenized_on_its_own(
    tiny: Any, tmp_path: Path
) -> None:
    # A template that ends in the middle of a word: "terrib" + "le" is cut differently as a whole.
    for file in tiny().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    messages = [{"role": "user", "content": "It was terrib"}]
    fields = {"messages": messages, "choices": ["le", " plot", "le plot made no sense"]}
    case = ChoiceCase.model_validate(GOOD | fields)
    (prompt,) = render_prompts(tmp_path, [case], Chat(), context_tokens=256)
    tokenizer = load_tokenizer(tmp_path)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = encode("It was terrible")
    assert whole[: len(prompt.ids)] != prompt.ids  # or this test shows nothing
    assert prompt.choices[0] == encode("le")
    assert prompt.ids + prompt.choices[1] == encode("It was terrib plot")
    assert len(encode("It was terrible plot made no sense")) > len(prompt.ids)
    assert prompt.choices[2] == encode("le plot made no sense")


def test_cases_that_do_not_fit_the_context_are_named(tiny: Any) -> None:
    cases = make_cases(4)
    with pytest.raises(InputError, match=r"4 of 4 cases do not fit .* = 12: c0 \(\d+ tokens\)"):
        render_prompts(tiny(), cases, Chat(), context_tokens=12)


def test_a_template_that_refuses_and_a_missing_one_are_reported(tiny: Any, tmp_path: Path) -> None:
    for file in tiny().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(InputError, match=r"case c0\b.*refuses it: no users here"):
        render_prompts(tmp_path, make_cases(1), Chat(), context_tokens=256)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        render_prompts(tmp_path, make_cases(1), Chat(), context_tokens=256)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        render_prompts(tmp_path, make_cases(1), Chat(), context_tokens=256)


def test_template_args_reach_the_template(tiny: Any, tmp_path: Path) -> None:
    for file in tiny().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ mood }}: {{ messages[0]['content'] }}")
    chat = Chat(template_args={"mood": "sad"})
    (prompt,) = render_prompts(tmp_path, make_cases(1), chat, context_tokens=256)
    assert load_tokenizer(tmp_path).decode(prompt.ids) == "sad: I love this film!"
