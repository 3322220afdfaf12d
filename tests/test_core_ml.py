"""The Core ML runtime off a Mac: saved packages executed, judged by transformers in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill.errors import EdgedistillError, InputError, UsageError
from edgedistill.exporters.coreml import Coreml
from edgedistill.mil_package import Constant, read_package
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.runtimes.core_ml import CoreMl
from edgedistill.session import Session
from edgedistill.student import Student, StudentWriter, dequantize_student
from tests.rounded import round_student
from tests.tiny import FAMILY_CONFIGS, write_student

CONTEXT_TOKENS = 250
IDS = np.random.default_rng(7).integers(0, 512, CONTEXT_TOKENS).tolist()
Tiny = Callable[[str], Path]
Precision = Literal["float16", "float32"]
Floats = npt.NDArray[np.floating[Any]]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "a key head for each head": ("llama", {"num_key_value_heads": 4}),
    "all biases": ("llama", {"attention_bias": True}),
    "linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "an attention scale of its own": ("gemma3", {"query_pre_attn_scalar": 50}),
    "a window of one token": ("gemma3", {"sliding_window": 1}),
    "no layer that attends to all": ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
    "no layer that slides": ("gemma3", {"layer_types": ["full_attention"] * 3}),
    "a key head for each head, with windows": ("gemma3", {"num_key_value_heads": 4}),
}


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to its exported artifact."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = export(tiny(family), tmp_path_factory.mktemp(f"coreml-{family}"))
        return made[family]

    return make


def export(student: Path, dst: Path) -> Path:
    dst.mkdir(exist_ok=True)
    Coreml().export(Student(student), dst, context_tokens=CONTEXT_TOKENS)
    return dst


def open_session(artifact: Path, precision: Precision = "float16") -> Session:
    return CoreMl(precision).open(artifact, context_tokens=CONTEXT_TOKENS, threads=1)


def judge(student: Path, ids: list[int], *, float16: tuple[int, ...] = ()) -> Floats:
    """Logits float32 [n, vocab] by transformers; parameters of these ranks rounded to float16.

    Of a norm that multiplies by 1 + w that sum is what is rounded.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim in float16:
                added = offset if "norm" in name else 0.0
                parameter.copy_((parameter + added).half().float() - added)
        logits: Floats = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def divergence(wanted: Floats, got: Floats) -> float:
    """Mean KL(wanted || got) in nats."""
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (wanted, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def all_logits(artifact: Path, precision: Precision) -> Floats:
    with open_session(artifact, precision) as session:
        return np.concatenate(list(session.stream_logits(IDS)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_package_is_the_model(family: str, tiny: Tiny, artifact: Callable[[str], Path]) -> None:
    same_weights = judge(tiny(family), IDS, float16=(1, 2))
    assert divergence(same_weights, all_logits(artifact(family), "float32")) <= 1e-6
    device = all_logits(artifact(family), "float16")
    assert np.array_equal(device, device.astype(np.float16))
    assert divergence(judge(tiny(family), IDS), device) <= 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_fact_of_a_decoder_reaches_the_program(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    student = write_student(tmp_path / "student", family, **changes)
    got = all_logits(export(student, tmp_path / "out"), "float32")
    assert divergence(judge(student, IDS, float16=(1, 2)), got) <= 1e-6


def test_heads_that_are_rotated_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose rotation is Phi-3's, of the first half of each head, by transformers itself."""
    from transformers.models.llama import modeling_llama
    from transformers.models.phi3 import modeling_phi3

    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    student = write_student(tmp_path / "student", "llama", rope_parameters=parameters)
    facts = replace(Student(student).facts, rotated_dims=8)
    monkeypatch.setattr(Student, "facts", facts)
    got = all_logits(export(student, tmp_path / "out"), "float32")
    whole = judge(student, IDS, float16=(1, 2))
    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", modeling_phi3.Phi3RotaryEmbedding)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_phi3.apply_rotary_pos_emb)
    assert divergence(judge(student, IDS, float16=(1, 2)), got) <= 1e-6
    assert divergence(whole, got) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "grid"),
    [
        ("qwen3", Grid(2, 64)),
        ("qwen3", Grid(3, 32)),
        ("qwen3", Grid(4, 32)),
        ("qwen3", Grid(4, 32, "integer")),
        ("qwen3", Grid(8, 32)),
        ("qwen3", Grid(8, 32, "integer")),
        ("gemma3", Grid(4, 32)),
    ],
    ids=str,
)
def test_a_quantized_package_is_its_dequantized_student(
    family: str, grid: Grid, tiny: Tiny, tmp_path: Path
) -> None:
    student = round_student(tiny(family), tmp_path / "student", grid)
    (tmp_path / "float").mkdir()
    dequantize_student(student, tmp_path / "float")
    artifact = export(student, tmp_path / "out")
    wanted = judge(tmp_path / "float", IDS, float16=(1,))  # norms are stored in float16
    assert divergence(wanted, all_logits(artifact, "float32")) <= 1e-6
    assert divergence(wanted, all_logits(artifact, "float16")) <= 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["quantize_rtn", "quantize_gptq"])
def test_three_bits_of_a_stage_arrive_code_by_code(stage: str, tiny: Tiny, tmp_path: Path) -> None:
    fields = {"bits": 3, "embeddings": {"bits": 3, "group_size": 64}}
    for name in ("student", "float"):
        (tmp_path / name).mkdir()
    load_plugin("stages", stage).model_validate(fields).run(tiny("llama"), tmp_path / "student")
    student = Student(tmp_path / "student")
    assert set(student.grids.values()) == {Grid(3, 32), Grid(3, 64)}
    package = read_package(export(student.path, tmp_path / "out") / "model.mlpackage")
    made = {op.outputs[0]: op.inputs for op in package.operations if op.outputs}

    def constant(source: str | Constant) -> npt.NDArray[Any]:
        return (package.constants[source] if isinstance(source, str) else source).values()

    for name in student.grids:
        wanted, scaled = student.read_quantized(name), made[name.replace(".", "_")]
        table = made[str(scaled["data"][0])]
        np.testing.assert_array_equal(constant(table["indices"][0]), wanted.codes)
        assert constant(table["lut"][0]).reshape(-1).tolist() == list(range(-4, 4))
        np.testing.assert_array_equal(constant(scaled["scale"][0]), wanted.scales)
    dequantize_student(student.path, tmp_path / "float")
    wanted_logits = judge(tmp_path / "float", IDS, float16=(1,))  # norms are stored in float16
    assert divergence(wanted_logits, all_logits(tmp_path / "out", "float32")) <= 1e-6
    assert divergence(wanted_logits, all_logits(tmp_path / "out", "float16")) <= 5e-4


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", n) for n in (1, 2, 63, 64, 65)] + [(f, 65) for f in FAMILY_CONFIGS if f != "llama"],
)
def test_tokens_one_by_one_see_what_the_prompt_saw(
    family: str, length: int, artifact: Callable[[str], Path], tiny: Tiny
) -> None:
    """Windows of the tiny families are shorter than the longest of these texts."""
    wanted = judge(tiny(family), IDS[:length], float16=(1, 2))
    with open_session(artifact(family), "float32") as session:
        at_once = session.prefill(IDS[:length])
        assert session.position == length
        session.reset()
        single = np.stack([session.step(token) for token in IDS[:length]])
        assert session.position == length
        session.rewind(length // 2)
        chunked = session.prefill(IDS[length // 2 : length]) if length > 1 else at_once
    assert at_once.shape == (512,)
    assert at_once.dtype == np.float32
    np.testing.assert_allclose(at_once, single[-1], atol=1e-4)
    np.testing.assert_allclose(chunked, single[-1], atol=1e-4)
    assert divergence(wanted, single) <= 1e-6


def test_what_was_rewound_is_forgotten(artifact: Callable[[str], Path]) -> None:
    with open_session(artifact("llama")) as session:
        wanted = session.prefill(IDS[:40])
        session.rewind(30)
        session.prefill(IDS[100:160])
        session.rewind(30)
        assert session.position == 30
        np.testing.assert_array_equal(session.prefill(IDS[30:40]), wanted)
        with pytest.raises(UsageError, match="cannot rewind to 41"):
            session.rewind(41)


def test_two_sessions_share_no_state(artifact: Callable[[str], Path]) -> None:
    with open_session(artifact("llama")) as one, open_session(artifact("llama")) as other:
        one.prefill(IDS[:9])
        wanted = one.step(3)
        one.rewind(9)
        other.prefill(IDS[50:80])
        np.testing.assert_array_equal(one.step(3), wanted)


def test_the_last_place_of_the_context_is_usable_and_the_next_refused(
    artifact: Callable[[str], Path], tiny: Tiny
) -> None:
    wanted = judge(tiny("llama"), IDS, float16=(1, 2))
    with open_session(artifact("llama"), "float32") as session:
        session.prefill(IDS[:-1])
        last = session.step(IDS[-1])
        assert divergence(wanted[-1:], last[None]) <= 1e-6
        with pytest.raises(UsageError, match="do not fit into the context of 250"):
            session.step(1)


def test_bad_calls_are_refused(artifact: Callable[[str], Path]) -> None:
    session = open_session(artifact("llama"))
    for ids in ([], [512], [-1], [0] * 251):
        with pytest.raises(UsageError):
            session.prefill(ids)
        with pytest.raises(UsageError):
            list(session.stream_logits(ids))
    assert session.position == 0
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.prefill([1])


def test_an_artifact_that_cannot_serve_is_refused(
    artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"there is no model\.mlpackage"):
        CoreMl().open(tmp_path, context_tokens=10, threads=1)
    with pytest.raises(EdgedistillError, match="the package holds 250"):
        CoreMl().open(artifact("llama"), context_tokens=251, threads=1)


def test_settings_say_what_ran() -> None:
    settings = CoreMl().settings()
    assert "float16" in settings["mode"]
    assert settings["coremltools"][0].isdigit()
    assert CoreMl.limitation
    assert "device unproven" in CoreMl.limitation


@pytest.mark.parametrize(("factor", "norm_eps"), [(1500.0, 1e-5), (1e-2, 1e-3)])
def test_norms_are_right_where_squares_leave_float16(
    factor: float, norm_eps: float, tmp_path: Path
) -> None:
    """The residual stream scaled: its squares overflow, or vanish beside eps."""
    plain = Student(write_student(tmp_path / "plain", "mistral", rms_norm_eps=norm_eps))
    (tmp_path / "scaled").mkdir()
    with StudentWriter(tmp_path / "scaled", plain) as writer:
        for name in plain.names():
            values = plain.read(name)
            feeds_stream = name.endswith(
                ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
            )
            writer.write(name, values * np.float32(factor) if feeds_stream else values)
    largest = np.abs(residual_stream(tmp_path / "scaled")).max()
    assert largest < 65504
    assert (largest**2 > 4 * 65504) if factor > 1 else (largest**2 < norm_eps)
    device = all_logits(export(tmp_path / "scaled", tmp_path / "out"), "float16")
    assert divergence(judge(tmp_path / "scaled", IDS), device) <= 5e-4


def test_a_stream_beyond_float16_is_carried_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Gemma whose embeddings and norms behind the halves are some thousand times larger."""
    plain = Student(write_student(tmp_path / "plain", "gemma3", tie_word_embeddings=False))
    (tmp_path / "large").mkdir()
    with StudentWriter(tmp_path / "large", plain) as writer:
        for name in plain.names():
            values, factor = plain.read(name), np.float32(8000)
            if name.endswith("embed_tokens.weight"):
                values = values * factor
            elif "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                values = (1 + values) * factor - 1
            writer.write(name, values)
    assert np.abs(residual_stream(tmp_path / "large")).max() > 2 * 65504
    wanted = judge(tmp_path / "large", IDS)
    device = all_logits(export(tmp_path / "large", tmp_path / "out"), "float16")
    assert divergence(wanted, device) <= 5e-4
    # The same values in a stream that is not scaled leave float16.
    monkeypatch.setattr("edgedistill.coreml_norms.SCALED_STREAM", 1.0)
    overflown = all_logits(export(tmp_path / "large", tmp_path / "unscaled"), "float16")
    assert not np.isfinite(overflown).all(axis=-1).any()
    in_float32 = all_logits(tmp_path / "unscaled", "float32")
    assert divergence(judge(tmp_path / "large", IDS, float16=(1, 2)), in_float32) <= 1e-6


def test_epsilon_counts_in_a_scaled_stream(tmp_path: Path) -> None:
    """A stream so small that eps of its norms is most of what they divide by."""
    student = write_student(tmp_path / "student", "gemma3", rms_norm_eps=30.0)
    assert np.square(residual_stream(student)).mean() < 30.0
    artifact = export(student, tmp_path / "out")
    assert divergence(judge(student, IDS, float16=(1, 2)), all_logits(artifact, "float32")) <= 1e-6
    assert divergence(judge(student, IDS), all_logits(artifact, "float16")) <= 5e-4


def residual_stream(student: Path) -> Floats:
    """What enters each block, by transformers: float32 [layers, n, hidden]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    return np.stack([state[0].numpy() for state in states[:-1]])
