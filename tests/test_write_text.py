"""Text that a student writes by itself: from its own distribution, and how calibration reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.cli import app
from edgedistill.errors import InputError
from edgedistill.recipe_load import load_recipe
from edgedistill.stages.recover import Recover
from edgedistill.training_text import Emphasis
from edgedistill.write_text import WritingSettings, write_own_text
from tests.pruned import load
from tests.recipes import write_recipe
from tests.test_calibration import RECIPE, tokenizer_of, write_lines

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
OPENING = "<|im_start|>user\n"


def _written(student: Path, out: Path, **settings: Any) -> list[str]:
    write_own_text(student, out, WritingSettings(threads=1, **settings))
    return [json.loads(line)["rendered"] for line in out.read_text("utf-8").split("\n") if line]


def test_sequences_begin_as_a_conversation_does_and_are_the_seeds(
    tiny: Tiny, tmp_path: Path
) -> None:
    texts = _written(tiny("llama"), tmp_path / "a", tokens=200, sequence_tokens=64)
    assert len(texts) == 4
    assert all(text.startswith(OPENING) for text in texts)
    assert len(set(texts)) == 4
    again = _written(tiny("llama"), tmp_path / "b", tokens=200, sequence_tokens=64)
    other = _written(tiny("llama"), tmp_path / "c", tokens=200, sequence_tokens=64, seed=1)
    assert texts == again
    assert not set(texts) & set(other)
    brief = _written(tiny("llama"), tmp_path / "d", tokens=64, chat=Chat(system="Be brief."))
    assert brief[0].startswith(f"<|im_start|>system\nBe brief.<|im_end|>\n{OPENING}")


def test_tokens_are_drawn_from_what_transformers_predicts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their mean log-probability is minus the entropy; a temperature or a cut-off moves it."""
    drawn: list[list[int]] = []
    from edgedistill import write_text

    plain = write_text._sequences

    def kept(*arguments: Any) -> Any:
        for ids in plain(*arguments):
            drawn.append(ids)
            yield ids

    monkeypatch.setattr(write_text, "_sequences", kept)
    _written(tiny("llama"), tmp_path / "a", tokens=64 * 128, sequence_tokens=128)
    ids = torch.tensor(drawn)
    assert ids.shape == (64, 128)
    start = len(tokenizer_of(tiny("llama"))(OPENING).input_ids)
    with torch.inference_mode():
        log_probs = load(tiny("llama"))(ids).logits[:, start - 1 : -1].double().log_softmax(-1)
    said = log_probs.gather(2, ids[:, start:, None])[..., 0]
    surprise = -said - (-(log_probs.exp() * log_probs).sum(-1))
    error = float(surprise.std()) / surprise.numel() ** 0.5
    assert abs(float(surprise.mean())) < 5 * error


def test_no_stated_end_ends_a_sequence_and_no_stated_sampling_counts(
    tiny: Tiny, tmp_path: Path
) -> None:
    ending = shutil.copytree(tiny("llama"), tmp_path / "ending")
    stated = {"eos_token_id": list(range(0, 200)), "pad_token_id": 3, "do_sample": True}
    stated |= {"top_k": 2, "temperature": 0.3, "repetition_penalty": 1.5}
    (ending / "generation_config.json").write_text(json.dumps(stated))
    found = _written(ending, tmp_path / "a", tokens=256, sequence_tokens=64)
    assert found == _written(tiny("llama"), tmp_path / "b", tokens=256, sequence_tokens=64)


