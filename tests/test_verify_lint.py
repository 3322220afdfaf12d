"""Lint passes what edgedistill exports and names what was planted, from the bytes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import InputError
from edgedistill.gguf_layout import checkpoint_names, tensor_name
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.results import Check
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.lint import lint_artifact
from edgedistill.verify.side_files import read_ends
from edgedistill.verify.stated import table_frequencies, theta_and_divisors
from tests.artifact_tensors import OnnxTensors, edited_graph
from tests.rounded import round_student, round_tensor
from tests.tiny import EXPORTS, FAMILY_CONFIGS

Tiny = Callable[[str], Path]
Edit = Callable[[dict[str, Any]], None]
FORMATS = ("gguf", "onnx", "coreml")
CONTEXT = 96
GRIDS = (
    Grid(2, 64),
    Grid(3, 32),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(5, 32),
    Grid(8, 32),
)
HELD = [(f, g) for f in FORMATS for g in GRIDS if load_plugin("exporters", f)().holds(g)]


def export(student: Path, dst: Path, format_name: str, context_tokens: int = CONTEXT) -> Path:
    dst.mkdir(parents=True)
    exporter = load_plugin("exporters", format_name)()
    exporter.export(Student(student), dst, context_tokens=context_tokens)
    return dst


def lint(artifact: Path, format_name: str, student: Path) -> list[Check]:
    return lint_artifact(artifact, format_name, student, context_tokens=CONTEXT)


def failed(checks: list[Check]) -> set[str]:
    assert all(check.name.startswith("lint: ") for check in checks)
    return {check.name.removeprefix("lint: ") for check in checks if not check.passed}


SLIDING_LAST = ["full_attention"] * 2 + ["sliding_attention"]
SHORTER = FAMILY_CONFIGS["phi4_mini"]["rope_parameters"] | {"short_factor": [1.0] * 6}
YARN = FAMILY_CONFIGS["qwen2_yarn"]["rope_parameters"]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


WINDOWS = {"sliding window", "sliding layers", "RoPE theta of sliding layers"}
# What a GGUF or ONNX of a family is checked for beyond plain blocks.
OWN_CHECKS = {
    "mistral_sliding": WINDOWS,
    "qwen2_yarn": {"RoPE magnitude"},
    "qwen3_sliding": WINDOWS,
    "phi3_sliding": WINDOWS,
    "phi4_mini": {"RoPE magnitude"},
    "smollm3": {"layers without rotation"},
    "granite": {"attention scale", "embedding scale", "residual scale", "divisor of logits"},
    "gemma2": WINDOWS | {"embedding scale", "soft cap of attention", "soft cap of logits"},
    "gemma3": WINDOWS | {"embedding scale"},
}


@pytest.mark.parametrize(("family", "format_name"), EXPORTS)
def test_what_is_exported_passes(tiny: Tiny, tmp_path: Path, family: str, format_name: str) -> None:
    checks = lint(export(tiny(family), tmp_path / "a", format_name), format_name, tiny(family))
    assert failed(checks) == set(), checks
    names = {check.name.removeprefix("lint: ") for check in checks}
    everywhere = {
        "layers",
        "hidden size",
        "ffn size",
        "heads",
        "key and value heads",
        "head size",
        "vocabulary",
        "norm epsilon",
        "RoPE theta",
        "RoPE scaling",
        "EOS",
        "BOS",
        "dtypes",
        "embedding and head",
        "context length",
        "tied embeddings",
        "chat template",
    }
    own = OWN_CHECKS.get(family, set()) if format_name != "coreml" else set()
    assert everywhere | own <= names
    # What plain blocks have on both sides is not told.
    assert own == names & set().union(*OWN_CHECKS.values()) or format_name == "coreml"


@pytest.mark.parametrize(("format_name", "grid"), HELD, ids=str)
def test_every_grid_is_recognized(tiny: Tiny, tmp_path: Path, grid: Grid, format_name: str) -> None:
    student = round_student(tiny("mistral"), tmp_path / "student", grid)
    checks = lint(export(student, tmp_path / "a", format_name), format_name, student)
    assert failed(checks) == set(), checks
    # The same bytes are not what a float student would be stored as.
    assert {"dtypes", "embedding and head"} == failed(
        lint(tmp_path / "a", format_name, tiny("mistral"))
    )


def theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] *= 1.25


def no_scaling(config: dict[str, Any]) -> None:
    theta = config["rope_parameters"]["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}


def other_scaling(config: dict[str, Any]) -> None:
    config["rope_parameters"]["factor"] = 4.0


def epsilon(config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-6


def window(config: dict[str, Any]) -> None:
    config["sliding_window"] = 8


def layers_that_slide(config: dict[str, Any]) -> None:
    config["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]


def no_layer_slides(config: dict[str, Any]) -> None:
    config["layer_types"] = ["full_attention"] * 3


def sliding_theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 10000.0


def full_theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["full_attention"]["rope_theta"] = 1e6


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "RoPE theta off": (theta, "llama", "RoPE theta"),
    "RoPE theta off beside a scaling": (theta, "llama3", "RoPE theta"),
    "RoPE scaling dropped": (no_scaling, "llama3", "RoPE scaling"),
    "RoPE scaling of another factor": (other_scaling, "llama3", "RoPE scaling"),
    "norm epsilon": (epsilon, "qwen3", "norm epsilon"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_wrong_config_is_named(tiny: Tiny, tmp_path: Path, format_name: str, fault: str) -> None:
    edit, family, name = CONFIG_FAULTS[fault]
    faulty = shutil.copytree(tiny(family), tmp_path / "faulty")
    edit_json(faulty / "config.json", edit)
    artifact = export(faulty, tmp_path / "a", format_name)
    found = failed(lint(artifact, format_name, tiny(family)))
    # The bands of a llama3 scaling follow from the base.
    allowed = {name, "RoPE scaling"} if family == "llama3" else {name}
    assert name in found
    assert found <= allowed


@pytest.mark.parametrize("format_name", FORMATS)
def test_other_ends_and_a_stale_template_are_named(
    tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    faulty = shutil.copytree(tiny("llama"), tmp_path / "faulty")
    for name in ("config.json", "generation_config.json"):
        edit_json(faulty / name, lambda c: c.update(eos_token_id=0))
    edit_json(faulty / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))
    artifact = export(faulty, tmp_path / "a", format_name)
    assert failed(lint(artifact, format_name, tiny("llama"))) == {"EOS"}

    stale = shutil.copytree(tiny("llama"), tmp_path / "stale")
    template = (stale / "chat_template.jinja").read_text()
    (stale / "chat_template.jinja").write_text(template.replace("'<|im_end|>'", "'<|im_end|>\n'"))
    artifact = export(stale, tmp_path / "b", format_name)
    assert failed(lint(artifact, format_name, tiny("llama"))) == {"chat template"}
    # Another text that renders the same is none.
    (stale / "chat_template.jinja").write_text(template + "{# a remark #}")
    artifact = export(stale, tmp_path / "c", format_name)
    assert failed(lint(artifact, format_name, tiny("llama"))) == set()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_list_of_ends_has_to_be_whole(tiny: Tiny, tmp_path: Path, format_name: str) -> None:
    several = shutil.copytree(tiny("llama"), tmp_path / "several")
    edit_json(several / "generation_config.json", lambda c: c.update(eos_token_id=[2, 0]))
    assert read_ends(several) == {0, 2}
    good = export(several, tmp_path / "a", format_name)
    assert failed(lint(good, format_name, several)) == set()
    short = export(tiny("llama"), tmp_path / "b", format_name)
    assert failed(lint(short, format_name, several)) == {"EOS"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_another_context_is_named(tiny: Tiny, tmp_path: Path, format_name: str) -> None:
    artifact = export(tiny("llama"), tmp_path / "a", format_name, context_tokens=64)
    assert failed(lint(artifact, format_name, tiny("llama"))) == {"context length"}


def quantize_only(src: Path, dst: Path, *, outer: bool) -> Path:
    """A copy with the embedding (and the head) on a grid, or all other matrices."""
    student = Student(src)
    dst.mkdir()
    ends = {student.facts.embedding, student.facts.head}
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            values = student.read(name)
            chosen = name in student.facts.matrices() and (name in ends) == outer
            writer.write(name, round_tensor(values, Grid(8, 32)) if chosen else values)
    return dst


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_head_that_was_quantized_by_accident_is_named(
    tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    outer = quantize_only(tiny("llama"), tmp_path / "outer", outer=True)
    inner = quantize_only(tiny("llama"), tmp_path / "inner", outer=False)
    artifact = export(outer, tmp_path / "a", format_name)
    assert failed(lint(artifact, format_name, tiny("llama"))) == {"embedding and head"}
    artifact = export(inner, tmp_path / "b", format_name)
    assert failed(lint(artifact, format_name, tiny("llama"))) == {"dtypes"}
    assert failed(lint(artifact, format_name, inner)) == set()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_head_of_its_own_is_not_a_tied_one(tiny: Tiny, tmp_path: Path, format_name: str) -> None:
    student, untied = Student(tiny("llama")), tmp_path / "untied"
    untied.mkdir()
    config = student.config | {"tie_word_embeddings": False}
    with StudentWriter(untied, student, config) as writer:
        for name in student.names():
            writer.write(name, student.read(name))
        writer.write("lm_head.weight", student.read(student.facts.embedding))
    artifact = export(untied, tmp_path / "a", format_name)
    assert "tied embeddings" in failed(lint(artifact, format_name, tiny("llama")))
    tied = export(tiny("llama"), tmp_path / "b", format_name)
    assert "tied embeddings" in failed(lint(tied, format_name, untied))


def set_gguf(path: Path, key: str, value: float) -> None:
    """Change a number in place, with the gguf package's own reader."""
    import gguf

    field = gguf.GGUFReader(path, "r+").fields[key]
    field.parts[field.data[0]][0] = value


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("llama.rope.freq_base", 500000.0, "RoPE theta"),
        ("llama.block_count", 2, "layers"),
        ("llama.attention.head_count", 8, "heads"),
        ("llama.attention.head_count_kv", 4, "key and value heads"),
        ("llama.attention.key_length", 8, "head size"),
        ("llama.feed_forward_length", 64, "ffn size"),
        ("llama.embedding_length", 32, "hidden size"),
        ("llama.attention.layer_norm_rms_epsilon", 1e-3, "norm epsilon"),
        ("llama.context_length", 8192, "context length"),
        ("tokenizer.ggml.eos_token_id", 7, "EOS"),
        ("tokenizer.ggml.bos_token_id", 7, "BOS"),
        ("tokenizer.ggml.add_bos_token", 1, "BOS put before a text"),
    ],
)
def test_a_changed_number_of_a_gguf_is_named(
    tiny: Tiny, tmp_path: Path, key: str, value: float, name: str
) -> None:
    artifact = export(tiny("llama"), tmp_path / "a", "gguf")
    set_gguf(artifact / "model.gguf", key, value)
    assert name in failed(lint(artifact, "gguf", tiny("llama")))
    found = next(c for c in lint(artifact, "gguf", tiny("llama")) if c.name == f"lint: {name}")
    assert "expected" in found.detail


