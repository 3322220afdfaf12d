"""The ONNX package, read back with onnx's own reader and run by onnxruntime-genai."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from edgedistill.errors import InputError
from edgedistill.exporters.onnx import Onnx
from edgedistill.onnx_package import end_tokens
from edgedistill.quantized import Grid
from edgedistill.stages.quantize_rtn import GridChoice, QuantizeRtn
from edgedistill.student import Student
from tests.tiny import ONNX_FAMILIES, write_student

CONTEXT_TOKENS = 256
GRIDS = [
    Grid(8, 32),
    Grid(8, 16),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(4, 64, "integer"),
    Grid(2, 64),
]


def export(student: Path, dst: Path) -> Path:
    dst.mkdir()
    Onnx().export(Student(student), dst, context_tokens=CONTEXT_TOKENS)
    return dst


def quantize(student: Path, dst: Path, grid: Grid) -> Path:
    dst.mkdir()
    choice = GridChoice(bits=grid.bits, group_size=grid.group_size, zero=grid.zero)
    QuantizeRtn(**choice.model_dump(), embeddings=choice).run(student, dst)
    return dst


def initializers(artifact: Path) -> dict[str, npt.NDArray[Any]]:
    model = onnx.load(artifact / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 [rows, bytes] -> [rows, count], by the words of MatMulNBits: low bits come first."""
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[:, :count, 0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_every_quantized_tensor_comes_back_bit_by_bit(
    tiny: Callable[[str], Path], tmp_path: Path, family: str, grid: Grid
) -> None:
    student = Student(quantize(tiny(family), tmp_path / "q", grid))
    stored = initializers(export(student.path, tmp_path / "o"))
    assert set(student.grids) == set(student.facts.matrices())
    for name in student.grids:
        tensor = student.read_quantized(name)
        rows, columns = tensor.shape
        packed = stored[f"{name}.codes"].reshape(rows, -1)
        assert np.array_equal(unpack(packed, grid.bits, columns), tensor.codes)
        scales = stored[f"{name}.scales"]
        assert scales.dtype == np.float32
        assert np.array_equal(scales.astype(np.float16), tensor.scales)
        assert np.array_equal(scales, tensor.scales.astype(np.float32))
        if f"{name}.zeros" in stored:
            zeros = unpack(stored[f"{name}.zeros"], grid.bits, scales.shape[1])
        else:  # the operator's default
            zeros = np.full(scales.shape, 1 << (grid.bits - 1), dtype=np.uint8)
        assert np.array_equal(zeros, tensor.zero_points())


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_float_tensors_are_stored_exactly(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    student = Student(tiny(family))
    stored = initializers(export(student.path, tmp_path / "o"))
    for name in student.facts.tensor_shapes():
        # Gemma's norms multiply by 1 + w, which is what the operators are given.
        more = np.float32(1 if family.startswith("gemma") and "norm" in name else 0)
        assert stored[name].dtype == np.float32
        assert np.array_equal(stored[name], student.read(name) + more)


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_weight_bytes_are_those_of_the_record_and_a_tied_matrix_counts_once(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    student = Student(quantize(tiny(family), tmp_path / "q", Grid(4, 32, "integer")))
    artifact = export(student.path, tmp_path / "o")
    expected = 0
    for name, shape in student.facts.tensor_shapes().items():
        if name not in student.grids:
            expected += shape[0] * 4
            continue
        rows, groups = shape[0], shape[1] // 32
        expected += rows * groups * (16 + 4) + rows * ((groups + 1) // 2)
    assert Onnx().weight_bytes(artifact) == expected
    tables = 2 * CONTEXT_TOKENS * student.facts.head_dim // 2 * 4
    padding = 64 * len(initializers(artifact))
    assert (artifact / "model.onnx.data").stat().st_size <= expected + tables + padding


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_float_artifact_stores_four_bytes_a_parameter(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    student = Student(tiny(family))
    artifact = export(student.path, tmp_path / "o")
    assert Onnx().weight_bytes(artifact) == 4 * student.facts.parameters


def test_quantized_matrices_ship_with_8_bit_activations(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    q = quantize(tiny("llama"), tmp_path / "q", Grid(4, 32))
    model = onnx.load(export(q, tmp_path / "o") / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    assert len(nodes) == 3 * 7 + 1
    assert levels == {4}


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    student = write_student(
        tmp_path / "s", hidden_size=256, intermediate_size=1024, num_hidden_layers=12
    )
    weights_bytes = 4 * Student(student).facts.parameters
    tracemalloc.start()
    export(student, tmp_path / "o")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest_bytes = 4 * 256 * 1024
    assert weights_bytes > 40 * largest_bytes
    assert peak_bytes < 5 * largest_bytes


def test_two_exports_have_the_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (export(tiny("qwen3"), tmp_path / name) for name in "ab")
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {
        f.name: f.read_bytes() for f in two.iterdir()
    }


@pytest.mark.parametrize(("group_size", "held"), [(16, True), (64, True), (8, False), (48, False)])
def test_groups_are_powers_of_two_from_16(group_size: int, held: bool) -> None:
    assert all(Onnx().holds(Grid(bits, group_size)) == held for bits in (2, 4, 8))
    assert not any(Onnx().holds(Grid(bits, group_size)) for bits in (3, 5))


@pytest.mark.parametrize("grid", [Grid(8, 48), Grid(3, 32), Grid(5, 32)], ids=str)
def test_a_grid_that_the_format_lacks_is_refused(grid: Grid, tmp_path: Path) -> None:
    student = write_student(
        tmp_path / "s", hidden_size=96, intermediate_size=96, num_attention_heads=6
    )
    quantize(student, tmp_path / "q", grid)
    with pytest.raises(InputError, match=rf"int{grid.bits} group[\s\S]*hint: quantize to 2, 4 or"):
        export(tmp_path / "q", tmp_path / "o")


def test_a_context_beyond_the_models_own_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="257 is more than the model's own 256"):
        Onnx().export(Student(tiny("llama")), tmp_path, context_tokens=257)


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(InputError, match=r"mlp\.gate_proj\.weight has the shape"):
        export(student, tmp_path / "o")
    (student / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.3"):
        export(student, tmp_path / "p")


def test_package_carries_tokenizer_template_and_config(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = export(tiny("llama"), tmp_path / "o")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (artifact / name).read_bytes() == (tiny("llama") / name).read_bytes()
    config = json.loads((artifact / "genai_config.json").read_text())
    assert config["model"]["context_length"] == CONTEXT_TOKENS
    assert config["search"]["max_length"] == CONTEXT_TOKENS


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokenizer_of_the_package_cuts_as_the_students_in_both_libraries(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    import onnxruntime_genai
    from tokenizers import Tokenizer

    from edgedistill.verify.strings import HARD_STRINGS

    artifact = export(tiny(family), tmp_path / "o")
    own, shipped = (
        Tokenizer.from_file(str(d / "tokenizer.json")) for d in (tiny(family), artifact)
    )
    genai = onnxruntime_genai.Tokenizer(str(artifact))
    characters, draws = list("".join(HARD_STRINGS)), np.random.default_rng(0)
    noise = ["".join(draws.choice(characters, 40)) for _ in range(50)]
    for text in (*HARD_STRINGS, *noise, " ½ ²", "a 1 2  33 b", " ①", "12,345 7", " a\n\n b"):
        expected = own.encode(text, add_special_tokens=False).ids
        assert shipped.encode(text, add_special_tokens=False).ids == expected
        assert [int(i) for i in genai.encode(text)] == expected


def test_end_tokens_join_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s")  # the tokenizer's eos_token is <|im_end|>, 2
    generation = student / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 0}))
    assert end_tokens(Student(student)) == [0, 2]
    generation.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert end_tokens(Student(student)) == [2, 7]
    generation.unlink()
    assert end_tokens(Student(student)) == [2]


def test_a_student_without_any_end_token_is_refused(tmp_path: Path) -> None:
    student = write_student(tmp_path / "s", eos_token_id=None)
    (student / "generation_config.json").unlink(missing_ok=True)
    (student / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="names no eos_token_id"):
        export(student, tmp_path / "o")


def generate_by_genai(artifact: Path, ids: list[int], length: int) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(artifact))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([ids[:5]], dtype=np.int32))
    generator.append_tokens(np.array([ids[5:]], dtype=np.int32))  # as a second turn of a chat
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_genai_generates_the_tokens_of_transformers(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(0).integers(0, 512, 37).tolist()
    got = generate_by_genai(export(tiny(family), tmp_path / "o"), ids, 80)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    expected = model.generate(torch.tensor([ids]), max_length=80, min_length=80, do_sample=False)[
        0
    ].tolist()
    assert got == expected


def test_genai_stops_at_an_end_token_of_the_generation_config(tmp_path: Path) -> None:
    import onnxruntime_genai as og

    student = write_student(tmp_path / "s")
    ids = [5, 6, 7, 8]
    free = generate_by_genai(export(student, tmp_path / "free"), ids * 2, 30)
    end = free[12]
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    model = og.Model(str(export(student, tmp_path / "o")))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(np.array([ids * 2], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    # genai keeps the end token out of the sequence.
    assert generator.get_sequence(0).tolist() == free[: free.index(end, 8)]


def test_genai_renders_the_chat_template(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    import onnxruntime_genai as og

    tokenizer = og.Tokenizer(str(export(tiny("llama"), tmp_path / "o")))
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
