"""Calibration text: what is read of it, how it is put into sequences, how it reaches the stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.content import ContentHashes
from edgedistill.errors import InputError, RecipeError
from edgedistill.recipe_load import load_recipe
from edgedistill.tasks import RunStage
from tests.recipes import write_recipe

Tiny = Callable[[str], Path]
WORDS = [f"word{i} fox{i * 7 % 13}" for i in range(3000)]
OPENING = "<|im_start|>user\n"


def tokenizer_of(student: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(student), local_files_only=True)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return path


def test_sequences_have_the_length_and_number_that_was_asked_for(tiny: Tiny, book: Path) -> None:
    settings = Calibration(file=book, tokens=700, sequence_tokens=100)
    found = calibration_ids(tiny("llama"), settings, Chat())
    assert [ids.shape for ids in found] == [(100,)] * 7
    assert {ids.dtype for ids in found} == {np.dtype(np.int64)}


def test_no_sequence_is_longer_than_the_students_context(tiny: Tiny, book: Path) -> None:
    found = calibration_ids(tiny("llama"), Calibration(file=book, tokens=1024), Chat())
    assert [len(ids) for ids in found] == [256] * 4


def test_few_tokens_make_one_short_sequence(tiny: Tiny, book: Path) -> None:
    found = calibration_ids(tiny("llama"), Calibration(file=book, tokens=40), Chat())
    assert [len(ids) for ids in found] == [40]


def test_the_seed_decides_what_is_taken(tiny: Tiny, book: Path) -> None:
    def taken(seed: int) -> np.ndarray:
        settings = Calibration(file=book, tokens=512, sequence_tokens=64, seed=seed)
        return np.stack(calibration_ids(tiny("llama"), settings, Chat()))

    np.testing.assert_array_equal(taken(0), taken(0))
    assert not np.array_equal(taken(0), taken(1))


def test_a_text_is_the_users_message_wherever_it_was_cut(tiny: Tiny, book: Path) -> None:
    tokenizer = tokenizer_of(tiny("llama"))
    settings = Calibration(file=book, tokens=2000, sequence_tokens=100)
    whole = book.read_text(encoding="utf-8")
    opening = f"<|im_start|>system\nBe brief.<|im_end|>\n{OPENING}"
    for ids in calibration_ids(tiny("llama"), settings, Chat(system="Be brief.")):
        text = tokenizer.decode(ids)
        assert text.startswith(opening)
        content = text.removeprefix(opening).partition("<|im_end|>")[0]
        assert len(content) > 20
        assert content in whole


def test_without_a_template_a_text_follows_the_first_token(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    plain = shutil.copytree(tiny("llama"), tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    file = write_lines(tmp_path / "a.jsonl", [{"text": "The quick brown fox. " * 12}])
    (ids,) = calibration_ids(plain, Calibration(file=file, tokens=32), Chat())
    assert tokenizer_of(plain).decode(ids).startswith("<|im_start|>The quick brown fox. The")
    talk = write_lines(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(InputError, match="no chat template"):
        calibration_ids(plain, Calibration(file=talk, tokens=32), Chat())


def test_conversations_are_rendered_as_transformers_does_and_packed(
    tiny: Tiny, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tiny("llama"))
    talk = [
        {"role": "user", "content": "Is the fox quick?"},
        {"role": "assistant", "content": "Yes, and brown."},
    ]
    asked = [{"role": "user", "content": "And the dog?"}]
    file = write_lines(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": asked}])
    texts = [
        tokenizer.apply_chat_template(talk, tokenize=False),
        tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
    ]
    length = sum(len(tokenizer(text).input_ids) for text in texts)
    (ids,) = calibration_ids(tiny("llama"), Calibration(file=file, tokens=length), Chat())
    assert tokenizer.decode(ids) in ("".join(texts), "".join(reversed(texts)))


def test_training_data_is_answered_with_the_right_choice(tiny: Tiny, tmp_path: Path) -> None:
    row = {
        "id": "a-1",
        "kind": "choice",
        "messages": [{"role": "user", "content": "A lovely, lovely film"}],
        "choices": ["bad", "good"],
        "answer": 1,
        "soft_label": [0.1, 0.9],
    }
    file = write_lines(tmp_path / "train.jsonl", [row] * 40)
    settings = Calibration(file=file, tokens=128, sequence_tokens=64)
    ids = calibration_ids(tiny("llama"), settings, Chat(system="Rate."))[0]
    expected = (
        "<|im_start|>system\nRate.<|im_end|>\n"
        "<|im_start|>user\nA lovely, lovely film<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>\n"
    )
    assert tokenizer_of(tiny("llama")).decode(ids).startswith((expected * 2)[: len(expected) + 9])


def test_the_shipped_training_data_can_be_read(tiny: Tiny) -> None:
    file = Path(__file__).parents[1] / "recipes/data/sentiment/train.jsonl"
    settings = Calibration(file=file, tokens=4096, sequence_tokens=128)
    assert len(calibration_ids(tiny("llama"), settings, Chat(system="Rate it."))) == 32


def test_without_a_file_all_of_the_built_in_texts_is_read(tiny: Tiny) -> None:
    found = calibration_ids(tiny("llama"), Calibration(sequence_tokens=128), Chat())
    assert len(found) > 10
    assert {len(ids) for ids in found} == {128}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"text": "short"}\n', "fills 0 sequences"),
        ("a.jsonl", b'{"text": "long"}\n{"text": \n', r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"question": "x"}\n', r"a\.jsonl:1: has neither text nor messages"),
        ("a.jsonl", b'{"messages": []}\n', "messages: List should have at least 1"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"messages\.0\.content: Field required"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: is not a JSON object"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}], "choices": ["a"], "answer": 1}\n',
            "answer = 1 is not the place",
        ),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b" \n\n ", "holds no text"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(
    tiny: Tiny, tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        calibration_ids(tiny("llama"), Calibration(file=file, tokens=64), Chat())
    assert str(file) in str(caught.value)


def test_too_little_text_tells_what_there_is(tiny: Tiny, book: Path) -> None:
    with pytest.raises(InputError, match="are asked for") as caught:
        calibration_ids(tiny("llama"), Calibration(file=book, tokens=10**6), Chat())
    assert caught.value.hint is not None
    tokens = int(caught.value.hint.partition("tokens: ")[2].partition("`")[0])
    found = calibration_ids(tiny("llama"), Calibration(file=book, tokens=tokens), Chat())
    assert sum(len(ids) for ids in found) == tokens


def test_a_missing_file_and_a_long_system_message_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        calibration_ids(tiny("llama"), Calibration(file=tmp_path / "no.txt"), Chat())
    with pytest.raises(InputError, match="around a text takes"):
        calibration_ids(tiny("llama"), Calibration(), Chat(system="lazy dog " * 60))


RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
chat: {{system: Be brief.}}
calibration: {{file: data/text.txt, tokens: 512}}
rungs:
  rtn: [quantize_rtn: {{bits: 4}}]
  gptq: [quantize_gptq: {{bits: 4}}]
  own: [quantize_gptq: {{bits: 4, calibration: {{tokens: 64}}, chat: {{}}}}]
export: [gguf]
"""