def test_without_a_template_it_goes_on_from_its_first_token(tiny: Tiny, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny("llama"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    texts = _written(bare, tmp_path / "a", tokens=200, sequence_tokens=64)
    assert all(text.startswith("<|im_start|>") for text in texts)
    config = bare / "tokenizer_config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in stated.items() if k != "bos_token"}))
    assert tokenizer_of(bare).bos_token is None
    begun = _written(bare, tmp_path / "b", tokens=64 * 8, sequence_tokens=64)
    assert len({text[:3] for text in begun}) > 4  # from any token


def test_nothing_is_overwritten_and_a_long_opening_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        _written(tiny("llama"), kept)
    assert kept.read_text() == "mine"
    with pytest.raises(InputError, match="of a sequence's 64 tokens"):
        _written(
            tiny("llama"), tmp_path / "a", sequence_tokens=64, chat=Chat(system="lazy dog " * 30)
        )
    assert not (tmp_path / "a").exists()


def test_the_command_writes_what_calibration_reads(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    arguments = ["write-text", str(tiny("llama")), "--out", str(out), "--tokens", "256"]
    found = CliRunner().invoke(app, [*arguments, "--sequence-tokens", "64", "--threads", "1"])
    assert found.exit_code == 0, found.output
    assert "4 sequences in" in found.stderr
    settings = Calibration(own_text=out, tokens=128, sequence_tokens=48)
    for ids in calibration_ids(tiny("llama"), settings, Chat()):
        assert tokenizer_of(tiny("llama")).decode(ids).startswith(OPENING)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Text of a domain, and 12 conversations as they are rendered."""
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"word{i} fox{i * 7 % 13}" for i in range(3000)), encoding="utf-8")
    lines = [
        {"rendered": f"{OPENING}dog {i} {'lazy ' * 60}<|im_end|>\n{'jumps ' * 60}"}
        for i in range(12)
    ]
    return book, write_lines(tmp_path / "own.jsonl", lines)


@pytest.mark.parametrize(("share", "own"), [(0.5, 4), (0.25, 2), (0.9, 7)])
def test_the_students_own_text_is_a_share_and_more_begins_with_less(
    tiny: Tiny, two: tuple[Path, Path], share: float, own: int
) -> None:
    book, text = two
    settings = Calibration(
        file=book, own_text=text, own_share=share, tokens=8 * 64, sequence_tokens=64
    )
    found = calibration_ids(tiny("llama"), settings, Chat())
    said = [tokenizer_of(tiny("llama")).decode(ids) for ids in found]
    mine = [f"{OPENING}dog" in text for text in said]
    assert len(said) == 8
    assert sum(mine) == own
    assert all(("word" in text) != own for text, own in zip(said, mine, strict=True))
    fewer = settings.model_copy(update={"tokens": 3 * 64})
    begun = calibration_ids(tiny("llama"), fewer, Chat())
    assert [ids.tolist() for ids in begun] == [ids.tolist() for ids in found[:3]]


def test_too_little_of_its_own_text_tells_how_to_get_more(
    tiny: Tiny, two: tuple[Path, Path]
) -> None:
    book, text = two
    settings = Calibration(file=book, own_text=text, tokens=4096, sequence_tokens=64)
    with pytest.raises(InputError, match="fills 12 sequences of 64 tokens, and 32") as caught:
        calibration_ids(tiny("llama"), settings, Chat())
    assert caught.value.where == str(text)
    assert "edgedistill write-text" in str(caught.value.hint)


def test_what_is_recovered_on_has_a_share_of_it_too_behind_what_was_calibrated_on(
    tiny: Tiny, two: tuple[Path, Path], tmp_path: Path
) -> None:
    book, text = two
    calibration = Calibration(file=book, own_text=text, tokens=256, sequence_tokens=64)
    stage = Recover(tokens=512, held_out_tokens=128, calibration=calibration)
    read = calibration_ids(tiny("llama"), calibration, Chat())
    split = stage.split_text(tiny("llama"))
    tokenizer = tokenizer_of(tiny("llama"))
    learned = [*split.held_out.ids.tolist(), *split.fitting.ids.tolist()]
    assert not {tuple(ids) for ids in learned} & {tuple(ids.tolist()) for ids in read}
    mine = [f"{OPENING}dog" in tokenizer.decode(ids) for ids in learned]
    assert sum(mine) == len(mine) // 2
    # A file of the stage's own, such as a record, is all that it learns from.
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "quick " * 3000}) + "\n")
    other = stage.training_text(tiny("llama"), Emphasis(), tmp_path / "other.jsonl")
    assert "quick" in tokenizer.decode(other.fitting.ids[0])
    assert not any(f"{OPENING}dog" in tokenizer.decode(ids) for ids in other.fitting.ids)


def test_a_recipe_names_it_beside_its_file(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("text.txt", "own.jsonl"):
        (tmp_path / "data" / name).write_text("one")
    named = RECIPE.replace("tokens: 512", "own_text: data/own.jsonl, own_share: 0.3, tokens: 512")
    recipe = load_recipe(write_recipe(tmp_path, tiny("llama"), named)).recipe
    stated = recipe.rungs["gptq"][0].config.model_dump()["calibration"]
    assert stated["own_text"] == tmp_path / "data" / "own.jsonl"
    assert stated["own_share"] == 0.3
