"""ONNX Runtime sessions, held against transformers in float32."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import InputError, UnavailableError, UsageError
from edgedistill.quantized import Grid
from edgedistill.runtimes import onnx_runtime
from edgedistill.runtimes.onnx_runtime import OnnxRuntime
from edgedistill.session import Logits, Session
from edgedistill.student import dequantize_student
from tests.test_onnx import CONTEXT_TOKENS, GRIDS, export, quantize
from tests.tiny import ONNX_FAMILIES, write_student

IDS: list[int] = np.random.default_rng(1).integers(0, 512, 201).tolist()  # two chunks, odd


def judge(student: Path, ids: list[int] = IDS) -> Logits:
    """float32 [tokens, vocab] by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def divergence(expected: Logits, got: Logits) -> float:
    """The largest KL(expected || got) of any position, in nats."""

    def log_softmax(logits: Logits) -> Any:
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())


def open_session(artifact: Path, accuracy_level: int | None = None) -> Session:
    runtime = OnnxRuntime(accuracy_level)
    return runtime.open(artifact, context_tokens=CONTEXT_TOKENS, threads=1)


@pytest.fixture(scope="module")
def artifact(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny("llama"), tmp_path_factory.mktemp("onnx") / "float")


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_float_logits_are_those_of_transformers(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    expected = judge(tiny(family))
    with open_session(export(tiny(family), tmp_path / "o")) as session:
        streamed = np.concatenate(list(session.stream_logits(IDS)))
        assert divergence(expected, streamed) <= 1e-8
        session.reset()
        session.prefill(IDS[::-1])  # what a forgotten cache leaves behind must not show
        session.reset()
        steps = np.stack([session.step(token) for token in IDS])
        assert divergence(expected, steps) <= 1e-8
        session.reset()
        assert divergence(expected[-1:], session.prefill(IDS)[None]) <= 1e-8
        assert session.position == len(IDS)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, {"rope_theta": 500000.0}],
    ids=["linear", "theta"],
)
def test_rope_parameters_reach_the_tables(tmp_path: Path, rope: dict[str, Any]) -> None:
    student = write_student(tmp_path / "s", rope_parameters={"rope_type": "default"} | rope)
    with open_session(export(student, tmp_path / "o")) as session:
        got = np.concatenate(list(session.stream_logits(IDS)))
    assert divergence(judge(student), got) <= 1e-8


def test_output_and_input_biases_are_added(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s", attention_bias=True)
    with open_session(export(student, tmp_path / "o")) as session:
        got = np.concatenate(list(session.stream_logits(IDS)))
    assert divergence(judge(student), got) <= 1e-8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "gemma3"])
def test_quantized_logits_are_those_of_the_dequantized_copy(
    tiny: Callable[[str], Path], tmp_path: Path, family: str, grid: Grid
) -> None:
    q = quantize(tiny(family), tmp_path / "q", grid)
    (tmp_path / "d").mkdir()
    dequantize_student(q, tmp_path / "d")
    expected = judge(tmp_path / "d")
    o = export(q, tmp_path / "o")
    with open_session(o, accuracy_level=1) as session:
        exact = np.concatenate(list(session.stream_logits(IDS)))
    with open_session(o) as session:
        shipped = np.concatenate(list(session.stream_logits(IDS)))
    assert divergence(expected, exact) <= 1e-8
    # 8-bit activations; a student of 64 columns feels them more than a real one does.
    assert 1e-8 < divergence(expected, shipped) <= 0.2


