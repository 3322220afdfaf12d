from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_file import GgufFile
from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.student import Student, StudentWriter, read_json, write_json
from tests.rounded import random_grid_student, random_tensor
from tests.tiny import FAMILY_CONFIGS, GGUF_FAMILIES

Tiny = Callable[[str], Path]
# GGUF's name of each of a block's matrices, as llama.cpp's architecture lists have them.
BLOCK_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# Its norms, likewise: those of Gemma 3 lie on both sides of a half block.
NORMS = {
    "others": {
        "output_norm": "norm",
        "blk.2.attn_norm": "layers.2.input_layernorm",
        "blk.2.ffn_norm": "layers.2.post_attention_layernorm",
    },
    "gemma": {
        "output_norm": "norm",
        "blk.2.attn_norm": "layers.2.input_layernorm",
        "blk.2.post_attention_norm": "layers.2.post_attention_layernorm",
        "blk.2.ffn_norm": "layers.2.pre_feedforward_layernorm",
        "blk.2.post_ffw_norm": "layers.2.post_feedforward_layernorm",
    },
}
# What a family's own keys state, as of its config in tests/tiny.py.
OWN_KEYS: dict[str, dict[str, Any]] = {
    "qwen2_yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.0,
    },
    "granite": {
        "attention.scale": 0.75,
        "embedding_scale": 1.5,
        "residual_scale": pytest.approx(0.6),
        "logit_scale": 2.0,
    },
    "gemma2": {
        "attention.sliding_window_pattern": 2,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {
        "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base_swa": 500.0,
    },
}


def _export(student: Path, dst: Path, context_tokens: int = 128) -> Path:
    dst.mkdir(exist_ok=True)
    Gguf().export(Student(student), dst, context_tokens=context_tokens)
    return dst / "model.gguf"


def _checkpoint_name(name: str) -> str:
    """The checkpoint's name of a matrix in a GGUF file, by a table of this test's own."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output.weight":
        return "lm_head.weight"
    _, layer, short, _ = name.split(".")
    return f"model.layers.{layer}.{BLOCK_MATRICES[short]}.weight"


def _halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of pairs (0, half, 1, half + 1, ...) in each head back to halves."""
    per_head = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.concatenate([per_head[:, :, 0], per_head[:, :, 1]], axis=1).reshape(rows.shape)


def _stored_matrices(path: Path) -> dict[str, tuple[int, npt.NDArray[np.uint8]]]:
    """Checkpoint name -> (ggml type, blocks as uint8 [rows, bytes]) by the format's own reader.

    The gguf package refuses files with the type that it does not name (Q2_0); it is taught the
    type for the time of reading.
    """
    import gguf

    if 42 not in gguf.GGMLQuantizationType._value2member_map_:
        member = int.__new__(gguf.GGMLQuantizationType, 42)
        member._name_, member._value_ = "Q2_0", 42
        gguf.GGMLQuantizationType._value2member_map_[42] = member
        gguf.GGML_QUANT_SIZES[member] = (64, 18)
    reader = gguf.GGUFReader(path)
    heads = {
        short: int(reader.fields[f"{_architecture(reader)}.attention.{key}"].contents())
        for short, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv"))
    }
    stored = {}
    for tensor in reader.tensors:
        if len(tensor.shape) != 2:
            continue
        rows = int(tensor.shape[1])
        blocks = np.array(tensor.data).reshape(rows, -1).view(np.uint8)
        short = tensor.name.split(".")[-2]
        if _architecture(reader) in ("llama", "smollm3", "granite") and short in heads:
            blocks = _halves(blocks, heads[short])
        stored[_checkpoint_name(tensor.name)] = (int(tensor.tensor_type), blocks)
    return stored


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


