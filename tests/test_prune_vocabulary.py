from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.chat import Chat
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.first_tokens import Answer, coarse_kl
from edgedistill.evaluate.score import refuse_other_tokens
from edgedistill.evaluate.traffic_vocabulary import mapped_answer
from edgedistill.kept_vocabulary import read_kept, teacher_for
from edgedistill.pruning_results import PRUNING_FILE, Pruning
from edgedistill.stages.heal import Heal
from edgedistill.stages.prune_vocabulary import PruneVocabulary
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.judge import read_judge_logits
from edgedistill.verify.kept_logits import write_kept_logits
from edgedistill.vocabulary_proof import prove_rows, prove_tokenizer
from tests.hard_text import hard_strings
from tests.pruned import edited, empty, load, logits
from tests.small_vocabulary import (
    DOMAIN,
    OTHER,
    SIZE,
    edit_tokenizer,
    kept_by_name,
    library_tokenizer,
    pruned,
    stage,
)
from tests.tiny import FAMILY_CONFIGS

Tiny = Callable[[str], Path]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tiny("llama"), tmp_path_factory.mktemp("small"))


class Both:
    """The tokenizer before and after, by the library that ``transformers`` runs."""

    def __init__(self, whole: Path, part: Path) -> None:
        self._old, self._new = library_tokenizer(whole), library_tokenizer(part)
        self.kept = kept_by_name(whole, part)
        self.spelt = [self._new.decode([i]) for i in range(len(self.kept))]

    def read(self, text: str) -> tuple[list[int], list[int], bool]:
        """Ids before, ids after by what they were before, and whether both spell the same."""
        before, after = (
            t.encode(text, add_special_tokens=False).ids for t in (self._old, self._new)
        )
        spelt = (
            tokenizer.decode(ids, skip_special_tokens=False)
            for tokenizer, ids in ((self._old, before), (self._new, after))
        )
        return before, [self.kept[i] for i in after], len(set(spelt)) == 1


@pytest.fixture(scope="module")
def both(tiny: Tiny, small: Path) -> Both:
    return Both(tiny("llama"), small)


def test_the_domains_text_is_cut_as_before(both: Both) -> None:
    before, after, same = both.read(DOMAIN * 3)
    assert after == before
    assert same


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_words_of_kept_tokens_are_cut_as_before(both: Both, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(both.spelt) | st.text(), max_size=12)))
    before, after, same = both.read(text)
    if set(before) <= set(both.kept):
        assert after == before
    assert same


def test_every_text_is_written_as_before(both: Both) -> None:
    cut = 0
    for text in (OTHER, *hard_strings(400, 3, SPECIAL)):
        before, after, same = both.read(text)
        assert same, text
        cut += before != after
    assert cut > 20  # tokens of theirs did go


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_logits_are_those_of_the_kept_tokens(tiny: Tiny, tmp_path: Path, family: str) -> None:
    out = pruned(tiny(family), tmp_path)
    kept = torch.tensor(kept_by_name(tiny(family), out))
    ids = torch.randint(0, SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
    found = logits(load(out), ids)
    expected = logits(load(tiny(family)), kept[ids])[..., kept]
    assert found.shape == (2, 40, SIZE)
    assert torch.equal(found, expected) or (found - expected).abs().max() < 1e-5
    assert Student(out).facts == stage(tmp_path).facts_after(Student(tiny(family)).facts)


def test_what_was_done_is_told(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER * 20, encoding="utf-8")
    out = pruned(tiny("llama"), tmp_path, second=tmp_path / "other.txt")
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    assert (found.before, found.after) == ({"vocab_size": 512}, {"vocab_size": SIZE})
    assert found.parameters_before - found.parameters_after == 64 * 64
    vocabulary = found.vocabulary
    assert vocabulary is not None
    first, second = vocabulary.fertility
    assert first.tokens_before == first.tokens_after
    assert second.tokens_after > 1.05 * second.tokens_before
    assert found.second_loses_more
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    text = template.format((DOMAIN * 20).strip())
    assert first.characters == len(text)
    assert first.tokens_before == len(library_tokenizer(tiny("llama")).encode(text).ids)
    assert vocabulary.used + vocabulary.merged_from + vocabulary.others == SIZE


def test_the_least_count_that_an_error_names_is_the_least_that_fits(
    tiny: Tiny, tmp_path: Path
) -> None:
    file = tmp_path / "rare.txt"
    file.write_text("\n".join([OTHER, *OTHER.split()[:4]]), encoding="utf-8")
    fields = {"more": (file,), "vocab_size": 424, "multiple_of": 8}
    with pytest.raises(InputError, match="too small") as caught:
        pruned(tiny("llama"), tmp_path / "all", **fields)
    named = re.search(r"least_count: (\d+)", str(caught.value))
    assert named is not None
    least = int(named[1])
    assert least > 1
    with pytest.raises(InputError, match="too small"):
        pruned(tiny("llama"), tmp_path / "one-less", least_count=least - 1, **fields)
    out = pruned(tiny("llama"), tmp_path / "least", least_count=least, **fields)
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes()).vocabulary
    assert found is not None
    assert found.split > 0