@pytest.mark.parametrize(
    ("family", "key", "value", "name"),
    [
        ("qwen2_yarn", "qwen2.rope.scaling.factor", 2.0, "RoPE scaling"),
        ("qwen2_yarn", "qwen2.rope.scaling.original_context_length", 256, "RoPE scaling"),
        ("qwen2_yarn", "qwen2.rope.scaling.attn_factor", 1.1, "RoPE magnitude"),
        ("qwen2_yarn", "qwen2.rope.freq_base", 500.0, "RoPE theta"),
        ("phi4_mini", "phi3.rope.scaling.attn_factor", 1.0, "RoPE magnitude"),
        ("granite", "granite.attention.scale", 0.5, "attention scale"),
        ("granite", "granite.attention.scale", 0.0, "attention scale"),
        ("granite", "granite.embedding_scale", 1.0, "embedding scale"),
        ("granite", "granite.residual_scale", 1.0, "residual scale"),
        ("granite", "granite.logit_scale", 0.5, "divisor of logits"),
        ("gemma2", "gemma2.attn_logit_softcapping", 50.0, "soft cap of attention"),
        ("gemma2", "gemma2.final_logit_softcapping", 30.0, "soft cap of logits"),
        ("gemma2", "gemma2.attention.sliding_window", 8, "sliding window"),
        ("gemma2", "gemma2.attention.sliding_window_pattern", 3, "sliding layers"),
    ],
)
def test_a_changed_number_of_a_family_is_named(
    tiny: Tiny, tmp_path: Path, family: str, key: str, value: float, name: str
) -> None:
    artifact = export(tiny(family), tmp_path / "a", "gguf")
    set_gguf(artifact / "model.gguf", key, value)
    found = {c.name.removeprefix("lint: "): c for c in lint(artifact, "gguf", tiny(family))}
    assert not found[name].passed
    assert "expected" in found[name].detail


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("mistral", {"sliding_window": 16}, {"sliding window", "sliding layers"}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": SLIDING_LAST},
            {"sliding window", "sliding layers"},
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, {"layers without rotation"}),
        ("llama", {"rope_parameters": YARN}, {"RoPE scaling", "RoPE magnitude"}),
        ("phi4_mini", {"rope_parameters": SHORTER}, {"RoPE scaling"}),
        ("phi4_mini", {"sliding_window": 95}, {"sliding window", "sliding layers"}),
        ("gemma3", {"final_logit_softcapping": 8.0}, {"soft cap of logits"}),
        ("gemma3", {"query_pre_attn_scalar": 16}, {"attention scale"}),
    ],
)
def test_a_gguf_of_a_simpler_model_is_named(
    tiny: Tiny, tmp_path: Path, family: str, changes: dict[str, Any], names: set[str]
) -> None:
    """As a converter makes it that drops what it does not know."""
    artifact = export(tiny(family), tmp_path / "a", "gguf")
    student = Path(shutil.copytree(tiny(family), tmp_path / "student"))
    edit_json(student / "config.json", lambda config: config.update(changes))
    found = failed(lint(artifact, "gguf", student))
    assert names <= found
    assert found <= names | {"RoPE theta of sliding layers"}