def _unpack(kind: int, blocks: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    """Codes, scales and minima of blocks, from ggml's struct definitions, byte by byte."""
    rows = len(blocks)
    width, header = {8: (34, 2), 6: (22, 2), 2: (18, 2), 3: (20, 4), 42: (18, 2)}[kind]
    parts = blocks.reshape(rows, -1, width)
    numbers = np.ascontiguousarray(parts[..., :header]).view("<f2")
    quants = parts[..., header:]
    if kind == 8:
        codes = quants.view(np.int8).astype(np.int16) + 128
    elif kind == 42:
        codes = np.stack([quants >> 2 * i & 3 for i in range(4)], axis=-1)
    elif kind == 6:
        fifth = np.ascontiguousarray(quants[..., :4]).view("<u4") >> np.arange(32) & 1
        low = np.concatenate([quants[..., 4:] & 15, quants[..., 4:] >> 4], axis=-1)
        codes = low + 16 * fifth
    else:
        codes = np.concatenate([quants & 15, quants >> 4], axis=-1)
    unpacked = {"codes": codes.reshape(rows, -1), "scales": numbers[..., 0]}
    return unpacked | ({"minima": numbers[..., 1]} if header == 4 else {})


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (Grid(8, 32), 8),
        (Grid(5, 32), 6),
        (Grid(4, 32), 2),
        (Grid(4, 32, "integer"), 3),
        (Grid(2, 64), 42),
    ],
    ids=str,
)
def test_the_file_holds_the_students_codes_scales_and_zeros(
    tiny: Tiny, tmp_path: Path, family: str, grid: Grid, kind: int
) -> None:
    directory = random_grid_student(tiny(family), tmp_path / "student", grid)
    student = Student(directory)
    stored = _stored_matrices(_export(directory, tmp_path / "out"))
    assert set(stored) == set(student.facts.matrices())
    for name, (found_kind, blocks) in stored.items():
        assert found_kind == kind
        expected, found = student.read_quantized(name), _unpack(kind, blocks)
        assert np.array_equal(found["codes"], expected.codes)
        assert np.array_equal(
            found["scales"].view(np.uint16), expected.scales.astype("<f2").view(np.uint16)
        )
        if grid.zero == "integer":
            # m = -zero * scale, so the zero point comes back exactly wherever the scale is not 0.
            used = found["scales"] != 0
            scales = found["scales"].astype(np.float64)[used]
            zeros = -found["minima"].astype(np.float64)[used] / scales
            assert np.array_equal(zeros, expected.zero_points()[used])


@pytest.mark.parametrize(
    "grid", [Grid(8, 32), Grid(5, 32), Grid(4, 32), Grid(4, 32, "integer")], ids=str
)
def test_the_packages_dequantizer_gives_the_students_weights(
    tiny: Tiny, tmp_path: Path, grid: Grid
) -> None:
    import gguf

    directory = random_grid_student(tiny("llama"), tmp_path / "student", grid)
    for name, (kind, blocks) in _stored_matrices(_export(directory, tmp_path / "out")).items():
        weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
        expected = Student(directory).read(name)
        if grid.zero == "fixed":
            assert np.array_equal(weights, expected)
        else:
            np.testing.assert_allclose(weights, expected, rtol=0, atol=2**-20)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # of a tied and of an untied head