def test_the_recipes_calibration_reaches_the_stages_that_state_none(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = tmp_path / "data" / "text.txt"
    text.parent.mkdir()
    text.write_text("one")
    recipe = load_recipe(write_recipe(tmp_path, tiny("llama"), RECIPE)).recipe
    rungs = {name: steps[0].config for name, steps in recipe.rungs.items()}
    assert rungs["rtn"].model_fields_set == {"bits"}
    assert rungs["gptq"].model_dump()["calibration"] == {
        "file": text,
        "own_text": None,
        "own_share": 0.5,
        "tokens": 512,
        "sequence_tokens": 512,
        "seed": 0,
    }
    assert rungs["gptq"].model_dump()["chat"]["system"] == "Be brief."
    assert rungs["own"].model_dump()["calibration"]["file"] is None
    assert rungs["own"].model_dump()["calibration"]["tokens"] == 64
    assert rungs["own"].model_dump()["chat"]["system"] is None


def test_the_words_of_the_calibration_text_are_part_of_the_key(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "data" / "text.txt"
    text.parent.mkdir()

    def fingerprint(content: str) -> dict[str, Any]:
        text.write_text(content)
        recipe = load_recipe(write_recipe(tmp_path, tiny("llama"), RECIPE)).recipe
        config = recipe.rungs["gptq"][0].config
        fields = config.model_dump(mode="json", exclude_unset=True)
        return RunStage(stage="quantize_gptq", fields=fields).fingerprint(ContentHashes())

    one = fingerprint("one")
    assert one == fingerprint("one")
    assert one != fingerprint("two")
    assert "text.txt" not in json.dumps(one)


def test_a_missing_calibration_file_is_one_problem_of_the_recipe(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, tiny("llama"), RECIPE))
    (problem,) = caught.value.problems
    assert "recipe.yaml:5" in str(problem)
    assert "calibration.file: there is no such file" in str(problem)