def test_scales_of_another_dtype_are_named(tiny: Tiny, tmp_path: Path) -> None:
    import onnx

    student = round_student(tiny("llama"), tmp_path / "student", Grid(4, 32))
    artifact = export(student, tmp_path / "a", "onnx")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    scales = next(t for t in model.graph.initializer if t.name.endswith("up_proj.weight.scales"))
    scales.data_type = onnx.TensorProto.FLOAT16
    onnx.save(model, artifact / "model.onnx")
    checks = lint(artifact, "onnx", student)
    assert failed(checks) == {"dtypes"}
    detail = next(c.detail for c in checks if c.name == "lint: dtypes")
    assert scales.name.removesuffix(".scales") in detail
    assert "float16 scales, expected int4 in 32s, float32 scales" in detail


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("base", [500.0, 10000.0, 1e6])
@pytest.mark.parametrize("places", [16, 100, 4096])
def test_frequencies_are_read_off_the_tables(base: float, dtype: Any, places: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": base}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters)
    frequencies = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    angles = np.outer(np.arange(places), frequencies)
    found = table_frequencies(np.cos(angles).astype(dtype), np.sin(angles).astype(dtype))
    tolerance = 1e-2 if dtype == np.float16 else 1e-6
    np.testing.assert_allclose(found, frequencies, rtol=tolerance)
    theta, divisors = theta_and_divisors(found)
    assert theta == pytest.approx(base, rel=2e-2 if dtype == np.float16 else 1e-4)
    np.testing.assert_allclose(divisors, 1.0, rtol=4e-2 if dtype == np.float16 else 2e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_names_of_a_gguf_are_the_packages_own(tiny: Tiny, family: str) -> None:
    import gguf

    facts = Student(tiny(family)).facts
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 3)
    for name in facts.tensor_shapes():
        there = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        assert tensor_name(facts, name) == there
        assert checkpoint_names(there, family) == [name]


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (window, "sliding window"),
        (layers_that_slide, "sliding layers"),
        (sliding_theta, "RoPE theta of sliding layers"),
        (full_theta, "RoPE theta"),
        (no_layer_slides, "sliding window"),
    ],
)
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_a_gemma_does_otherwise_is_named(
    tiny: Tiny, tmp_path: Path, fault: Edit, name: str, format_name: str
) -> None:
    faulty = shutil.copytree(tiny("gemma3"), tmp_path / "faulty")
    edit_json(faulty / "config.json", fault)
    found = failed(lint(export(faulty, tmp_path / "a", format_name), format_name, tiny("gemma3")))
    assert name in found
    assert found <= {name, "sliding layers", "RoPE theta of sliding layers"}


