from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError, UsageError
from edgedistill.exporters.gguf import Gguf
from edgedistill.quantized import Grid
from edgedistill.runtimes.llama_cpp import LOGIT_ROWS, LlamaCpp, LlamaCppSession
from edgedistill.student import Student, dequantize_student
from tests.rounded import round_student
from tests.tiny import FAMILY_CONFIGS, GGUF_FAMILIES

Tiny = Callable[[str], Path]
IDS: list[int] = np.random.default_rng(7).integers(3, 512, 200).tolist()


def _open(student: Path, dst: Path, context_tokens: int = 256) -> LlamaCppSession:
    dst.mkdir(exist_ok=True)
    Gguf().export(Student(student), dst, context_tokens=256)
    return LlamaCpp().open(dst, context_tokens=context_tokens, threads=1)


def _streamed(session: LlamaCppSession, ids: list[int]) -> npt.NDArray[np.float32]:
    return np.concatenate(list(session.stream_logits(ids)))


def _float32_logits(student: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def _kl(judge: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    """Mean KL(judge || found) over positions, in nats."""
    expected, other = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (judge.astype(np.float64), found.astype(np.float64))
    )
    return float((np.exp(expected) * (expected - other)).sum(axis=-1).mean())


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_logits_are_those_of_transformers_in_float32(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    expected = _float32_logits(tiny(family), IDS)
    with _open(tiny(family), tmp_path) as session:
        found = _streamed(session, IDS)
    assert found.shape == (200, 512)
    assert found.dtype == np.float32
    # Weights and activations are rounded to float16.
    assert _kl(expected, found) < 1e-4
    assert np.mean(expected.argmax(1) == found.argmax(1)) > 0.98
    # Without this the limits above would say little: another position's logits are far away.
    assert _kl(expected[1:], found[:-1]) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ],
    ids=["all full", "other layers", "linear"],
)
def test_layers_of_gemma_attend_as_their_config_says(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    from tests.tiny import write_student

    student = write_student(tmp_path / "student", "gemma3", **changes)
    with _open(student, tmp_path / "out") as session:
        assert _kl(_float32_logits(student, IDS), _streamed(session, IDS)) < 1e-4


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
LLAMA3 = FAMILY_CONFIGS["llama3"]["rope_parameters"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
        ("mistral", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
        ("qwen3", {"rope_parameters": YARN}),
        ("smollm3", {"rope_parameters": LINEAR}),
        ("smollm3", {"rope_parameters": YARN}),
        ("smollm3", {"num_hidden_layers": 9}),
        ("granite", {"attention_bias": True}),
        ("granite", {"rope_parameters": YARN}),
        ("granite", {"rope_parameters": LLAMA3}),
        ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}),
        ("gemma2", {"rope_parameters": LINEAR}),
        ("gemma2", {"layer_types": ["sliding_attention"] * 3}),
        ("gemma2", {"layer_types": ["full_attention"] * 3}),
        ("gemma2", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        ("gemma3", {"final_logit_softcapping": 8.0}),
    ],
    ids=str,
)
def test_variants_of_a_family_are_the_same_model(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    from tests.tiny import write_student

    student = write_student(tmp_path / "student", family, **changes)
    assert Gguf().problems(Student(student).facts) == []
    with _open(student, tmp_path / "out") as session:
        assert _kl(_float32_logits(student, IDS), _streamed(session, IDS)) < 1e-4


@pytest.mark.parametrize(
    "grid",
    [Grid(8, 32), Grid(5, 32), Grid(4, 32), Grid(4, 32, "integer"), Grid(2, 64)],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_quantized_student_is_its_own_dequantized_copy(
    tiny: Tiny, tmp_path: Path, family: str, grid: Grid
) -> None:
    packed = round_student(tiny(family), tmp_path / "packed", grid)
    plain = tmp_path / "plain"
    plain.mkdir()
    dequantize_student(packed, plain)
    expected = _float32_logits(plain, IDS)
    with _open(packed, tmp_path / "out") as session:
        found = _streamed(session, IDS)
    # llama.cpp rounds activations to 8 bits in blocks of 32 for all of these: about 0.002.
    assert _kl(expected, found) < 5e-3
    # The rounding itself is far larger, so a second one would show.
    if grid.bits < 8:
        assert _kl(_float32_logits(tiny(family), IDS), found) > 0.1


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tails_read_in_a_batch_are_what_each_is_alone(
    tiny: Tiny, tmp_path: Path, family: str, start: int
) -> None:
    rng = np.random.default_rng(1)
    lengths = [1, 2, 63, 5, 64, 65, 30, 31, 200, 7, *rng.integers(1, 20, 150)]
    tails = [rng.integers(3, 512, n).tolist() for n in lengths]
    with _open(tiny(family), tmp_path) as session:
        if start:
            session.prefill(IDS[:start])
        together = np.stack(list(session.prefill_each(tails)))
        assert session.position == start
        after = session.prefill(IDS[start:])
        alone = []
        for tail in tails:
            session.reset()
            alone.append(session.prefill([*IDS[:start], *tail]))
        session.reset()
        untouched = session.prefill(IDS)
    assert _kl(np.stack(alone), together) < 1e-5
    assert _kl(np.stack(alone)[1:], together[:-1]) > 0.1
    assert _kl(untouched[None], after[None]) < 1e-5


def test_a_tail_beyond_the_context_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with _open(tiny("llama"), tmp_path) as session:
        session.prefill(IDS)
        assert len(list(session.prefill_each([IDS[:56], IDS[:56]]))) == 2
        with pytest.raises(UsageError, match=r"200 \+ 57 tokens do not fit"):
            list(session.prefill_each([IDS[:2], IDS[:57]]))


@pytest.mark.parametrize("family", ["llama", "smollm3", "granite", "gemma2", "gemma3"])
def test_prefill_and_token_by_token_agree_with_the_stream(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    with _open(tiny(family), tmp_path) as session:
        streamed = _streamed(session, IDS)
        assert session.position == 200
        session.reset()
        assert session.position == 0
        np.testing.assert_allclose(session.prefill(IDS), streamed[-1], atol=1e-3)
        session.reset()
        stepped = np.stack([session.step(token) for token in IDS])
    # Other kernels, of the same precision, for one token and for many.
    assert _kl(streamed, stepped) < 1e-4


@pytest.mark.parametrize("family", ["llama", "smollm3", "granite", "gemma2", "gemma3"])
def test_rewinding_forgets_what_came_after(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Also what a sliding window, of 16 tokens here, had left behind."""
    with _open(tiny(family), tmp_path) as session:
        session.prefill(IDS[:50])
        expected = session.step(IDS[50])
        session.prefill(IDS[100:150])
        session.rewind(50)
        assert session.position == 50
        assert np.array_equal(session.step(IDS[50]), expected)
        assert not np.allclose(session.step(IDS[50]), expected, atol=0.1)
        for position in (-1, 53):
            with pytest.raises(UsageError, match="cannot rewind"):
                session.rewind(position)


def test_logits_stay_as_they_are_when_the_session_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    with _open(tiny("llama"), tmp_path) as session:
        first = session.prefill(IDS[:10])
        kept = first.copy()
        session.step(5)
        assert np.array_equal(first, kept)


def test_a_text_longer_than_a_batch_is_streamed_in_chunks(tmp_path: Path) -> None:
    from tests.tiny import write_student

    student = write_student(tmp_path / "student", max_position_embeddings=1024)
    (tmp_path / "out").mkdir()
    Gguf().export(Student(student), tmp_path / "out", context_tokens=1024)
    ids = (IDS * 5)[:700]
    with LlamaCpp().open(tmp_path / "out", context_tokens=700, threads=1) as session:
        chunks = list(session.stream_logits(ids))
        assert max(len(chunk) for chunk in chunks) == LOGIT_ROWS
        session.reset()
        last = session.prefill(ids)
        with pytest.raises(UsageError, match="700 \\+ 1 tokens do not fit into the context of 700"):
            session.step(1)
    expected = _float32_logits(student, ids)
    assert _kl(expected, np.concatenate(chunks)) < 1e-4
    assert _kl(expected[-1:], last[None]) < 1e-3


def test_tokens_that_cannot_be_appended_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with _open(tiny("llama"), tmp_path, context_tokens=64) as session:
        for ids, message in (
            ([], "no tokens"),
            ([512], "outside the vocabulary"),
            ([-1], "outside the vocabulary"),
            ([1] * 65, "do not fit"),
        ):
            with pytest.raises(UsageError, match=message):
                session.prefill(ids)
            with pytest.raises(UsageError, match=message):
                list(session.stream_logits(ids))
        assert session.position == 0
        session.prefill([1] * 64)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_text_is_tokenized_with_special_tokens_and_nothing_added(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    from transformers import AutoTokenizer

    judge = AutoTokenizer.from_pretrained(tiny(family))
    with _open(tiny(family), tmp_path) as session:
        assert session.tokenize("") == []
        for text in ("<|im_start|>user\nhi 123<|im_end|>", "a\0b", "🙂" * 500):
            assert session.tokenize(text) == judge(text, add_special_tokens=False).input_ids


def test_what_the_file_says_of_special_tokens_can_be_asked(tiny: Tiny, tmp_path: Path) -> None:
    with _open(tiny("llama"), tmp_path) as session:
        assert (session.bos_id, session.eos_id, session.adds_bos) == (1, 2, False)
        assert 2 in session.eos_ids
        assert 1 not in session.eos_ids


def test_a_truncated_file_is_refused_and_the_process_lives(tiny: Tiny, tmp_path: Path) -> None:
    _open(tiny("llama"), tmp_path).close()
    file = tmp_path / "model.gguf"
    whole = file.read_bytes()
    for kept in (3, 20, 1000, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:kept])
        with pytest.raises(InputError, match="GGUF"):
            LlamaCpp().open(tmp_path, context_tokens=64, threads=1)
    file.write_bytes(whole)
    LlamaCpp().open(tmp_path, context_tokens=64, threads=1).close()


def test_a_whole_file_that_llama_cpp_refuses_carries_its_reason(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "no-such-architecture")
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="no-such-architecture"):
        LlamaCpp().open(tmp_path, context_tokens=64, threads=1)


def test_the_file_may_be_named_or_be_the_only_one(tiny: Tiny, tmp_path: Path) -> None:
    _open(tiny("llama"), tmp_path).close()
    renamed = (tmp_path / "model.gguf").rename(tmp_path / "other.gguf")
    for artifact in (tmp_path, renamed):
        LlamaCpp().open(artifact, context_tokens=64, threads=1).close()
    shutil.copyfile(renamed, tmp_path / "second.gguf")
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        LlamaCpp().open(tmp_path, context_tokens=64, threads=1)
    with pytest.raises(InputError, match="does not exist"):
        LlamaCpp().open(tmp_path / "gone", context_tokens=64, threads=1)


def test_closing_twice_is_harmless(tiny: Tiny, tmp_path: Path) -> None:
    session = _open(tiny("llama"), tmp_path)
    session.close()
    session.close()


def test_threads_and_settings_are_those_that_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    import llama_cpp

    settings = LlamaCpp().settings()
    assert settings["llama-cpp-python"] == llama_cpp.__version__
    assert "AVX" in settings["kernels"] or "NEON" in settings["kernels"]
    with _open(tiny("llama"), tmp_path) as session:
        context = session._context
        assert llama_cpp.llama_n_threads(context) == 1
        assert llama_cpp.llama_n_threads_batch(context) == 1
        assert llama_cpp.llama_n_ctx(context) >= 256


def test_loading_and_running_writes_nothing_to_the_terminal(tiny: Tiny, tmp_path: Path) -> None:
    _open(tiny("llama"), tmp_path).close()
    script = (
        "from pathlib import Path\n"
        "from edgedistill.runtimes.llama_cpp import LlamaCpp\n"
        "from edgedistill.errors import InputError\n"
        f"directory = Path({str(tmp_path)!r})\n"
        "with LlamaCpp().open(directory, context_tokens=64, threads=1) as session:\n"
        "    session.prefill([1, 2, 3])\n"
        "(directory / 'model.gguf').write_bytes(b'GGUF')\n"
        "try:\n"
        "    LlamaCpp().open(directory, context_tokens=64, threads=1)\n"
        "except InputError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_the_librarys_structures_are_those_it_was_built_with() -> None:
    # A field that ctypes does not know shifts all after it: defaults would come out as nonsense.
    import llama_cpp

    parameters = llama_cpp.llama_context_default_params()
    assert (parameters.n_batch, parameters.n_ubatch) == (2048, 512)
    assert (parameters.type_k, parameters.type_v) == (1, 1)  # float16
    assert parameters.n_outputs_max == 0
    assert ctypes.sizeof(llama_cpp.llama_context_params) > 100