@pytest.mark.parametrize("stage", ["quantize_rtn", "quantize_gptq"])
def test_the_package_reads_five_bits_of_a_stage_as_the_student_has_them(
    tiny: Tiny, tmp_path: Path, family: str, stage: str
) -> None:
    import gguf

    (tmp_path / "student").mkdir()
    fields = {"bits": 5, "embeddings": {"bits": 5}}
    load_plugin("stages", stage).model_validate(fields).run(tiny(family), tmp_path / "student")
    student = Student(tmp_path / "student")
    stored = _stored_matrices(_export(student.path, tmp_path / "out"))
    assert set(stored) == set(student.facts.matrices())
    for name, (kind, blocks) in stored.items():
        assert student.grids[name] == Grid(5, 32)
        weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q5_0)
        assert kind == gguf.GGMLQuantizationType.Q5_0
        assert np.array_equal(weights, student.read(name))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_float_matrices_are_float16_and_vectors_float32(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import gguf

    student = Student(tiny(family))
    path = _export(tiny(family), tmp_path)
    stored = _stored_matrices(path)
    assert set(stored) == set(student.facts.matrices())
    for name, (kind, blocks) in stored.items():
        assert kind == 1
        assert np.array_equal(blocks.view("<f2"), student.read(name).astype(np.float16))
    vectors = {t.name: t for t in gguf.GGUFReader(path).tensors if len(t.shape) == 1}
    assert {int(t.tensor_type) for t in vectors.values()} == {0}
    gemma = family.startswith("gemma")
    norms = NORMS["gemma" if gemma else "others"]
    if student.facts.qk_norm:
        norms = norms | {f"blk.2.attn_{n}_norm": f"layers.2.self_attn.{n}_norm" for n in "qk"}
    for stem, name in norms.items():
        # llama.cpp multiplies by what is stored, transformers' Gemma by 1 + w.
        used = student.read(f"model.{name}.weight") + np.float32(gemma)
        assert np.array_equal(vectors[f"{stem}.weight"].data, used)
    assert ("rope_freqs.weight" in vectors) == (family == "llama3")
    assert ("output.weight" in GgufFile(path).tensors) == (not student.facts.tied_embeddings)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_metadata_state_the_model_and_the_context_that_is_claimed(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import gguf

    path = _export(tiny(family), tmp_path, context_tokens=100)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    others = {"llama3": "llama", "mistral": "llama", "qwen2_yarn": "qwen2"}
    architecture = others.get(family, family)
    head_dim = FAMILY_CONFIGS[family].get("head_dim", 16)
    assert fields["general.architecture"] == architecture
    stated = {
        "context_length": 100,
        "embedding_length": 64,
        "block_count": Student(tiny(family)).config["num_hidden_layers"],
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 10000.0,
        "vocab_size": 512,
    }
    for key, value in stated.items():
        assert fields[f"{architecture}.{key}"] == value
    assert fields[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["general.file_type"] == 1
    assert fields["general.quantization_version"] == 2
    gemma = family.startswith("gemma")
    assert fields["tokenizer.ggml.model"] == ("llama" if gemma else "gpt2")
    assert fields["tokenizer.ggml.pre"] == ("default" if gemma else "smollm")
    if gemma:
        assert fields[f"{family}.attention.sliding_window"] == 16
        assert fields["tokenizer.ggml.add_space_prefix"] is False
        assert fields["tokenizer.ggml.add_bos_token"] is False  # as the student's tokenizer
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    for key, value in OWN_KEYS.get(family, {}).items():
        assert fields[f"{architecture}.{key}"] == value


def test_a_linear_scaling_of_the_positions_is_stated(tiny: Tiny, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "student"))
    config = read_json(student / "config.json")
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    write_json(student / "config.json", config)
    metadata = GgufFile(_export(student, tmp_path / "out")).metadata
    assert metadata["llama.rope.scaling.type"] == "linear"
    assert metadata["llama.rope.scaling.factor"] == 4.0


@pytest.mark.parametrize(
    ("grid", "file_type"),
    [
        (Grid(8, 32), 7),
        (Grid(5, 32), 8),
        (Grid(4, 32), 2),
        (Grid(4, 32, "integer"), 3),
        (Grid(2, 64), 41),
    ],
    ids=str,
)
def test_weight_bytes_and_file_type_follow_the_grid(
    tiny: Tiny, tmp_path: Path, grid: Grid, file_type: int
) -> None:
    directory = random_grid_student(tiny("llama"), tmp_path / "student", grid)
    path = _export(directory, tmp_path / "out")
    assert GgufFile(path).metadata["general.file_type"] == file_type
    facts = Student(directory).facts
    shapes = facts.tensor_shapes()
    weights = sum(shapes[name][0] * shapes[name][1] for name in facts.matrices())
    bits = {8: 8.5, 5: 5.5, 4: 5.0 if grid.zero == "integer" else 4.5, 2: 2.25}[grid.bits]
    vectors = 4 * (facts.parameters - weights)
    assert Gguf().weight_bytes(path.parent) == weights * bits / 8 + vectors
    assert Gguf().holds(grid)


def test_the_same_student_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(tiny("llama"), tmp_path / "student")
    first = _export(tiny("llama"), tmp_path / "a").read_bytes()
    assert _export(Path(elsewhere), tmp_path / "b").read_bytes() == first


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, 32), Grid(5, 64)], ids=str)
def test_a_grid_without_a_block_layout_is_refused_before_anything_is_written(
    grid: Grid, tiny: Tiny, tmp_path: Path
) -> None:
    assert not Gguf().holds(grid)
    directory = random_grid_student(tiny("llama"), tmp_path / "student", grid)
    with pytest.raises(
        InputError,
        match=rf"int{grid.bits} group {grid.group_size}[\s\S]*hint: grids that fit: int8 group 32",
    ):
        _export(directory, tmp_path / "out")
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_a_context_longer_than_the_models_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context_tokens 257 is more than the model's own 256"):
        _export(tiny("llama"), tmp_path, context_tokens=257)


def _changed(student: Student, dst: Path, name: str, value: Any) -> Path:
    dst.mkdir()
    with StudentWriter(dst, student) as writer:
        for other in student.names():
            writer.write(other, value if other == name else student.read(other))
    return dst


@pytest.mark.parametrize("value", [70000.0, np.nan, -np.inf])
def test_weights_that_float16_cannot_hold_are_refused(
    tiny: Tiny, tmp_path: Path, value: float
) -> None:
    student, name = Student(tiny("llama")), "model.layers.1.mlp.up_proj.weight"
    weights = student.read(name).copy()
    weights[3, 4] = value
    directory = _changed(student, tmp_path / "student", name, weights)
    with pytest.raises(InputError, match=r"up_proj.*float16"):
        _export(directory, tmp_path / "out")


def test_a_matrix_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = _changed(
        Student(tiny("llama")), tmp_path / "student", name, random_tensor(Grid(8, 32), 96, 64)
    )
    with pytest.raises(InputError, match=r"has the shape \(96, 64\), its config asks for"):
        _export(directory, tmp_path / "out")
