"""BPE with byte fallback, to GGUF and back: the ids are those that llama.cpp gives."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_intake import convert_gguf
from edgedistill.gguf_vocabulary import read_vocabulary
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student, read_json, write_json
from tests.artifact_tensors import rewrite_gguf
from tests.hard_text import hard_strings
from tests.tiny import CORPUS

Tiny = Callable[[str], Path]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<b>", "▁", "▁▁", "<0x41>", " " * 5, "\n" * 5)


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("gemma3"), tmp_path / "student"))


def _export(student: Path, dst: Path) -> Path:
    dst.mkdir()
    Gguf().export(Student(student), dst, context_tokens=64)
    return dst


def _pieces_of_corpus(count: int) -> list[str]:
    """Text whose characters are merged: the tokenizer was trained on it."""
    source, text = random.Random(2), " ".join(CORPUS)
    starts = [source.randrange(len(text)) for _ in range(count)]
    return [text[start : start + source.randint(1, 60)] for start in starts]


def _edit(student: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tokenizer = read_json(student / "tokenizer.json")
    edit(tokenizer)
    write_json(student / "tokenizer.json", tokenizer)


def _spell_spaces(tokenizer: dict[str, Any]) -> None:
    """User-defined tokens of spaces as Gemma's own file has them: merged, not found."""
    vocab, spelled = tokenizer["model"]["vocab"], {"  ": "▁▁", "   ": "▁▁▁"}
    for old, new in spelled.items():
        vocab[new] = vocab.pop(old)
    for entry in tokenizer["added_tokens"]:
        entry["content"] = spelled.get(entry["content"], entry["content"])
    first = [["▁▁", "▁"], ["▁", "▁▁"], ["▁", "▁"]]
    tokenizer["model"]["merges"] = first + tokenizer["model"]["merges"]


@pytest.mark.parametrize("spelled", [False, True], ids=["spaces", "U+2581"])
def test_llama_cpp_gives_the_ids_of_the_students_tokenizer(
    copied: Path, tmp_path: Path, spelled: bool
) -> None:
    from tokenizers import Tokenizer

    if spelled:
        _edit(copied, _spell_spaces)
    judge = Tokenizer.from_file(str(copied / "tokenizer.json"))
    # What is found in the text as U+2581 twice is not what two spaces became.
    special = tuple(s for s in SPECIAL if not (spelled and "▁" in s))
    with LlamaCpp().open(_export(copied, tmp_path / "a"), context_tokens=64, threads=1) as session:
        for text in (*hard_strings(2000, seed=11, special=special), *_pieces_of_corpus(500)):
            ids = judge.encode(text, add_special_tokens=False).ids
            assert session.tokenize(text) == ids, text


def test_scores_that_are_not_the_ranks_cut_otherwise(copied: Path, tmp_path: Path) -> None:
    """Without this the strings above would prove little."""
    artifact = _export(copied, tmp_path / "a")
    scores = GgufFile(artifact / "model.gguf").metadata["tokenizer.ggml.scores"]
    rewrite_gguf(artifact, {}, added={"tokenizer.ggml.scores": [-s for s in scores]})
    from tokenizers import Tokenizer

    judge = Tokenizer.from_file(str(copied / "tokenizer.json"))
    with LlamaCpp().open(artifact, context_tokens=64, threads=1) as session:
        texts = _pieces_of_corpus(200)
        same = [session.tokenize(t) == judge.encode(t, add_special_tokens=False).ids for t in texts]
    assert sum(same) < 190


def test_what_comes_back_and_goes_out_again_is_the_same_vocabulary(
    copied: Path, tmp_path: Path
) -> None:
    first = read_vocabulary(Student(copied))
    back = tmp_path / "back"
    back.mkdir()
    convert_gguf(_export(copied, tmp_path / "a") / "model.gguf", back)
    again = read_vocabulary(Student(back))
    assert (again.model, again.tokens, again.types) == ("llama", first.tokens, first.types)
    assert first.scores is not None
    assert again.scores is not None
    order = [
        sorted(range(512), key=lambda i: -scores[i]) for scores in (first.scores, again.scores)
    ]
    assert order[0] == order[1]
    assert {first.types[i] for i in range(8, 264)} == {6}
    assert first.types[5] == 4
    assert first.tokens[5] == "  "


@pytest.mark.parametrize("stated", [True, False])
def test_bos_is_added_where_the_tokenizer_adds_it(
    copied: Path, tmp_path: Path, stated: bool
) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(copied / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A" if stated else "$A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(copied / "tokenizer.json"))
    artifact, back = _export(copied, tmp_path / "a"), tmp_path / "back"
    with LlamaCpp().open(artifact, context_tokens=64, threads=1) as session:
        assert session.adds_bos is stated
        ids = session.text_program().ids_with_additions("hello")
    back.mkdir()
    convert_gguf(artifact / "model.gguf", back)
    for student in (copied, back):
        assert AutoTokenizer.from_pretrained(student)("hello").input_ids == ids
    # llama.cpp adds it where a file does not say.
    rewrite_gguf(artifact, {"tokenizer.ggml.add_bos_token": None})
    shutil.rmtree(back)
    back.mkdir()
    convert_gguf(artifact / "model.gguf", back)
    assert AutoTokenizer.from_pretrained(back)("hello").input_ids[0] == 1


def _drop_a_cut(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    merges.pop(next(i for i in range(1, len(made)) if made[i] == made[i - 1]))


def _drop_a_token_s_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    last = "".join(merges[-1])
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair) != last]


def _two_ranks(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    merges.append(merges.pop(next(i for i in range(1, len(made)) if made[i] == made[i - 1])))


def _drop_a_byte(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["vocab"]["<0x7F>"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_a_cut, "never merges '.+' and '.+', which llama.cpp would"),
        (_drop_a_token_s_merges, "never merges to '.+', which llama.cpp would"),
        (_two_ranks, "two ranks|never merges"),
        (_drop_a_byte, "lacks 1 of the 256 tokens of bytes"),
        (lambda t: t["normalizer"].update(content="_"), "the normalizer Replace"),
        (lambda t: t.update(normalizer=None), "the normalizer None"),
        (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "the pre-tokenizer Metaspace"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    copied: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    _edit(copied, edit)
    with pytest.raises(InputError, match=message):
        read_vocabulary(Student(copied))


def test_a_split_at_spaces_that_are_gone_is_nothing(copied: Path) -> None:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    _edit(copied, lambda t: t.update(pre_tokenizer=split | {"invert": False}))
    _edit(
        copied,
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [t["normalizer"]]}),
    )
    assert read_vocabulary(Student(copied)).scores is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.add_space_prefix": True}, "puts a space before a text"),
        ({"tokenizer.ggml.add_space_prefix": None}, "puts a space before a text"),
        ({"tokenizer.ggml.scores": None}, r"has no tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.scores": [float("nan")] * 512}, "scores of tokens that are no numbers"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(512)]}, "lacks 256 of the 256 tokens"),
    ],
)
def test_a_file_that_says_too_little_is_refused(
    copied: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    artifact = _export(copied, tmp_path / "a")
    rewrite_gguf(artifact, changes)
    (tmp_path / "back").mkdir()
    with pytest.raises(InputError, match=message):
        convert_gguf(artifact / "model.gguf", tmp_path / "back")
