from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_vocabulary import GgufVocabulary, read_vocabulary
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student, read_json, write_json
from tests.tiny import CHAT_TEMPLATE

Tiny = Callable[[str], Path]


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "student"))


def _change(file: Path, **fields: Any) -> None:
    write_json(file, (read_json(file) if file.exists() else {}) | fields)


def _read(directory: Path) -> GgufVocabulary:
    return read_vocabulary(Student(directory))


def test_tokens_stand_at_their_ids_with_their_types(copied: Path) -> None:
    from transformers import AutoTokenizer

    judge = AutoTokenizer.from_pretrained(copied)
    vocabulary = _read(copied)
    assert vocabulary.tokens == judge.convert_ids_to_tokens(range(512))
    special = {i for i, kind in enumerate(vocabulary.types) if kind == 3}
    assert special == {i for i, t in judge.added_tokens_decoder.items() if t.special}
    assert vocabulary.ids == {"bos": 1, "unknown": 0, "padding": 2, "eos": 2}
    assert vocabulary.chat_template == CHAT_TEMPLATE


def test_rows_without_a_token_are_unused_and_the_rest_keep_their_ids(copied: Path) -> None:
    tokenizer = read_json(copied / "tokenizer.json")
    dropped = tokenizer["added_tokens"].pop()
    tokenizer["model"]["vocab"].pop(dropped["content"], None)
    write_json(copied / "tokenizer.json", tokenizer)
    vocabulary = _read(copied)
    assert len(vocabulary.tokens) == 512
    assert vocabulary.tokens[dropped["id"]] == f"[PAD{dropped['id']}]"
    assert vocabulary.types[dropped["id"]] == 5


def test_more_tokens_than_rows_are_refused(copied: Path) -> None:
    tokenizer = read_json(copied / "tokenizer.json")
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 600, "content": "x y"})
    write_json(copied / "tokenizer.json", tokenizer)
    with pytest.raises(InputError, match="the token 600, the model's vocabulary only 512 rows"):
        _read(copied)


def test_every_end_of_the_generation_config_ends_a_text_in_llama_cpp(
    copied: Path, tmp_path: Path
) -> None:
    # 300 is an ordinary token, which llama.cpp would not know as an end by its name.
    _change(copied / "generation_config.json", eos_token_id=[300, 2, 301])
    Gguf().export(Student(copied), tmp_path, context_tokens=64)
    with LlamaCpp().open(tmp_path, context_tokens=64, threads=1) as session:
        assert session.eos_id == 2  # the tokenizer's own comes first
        assert {2, 300, 301} <= session.eos_ids
        assert session.bos_id == 1
        assert session.adds_bos is False
    _change(copied / "generation_config.json", eos_token_id=[300, 2, 301, 302])
    with pytest.raises(InputError, match="4 different tokens"):
        _read(copied)


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("template", ["<|im_start|> $A", "$A", "$A <|im_end|>"])
def test_what_is_added_to_a_text_is_what_transformers_adds(
    copied: Path, tmp_path: Path, template: str, stated: bool | None
) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(copied / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(copied / "tokenizer.json"))
    config = read_json(copied / "tokenizer_config.json")
    del config["add_bos_token"]
    write_json(copied / "tokenizer_config.json", config)
    if stated is not None:
        _change(copied / "tokenizer_config.json", add_bos_token=stated)
    ids = AutoTokenizer.from_pretrained(copied)("hello").input_ids
    vocabulary = _read(copied)
    assert (vocabulary.adds_bos, vocabulary.adds_eos) == (ids[0] == 1, ids[-1] == 2)
    Gguf().export(Student(copied), tmp_path, context_tokens=64)
    with LlamaCpp().open(tmp_path, context_tokens=64, threads=1) as session:
        assert session.adds_bos is vocabulary.adds_bos
        assert session.tokenize("hello") == [i for i in ids if i > 2]


def test_special_tokens_may_be_written_as_tables(copied: Path) -> None:
    _change(
        copied / "tokenizer_config.json", bos_token={"content": "<|endoftext|>"}, pad_token=None
    )
    assert _read(copied).ids == {"bos": 0, "unknown": 0, "eos": 2}
    _change(copied / "tokenizer_config.json", bos_token="<s>")
    with pytest.raises(InputError, match="bos_token '<s>' is not in the vocabulary"):
        _read(copied)


def test_a_chat_template_in_the_config_is_found(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    assert _read(copied).chat_template is None
    _change(copied / "tokenizer_config.json", chat_template="A")
    assert _read(copied).chat_template == "A"
    named = [{"name": "tool", "template": "B"}, {"name": "default", "template": "C"}]
    _change(copied / "tokenizer_config.json", chat_template=named)
    assert _read(copied).chat_template == "C"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram model"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "prefixes or suffixes"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    copied: Path, change: dict[str, Any], message: str
) -> None:
    _change(copied / "tokenizer.json", **change)
    with pytest.raises(InputError, match=message):
        _read(copied)


def test_an_added_token_that_takes_white_space_is_refused(copied: Path) -> None:
    tokenizer = read_json(copied / "tokenizer.json")
    tokenizer["added_tokens"][2]["lstrip"] = True
    write_json(copied / "tokenizer.json", tokenizer)
    with pytest.raises(InputError, match=r"'<\|im_end\|>' takes the white space"):
        _read(copied)