@pytest.mark.parametrize("family", ONNX_FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_family_is_right_on_a_4_bit_grid(tmp_path: Path, family: str, tied: bool) -> None:
    student = write_student(tmp_path / "s", family, tie_word_embeddings=tied)
    q = quantize(student, tmp_path / "q", Grid(4, 32, "integer"))
    (tmp_path / "d").mkdir()
    dequantize_student(q, tmp_path / "d")
    expected = judge(tmp_path / "d")
    with open_session(export(q, tmp_path / "o"), accuracy_level=1) as session:
        prompt = session.prefill(IDS[:40])
        rest = np.stack([session.step(token) for token in IDS[40:120]])
    assert divergence(expected[39:120], np.concatenate([prompt[None], rest])) <= 1e-8


def test_embeddings_may_stay_finer_than_the_linears(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgedistill.stages.quantize_rtn import GridChoice, QuantizeRtn

    for name in ("q", "d"):
        (tmp_path / name).mkdir()
    QuantizeRtn(bits=2, embeddings=GridChoice(bits=8)).run(tiny("qwen3"), tmp_path / "q")
    dequantize_student(tmp_path / "q", tmp_path / "d")
    with open_session(export(tmp_path / "q", tmp_path / "o"), accuracy_level=1) as session:
        got = np.concatenate(list(session.stream_logits(IDS)))
    assert divergence(judge(tmp_path / "d"), got) <= 1e-8


def test_rewinding_leaves_the_cache_of_the_tokens_kept(
    tiny: Callable[[str], Path], artifact: Path
) -> None:
    other = IDS[::-1]
    mixed = IDS[:41] + other[:30]
    with open_session(artifact) as session:
        session.prefill(IDS)
        session.rewind(41)
        assert session.position == 41
        got = np.concatenate(list(session.stream_logits(other[:30])))
        session.rewind(41)
        again = session.prefill(other[:30])
    expected = judge(tiny("llama"), mixed)
    assert divergence(expected[41:], got) <= 1e-8
    assert divergence(expected[-1:], again[None]) <= 1e-8


def test_a_prompt_longer_than_a_part_gives_the_same_logits(
    tiny: Callable[[str], Path], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "PREFILL_TOKENS", 64)
    with open_session(artifact) as session:
        got = session.prefill(IDS)
    assert divergence(judge(tiny("llama"))[-1:], got[None]) <= 1e-8


def test_logits_are_streamed_in_bounded_chunks(artifact: Path) -> None:
    with open_session(artifact) as session:
        rows = [len(chunk) for chunk in session.stream_logits(IDS)]
    assert rows == [128, 73]


def test_logits_stay_as_they_are_when_the_session_goes_on(artifact: Path) -> None:
    with open_session(artifact) as session:
        first = session.prefill(IDS[:9])
        kept = first.copy()
        session.step(IDS[9])
        assert np.array_equal(first, kept)


def test_the_same_run_gives_the_same_bits(artifact: Path) -> None:
    with open_session(artifact) as one, open_session(artifact) as two:
        assert np.array_equal(one.prefill(IDS), two.prefill(IDS))


def test_the_whole_context_may_be_filled_and_no_more(artifact: Path) -> None:
    with open_session(artifact) as session:
        session.prefill((IDS * 2)[:CONTEXT_TOKENS])
        with pytest.raises(UsageError, match=r"256 \+ 1 tokens do not fit into a context of 256"):
            session.step(1)
        assert session.position == CONTEXT_TOKENS


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no tokens"), ([1, 512], "token 512 is not"), ([-3, 1], "token -3 is not")],
)
def test_tokens_that_cannot_be_appended_are_refused_at_once(
    artifact: Path, ids: list[int], message: str
) -> None:
    with open_session(artifact) as session:
        for append in (session.prefill, session.stream_logits):
            with pytest.raises(UsageError, match=message):
                append(ids)
        assert session.position == 0


def test_rewinding_forward_is_refused(artifact: Path) -> None:
    with open_session(artifact) as session:
        session.prefill([1, 2, 3])
        for position in (4, -1):
            with pytest.raises(UsageError, match="cannot rewind"):
                session.rewind(position)


HARD_TEXTS = [
    "In 2024 there were 1234567890 of them, 3.14 each.",
    "def add(a: int) -> int:\n\treturn a  +   b\n\n\n",
    "Größe, naïve café, 你好世界, emoji 🙂🎉 and    many   spaces.   ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    " leading space",
]


def test_its_tokenizer_gives_the_ids_of_transformers(
    tiny: Callable[[str], Path], artifact: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    with open_session(artifact) as session:
        for text in HARD_TEXTS:
            assert session.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_tokenize_adds_no_bos_where_the_tokenizer_would(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    student = write_student(tmp_path / "s")
    path = str(student / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(path)
    judged = AutoTokenizer.from_pretrained(student)
    assert judged("Hi").input_ids[0] == 1
    with open_session(export(student, tmp_path / "o")) as session:
        assert session.tokenize("Hi") == judged("Hi", add_special_tokens=False).input_ids


def copy_of(artifact: Path, dst: Path) -> Path:
    dst.mkdir()
    for file in artifact.iterdir():
        (dst / file.name).write_bytes(file.read_bytes())
    return dst


def _truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        os.truncate(path, int(path.stat().st_size * share))

    return damage


@pytest.mark.parametrize("accuracy_level", [None, 1])
@pytest.mark.parametrize(
    "damage",
    [
        _truncate("model.onnx", 0.5),
        _truncate("model.onnx", 0.0),
        _truncate("model.onnx.data", 0.5),
        _truncate("model.onnx.data", 0.0),
        lambda d: (d / "model.onnx").write_bytes(b"no protobuf at all" * 50),
        lambda d: (d / "model.onnx").unlink(),
        lambda d: (d / "model.onnx.data").unlink(),
        lambda d: (d / "genai_config.json").unlink(),
        lambda d: (d / "genai_config.json").write_text("{"),
        lambda d: (d / "genai_config.json").write_text('{"model": []}'),
    ],
)
def test_damaged_artifacts_are_refused(
    artifact: Path, tmp_path: Path, damage: Callable[[Path], None], accuracy_level: int | None
) -> None:
    broken = copy_of(artifact, tmp_path / "broken")
    open_session(broken, accuracy_level).close()
    damage(broken)
    with pytest.raises(InputError):
        open_session(broken, accuracy_level)


def test_another_onnx_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    broken = copy_of(artifact, tmp_path / "broken")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "other", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not a decoder that edgedistill exported"):
        open_session(broken)


def test_a_config_of_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    broken = copy_of(artifact, tmp_path / "broken")
    config = json.loads((broken / "genai_config.json").read_text())
    config["model"]["decoder"]["num_key_value_heads"] = 7
    (broken / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not describe"):
        open_session(broken)


def test_a_context_beyond_the_claim_is_refused(artifact: Path) -> None:
    with pytest.raises(InputError, match="256 tokens of context, not 257"):
        OnnxRuntime().open(artifact, context_tokens=257, threads=1)


def test_a_missing_package_names_the_extra(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match=r"edgedistill\[onnx\]"):
        open_session(artifact)


def test_settings_name_versions_and_the_level_in_use() -> None:
    import onnxruntime

    assert OnnxRuntime().settings()["onnxruntime"] == onnxruntime.__version__
    assert OnnxRuntime().settings()["accuracy_level"] == "4"
    assert OnnxRuntime(accuracy_level=1).settings()["accuracy_level"] == "1"
