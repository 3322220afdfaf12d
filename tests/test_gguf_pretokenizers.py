from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_pretokenizers import (
    PRE_TOKENIZERS,
    PreTokenizer,
    pre_tokenizer_named,
    pre_tokenizer_of,
)
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student, read_json, write_json
from tests.hard_text import PIECES, hard_strings

Tiny = Callable[[str], Path]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Numbers, runs of white space and contractions, so that merges across a wrong cut exist.
CORPUS = [
    *(str(n) + " " for n in range(900, 2100)),
    *("don't I'VE they'LL we'd " for _ in range(50)),
    *("  \n\n    x =  1;\n\n" for _ in range(50)),
    *PIECES,
    *hard_strings(300, seed=99),
]


def _train(directory: Path, structure: dict[str, Any], ignore_merges: bool) -> None:
    """A tokenizer of 1500 tokens, trained with the pre-tokenizer itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    state = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    tokenizer.pre_tokenizer = Tokenizer.from_str(
        json.dumps(state | {"pre_tokenizer": structure})
    ).pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture
def wide(tiny: Tiny, tmp_path: Path) -> Path:
    """A student whose vocabulary has room for 1500 tokens; its tokenizer is still to be set."""
    from tests.tiny import write_student

    return write_student(tmp_path / "student", "llama", vocab_size=1500, num_hidden_layers=1)


def _ids_in_llama_cpp(student: Path, dst: Path, texts: list[str]) -> list[list[int]]:
    dst.mkdir()
    Gguf().export(Student(student), dst, context_tokens=64)
    with LlamaCpp().open(dst, context_tokens=64, threads=1) as session:
        return [session.tokenize(text) or [] for text in texts]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_llama_cpp_cuts_text_as_the_structure_does(
    pre: PreTokenizer, wide: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    _train(wide, pre.structure, pre.ignore_merges)
    texts = list(hard_strings(400, seed=1, special=SPECIAL))
    judge = AutoTokenizer.from_pretrained(wide)
    expected = [judge(text, add_special_tokens=False).input_ids for text in texts]
    assert _ids_in_llama_cpp(wide, tmp_path / "out", texts) == expected


def test_the_hard_text_tells_all_pre_tokenizers_apart(wide: Path) -> None:
    # Without this the test above could not fail.
    from tokenizers import Tokenizer

    texts = list(hard_strings(400, seed=1, special=SPECIAL))
    cuts = []
    for pre in PRE_TOKENIZERS:
        _train(wide, PRE_TOKENIZERS[0].structure, ignore_merges=False)
        state = read_json(wide / "tokenizer.json") | {"pre_tokenizer": pre.structure}
        tokenizer = Tokenizer.from_str(json.dumps(state))
        cuts.append([tuple(tokenizer.encode(text).ids) for text in texts])
    for i, first in enumerate(cuts):
        for second in cuts[i + 1 :]:
            assert sum(a != b for a, b in zip(first, second, strict=True)) > 20


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_a_structure_is_found_again_in_what_tokenizers_saves(
    pre: PreTokenizer, tmp_path: Path
) -> None:
    _train(tmp_path, pre.structure, pre.ignore_merges)
    saved = read_json(tmp_path / "tokenizer.json")
    assert pre_tokenizer_of(saved, "x") is pre
    # Llama 3's own file has offsets untrimmed; a sequence of one says no more than its step.
    alone = {"type": "Sequence", "pretokenizers": [saved["pre_tokenizer"]]}
    assert pre_tokenizer_of(saved | {"pre_tokenizer": alone}, "x") is pre
    for name in pre.names:
        assert pre_tokenizer_named(name, "x") is pre


def test_an_unknown_structure_is_refused_with_the_structure(tiny: Tiny, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "student"))
    tokenizer = read_json(student / "tokenizer.json")
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    write_json(student / "tokenizer.json", tokenizer)
    with pytest.raises(InputError, match=r"Whitespace[\s\S]*hint: known: gpt-2, smollm"):
        Gguf().export(Student(student), tmp_path, context_tokens=64)
    assert not (tmp_path / "model.gguf").exists()


def test_ignoring_merges_is_part_of_what_is_matched() -> None:
    llama, qwen = pre_tokenizer_named("llama-bpe", "x"), pre_tokenizer_named("qwen2", "x")
    for pre in (llama, qwen):
        tokenizer = {
            "pre_tokenizer": pre.structure,
            "model": {"ignore_merges": not pre.ignore_merges},
        }
        with pytest.raises(InputError, match="ignore_merges"):
            pre_tokenizer_of(tokenizer, "x")


def test_an_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre is 'tekken'"):
        pre_tokenizer_named("tekken", "x.gguf")
    with pytest.raises(InputError, match="is None"):
        pre_tokenizer_named(None, "x.gguf")