def of_attention(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def another_window_in_one_layer(model: Any) -> None:
    (window,) = (a for a in of_attention(model)[2].attribute if a.name == "local_window_size")
    window.i = 17


def no_window_in_one_layer(model: Any) -> None:
    kept = [a for a in of_attention(model)[2].attribute if a.name != "local_window_size"]
    del of_attention(model)[2].attribute[:]
    of_attention(model)[2].attribute.extend(kept)


def tables_of_the_other_layers(model: Any) -> None:
    for node in (of_attention(model)[0], of_attention(model)[2]):
        node.input[7:9] = ["rope.cos", "rope.sin"]


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (another_window_in_one_layer, "sliding layers"),
        (no_window_in_one_layer, "sliding layers"),
        (tables_of_the_other_layers, "RoPE theta of sliding layers"),
    ],
)
def test_a_layer_of_a_graph_that_attends_otherwise_is_named(
    tiny: Tiny, tmp_path: Path, edit: Callable[[Any], None], name: str
) -> None:
    artifact = export(tiny("gemma3"), tmp_path / "a", "onnx")
    with edited_graph(artifact) as model:
        edit(model)
    assert failed(lint(artifact, "onnx", tiny("gemma3"))) == {name}


def test_a_rotation_without_its_factor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    artifact = export(tiny("qwen2_yarn"), tmp_path / "a", "onnx")
    for table in OnnxTensors(artifact, Student(tiny("qwen2_yarn")).facts).rope_tables():
        table /= table.max()
    assert failed(lint(artifact, "onnx", tiny("qwen2_yarn"))) == {"RoPE magnitude"}


def other_yarn(config: dict[str, Any]) -> None:
    config["rope_parameters"]["factor"] = 8.0


def test_a_yarn_of_another_factor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    faulty = shutil.copytree(tiny("qwen2_yarn"), tmp_path / "faulty")
    edit_json(faulty / "config.json", other_yarn)
    found = failed(lint(export(faulty, tmp_path / "a", "onnx"), "onnx", tiny("qwen2_yarn")))
    assert {"RoPE scaling", "RoPE magnitude"} <= found
    assert found <= {"RoPE scaling", "RoPE magnitude", "RoPE theta"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_truncated_artifact_is_an_input_error(
    tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    artifact = export(tiny("llama"), tmp_path / "a", format_name)
    names = {
        "gguf": "model.gguf",
        "onnx": "model.onnx",
        "coreml": "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    }
    path = artifact / names[format_name]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError):
        lint(artifact, format_name, tiny("llama"))