def test_further_texts_keep_their_tokens(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text(OTHER, encoding="utf-8")
    out = pruned(tiny("llama"), tmp_path, more=(file,), vocab_size=SIZE)
    old, new = library_tokenizer(tiny("llama")), library_tokenizer(out)
    assert old.encode(OTHER).tokens == new.encode(OTHER).tokens


def _with_specials_behind(src: Path, dst: Path) -> Path:
    """A student whose special tokens have the last ids, one of them put before every text."""
    shutil.copytree(src, dst)
    file = json.loads((dst / "tokenizer.json").read_text(encoding="utf-8"))
    old = file["model"]["vocab"] | {e["content"]: e["id"] for e in file["added_tokens"]}
    ranked = sorted(old, key=lambda token: (token.startswith("<|"), old[token]))
    new = {token: i for i, token in enumerate(ranked)}
    file["model"]["vocab"] = {t: i for t, i in new.items() if not t.startswith("<|")}
    for entry in file["added_tokens"]:
        entry["id"] = new[entry["content"]]
    file["added_tokens"].sort(key=lambda entry: entry["id"])
    bos = "<|im_start|>"
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [new[bos]], "tokens": [bos]}},
    }
    (dst / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    config = json.loads((dst / "config.json").read_text())
    config |= {"bos_token_id": new[bos], "eos_token_id": new["<|im_end|>"], "pad_token_id": None}
    (dst / "config.json").write_text(json.dumps(config))
    ends = [new["<|im_end|>"], new["<|endoftext|>"]]
    (dst / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokens = json.loads((dst / "tokenizer_config.json").read_text())
    tokens["added_tokens_decoder"] = {
        str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in file["added_tokens"]
    }
    (dst / "tokenizer_config.json").write_text(json.dumps(tokens))
    (dst / "tokenizer.model").write_bytes(b"of the whole vocabulary")
    return dst


def test_special_tokens_keep_their_meaning_everywhere(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    src = _with_specials_behind(tiny("llama"), tmp_path / "behind")
    out = pruned(src, tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(out), AutoConfig.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(config.bos_token_id) == "<|im_start|>"
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == "<|im_end|>"
    assert config.pad_token_id is None
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer("a").input_ids[0] == config.bos_token_id
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(src).chat_template
    assert len(tokenizer) == SIZE
    assert not (out / "tokenizer.model").exists()


def _broken(src: Path, small: Path, dst: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Hold a copy of a pruned student with a changed tokenizer against the whole one."""
    shutil.copytree(small, dst)
    file = json.loads((dst / "tokenizer.json").read_text(encoding="utf-8"))
    change(file)
    (dst / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    kept = read_kept(small)
    assert kept is not None
    prove_tokenizer(src, dst, kept.ids, (), Chat())


def _drop_merge(file: dict[str, Any]) -> None:
    file["model"]["merges"].pop(0)


def _shift_ids(file: dict[str, Any]) -> None:
    vocabulary = file["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[300:302]
    first, second = (vocabulary[name] for name in names)
    vocabulary |= {names[0]: second, names[1]: first}


def _swap_merges(file: dict[str, Any]) -> None:
    merges = file["model"]["merges"]
    merges.reverse()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_drop_merge, "all of which stayed"),
        (_swap_merges, "all of which stayed"),
        (_shift_ids, "calls"),
        (lambda file: file.update(decoder=None), "written as"),
    ],
)
def test_a_tokenizer_that_is_broken_on_purpose_is_caught(
    tiny: Tiny, small: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    _broken(tiny("llama"), small, tmp_path / "same", lambda file: None)
    with pytest.raises(StageError, match=told):
        _broken(tiny("llama"), small, tmp_path / "broken", change)


def test_rows_that_are_off_by_one_are_caught(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    whole, kept = Student(tiny("llama")), read_kept(small)
    assert kept is not None

    def roll(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.roll(values, 1, axis=0) if "embed" in name else values

    prove_rows(whole, Student(small), kept.ids)
    with pytest.raises(StageError, match="the row of token 0"):
        prove_rows(whole, Student(edited(small, tmp_path / "rolled", roll)), kept.ids)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, "Unigram"),
        ({"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}, "suffixes"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "to no token"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(
    tiny: Tiny, tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    from edgedistill.bpe_vocabulary import BpeVocabulary

    src = tmp_path / "student"
    shutil.copytree(tiny("llama"), src)
    edit_tokenizer(src, model=model)
    with pytest.raises(InputError, match=told):
        BpeVocabulary(src)


def test_what_is_impossible_is_told_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    facts = Student(tiny("llama")).facts
    assert stage(tmp_path).problems(facts, quantized=False) == []
    assert "quantized" in stage(tmp_path).problems(facts, quantized=True)[0]
    assert "not below" in stage(tmp_path, vocab_size=510).problems(facts, quantized=False)[0]
    with pytest.raises(InputError, match="no text"):
        PruneVocabulary(vocab_size=SIZE).run(tiny("llama"), empty(tmp_path / "none"))
    shared = stage(tmp_path, vocab_size=None, keep_share=0.8)
    assert shared.facts_after(facts).vocab_size == 448
    for fields in ({}, {"vocab_size": 64, "keep_share": 0.5}):
        with pytest.raises(ValueError, match="either"):
            PruneVocabulary.model_validate(fields)
    QuantizeRtn(bits=8).run(tiny("llama"), quantized := empty(tmp_path / "int8"))
    with pytest.raises(InputError, match="quantized"):
        stage(tmp_path).run(quantized, empty(tmp_path / "out"))


def test_two_prunings_are_told_as_one(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    out = pruned(small, tmp_path, vocab_size=416, multiple_of=32)
    kept = read_kept(out)
    assert kept is not None
    assert kept.whole_size == 512
    assert kept.kept == kept_by_name(tiny("llama"), out)
    assert (kept.new_ids() >= 0).sum() == 416


def test_a_pruned_student_is_healed_by_the_whole_one(
    tiny: Tiny, small: Path, tmp_path: Path
) -> None:
    """Rows that were disturbed after the pruning come nearer to the teacher's again."""
    noise = np.random.default_rng(0)
    disturbed = empty(tmp_path / "disturbed")
    source = Student(small)
    with StudentWriter(disturbed, source) as writer:
        for name in source.names():
            values = source.read(name)
            change = noise.normal(0, 0.05, values.shape).astype(np.float32)
            writer.write(name, values + change if values.ndim == 2 else values)
    kept, out = read_kept(disturbed), empty(tmp_path / "healed")
    assert kept is not None
    heal = Heal(
        calibration=stage(tmp_path).calibration.model_copy(
            update={"file": None, "sequence_tokens": 64}
        ),
        tokens=1024,
        batch_tokens=128,
        held_out_tokens=128,
        learning_rate=1e-3,
    )
    heal.run_beside(disturbed, out, teacher=tiny("llama"), work=None)
    found = json.loads((out / "healing.json").read_text())
    assert found["kl_after"] < found["kl_before"]
    assert read_kept(out) == kept
    places = torch.tensor(kept.kept)
    ids = torch.randint(0, SIZE, (1, 64), generator=torch.Generator().manual_seed(1))
    teacher = logits(load(tiny("llama")), places[ids])[..., places].log_softmax(-1)
    far = [
        float((teacher.exp() * (teacher - logits(load(s), ids).log_softmax(-1))).sum(-1).mean())
        for s in (disturbed, out)
    ]
    assert far[1] < far[0]


def test_a_teacher_of_another_family_is_refused(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    edit_tokenizer(other, version="1.1")
    assert teacher_for(small, tiny("llama")).facts.vocab_size == SIZE
    for student, teacher in ((small, other), (tiny("llama"), small)):
        with pytest.raises(InputError, match="another tokenizer"):
            teacher_for(student, teacher)


def test_the_reference_is_asked_for_the_kept_tokens(
    tiny: Tiny, small: Path, tmp_path: Path
) -> None:
    texts = {"domain": DOMAIN * 2, "other": OTHER}
    reference, dst = tiny("llama"), empty(tmp_path / "judge")
    write_kept_logits(reference, small, texts, dst, chat=Chat(), threads=1)
    kept = torch.tensor(kept_by_name(reference, small))
    for judged in read_judge_logits(dst):
        ids = kept[torch.tensor([judged.ids])]
        whole = logits(load(reference), ids)[0].double().softmax(-1)
        part = whole[:, kept] / whole[:, kept].sum(-1, keepdim=True)
        np.testing.assert_allclose(np.exp(judged.log_probs), part.numpy(), atol=1e-6)
        lost = 1 - float(whole[:, kept].sum(-1).mean())
        assert judged.removed_mass == pytest.approx(lost, abs=1e-6)
        assert lost > 0.001
    with pytest.raises(StageError, match="no part"):
        write_kept_logits(small, small, texts, empty(tmp_path / "none"), chat=Chat(), threads=1)
    with pytest.raises(StageError, match="no part"):
        write_kept_logits(reference, reference, texts, dst, chat=Chat(), threads=1)


def test_answers_to_traffic_are_compared_on_the_tokens_that_both_have() -> None:
    rng = np.random.default_rng(0)
    whole = rng.dirichlet(np.ones(12), size=3)
    ranked = np.argsort(-whole, axis=1)[:, :5].astype(np.int32)
    named = np.take_along_axis(whole, ranked.astype(np.int64), axis=1)
    rest = 1 - named.sum(axis=1, keepdims=True)
    answer = Answer(ranked[:, 0], ranked, np.log(np.concatenate([named, rest], axis=1)))
    new_ids = np.full(12, -1, dtype=np.int64)
    # The second position's best token goes: its position is still compared, the third is not.
    gone = {int(ranked[1, 0]), int(ranked[0, 3])} - {int(ranked[0, 0])}
    stays = [i for i in range(12) if i not in gone]
    new_ids[stays] = np.arange(len(stays))
    mapped = mapped_answer(answer, new_ids)
    assert mapped is not None
    assert len(mapped.tokens) == 2
    for position in range(2):
        ids = [new_ids[i] for i in ranked[position] if new_ids[i] >= 0]
        width = mapped.kept.shape[1]
        assert mapped.kept[position].tolist() == ids[:width]
        shares = [named[position][list(new_ids[ranked[position]]).index(i)] for i in ids]
        total = sum(shares) + rest[position, 0]
        expected = [*shares[:width], sum(shares[width:]) + rest[position, 0]]
        np.testing.assert_allclose(np.exp(mapped.log_probs[position]), np.array(expected) / total)
    assert coarse_kl(mapped.log_probs, mapped.log_probs).tolist() == [0.0, 0.0]
    assert mapped_answer(answer, np.full(12, -1, dtype=np.int64)) is None


def test_an_artifact_with_fewer_tokens_is_not_asked_in_those_of_another(
    tiny: Tiny, small: Path
) -> None:
    from edgedistill.plugins import load_plugin

    with load_plugin("runtimes", "torch_reference")().open(
        small, context_tokens=64, threads=1
    ) as session:
        refuse_other_tokens(session, small)
        with pytest.raises(InputError, match="448 tokens"):
            refuse_other_tokens(session, tiny("llama"))
