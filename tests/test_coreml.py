"""The exporter, judged by coremltools' own readers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill.coreml_attention import rope_tables
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.exporters.coreml import Coreml
from edgedistill.quantized import Grid, ZeroKind
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student, StudentWriter, read_json
from tests.rounded import random_grid_student
from tests.tiny import write_student

Tiny = Callable[[str], Path]
CONTEXT_TOKENS = 100
GRIDS = [
    Grid(2, 64),
    Grid(2, 64, "integer"),
    Grid(3, 32),
    Grid(3, 64),
    Grid(3, 32, "integer"),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(8, 32),
    Grid(8, 32, "integer"),
]


def export(student: Path, dst: Path, context_tokens: int = CONTEXT_TOKENS) -> Path:
    dst.mkdir()
    Coreml().export(Student(student), dst, context_tokens=context_tokens)
    return dst


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of one layer, with all kinds of tensors but q and k norms."""
    return write_student(tmp_path_factory.mktemp("small"), "qwen2", num_hidden_layers=1)


class Saved:
    """A saved package through coremltools' protobuf and its weight reader."""

    def __init__(self, artifact: Path) -> None:
        package = artifact / "model.mlpackage"
        self.spec = import_coremltools().utils.load_spec(str(package))
        storage = import_coremltools("coremltools.libmilstoragepython")
        weights = package / "Data/com.apple.CoreML/weights/weight.bin"
        self._reader = storage._BlobStorageReader(str(weights))
        function = self.spec.mlProgram.functions["main"]
        self.ops = function.block_specializations[function.opset].operations
        self.by_output = {output.name: op for op in self.ops for output in op.outputs}

    def argument(self, op: Any, parameter: str) -> Any:
        [argument] = op.inputs[parameter].arguments
        return argument

    def values(self, value: Any, kind: str) -> npt.NDArray[Any]:
        shape = [d.constant.size for d in value.type.tensorType.dimensions]
        if value.HasField("blobFileValue"):
            flat = getattr(self._reader, f"read_{kind}_data")(value.blobFileValue.offset)
        else:
            flat = np.frombuffer(value.immediateValue.tensor.bytes.values, dtype=kind)
        flat = np.asarray(flat)
        return (flat.view(np.float16) if kind == "fp16" else flat).reshape(shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_scales_and_zeros_are_carried_exactly(
    grid: Grid, small: Path, tmp_path: Path
) -> None:
    assert Coreml().holds(grid)
    student = Student(random_grid_student(small, tmp_path / "student", grid))
    saved = Saved(export(student.path, tmp_path / "out"))
    signed = "int" if grid.zero == "fixed" else "uint"
    for name in student.facts.matrices():
        wanted = student.read_quantized(name)
        op = saved.by_output[name.replace(".", "_")]
        assert op.type == "constexpr_blockwise_shift_scale"
        scales = saved.values(saved.argument(op, "scale").value, "fp16")
        np.testing.assert_array_equal(scales.view(np.uint16), wanted.scales.view(np.uint16))
        if grid.bits in (2, 3):
            table = saved.by_output[saved.argument(op, "data").name]
            lut = saved.values(saved.argument(table, "lut").value, f"{signed}8").reshape(-1)
            codes = saved.values(saved.argument(table, "indices").value, f"uint{grid.bits}")
            fixed = {2: [-1, 0, 1, 2], 3: [-4, -3, -2, -1, 0, 1, 2, 3]}[grid.bits]
            assert lut.tolist() == (fixed if grid.zero == "fixed" else list(range(len(fixed))))
            np.testing.assert_array_equal(codes, wanted.codes)
        else:
            data = saved.values(saved.argument(op, "data").value, f"{signed}{grid.bits}")
            zero = grid.fixed_zero if grid.zero == "fixed" else 0
            np.testing.assert_array_equal(data.astype(int) + zero, wanted.codes)
        if wanted.zeros is None:
            assert "offset" not in op.inputs
        else:
            kind = "uint4" if grid.bits == 4 else "uint8"
            zeros = saved.values(saved.argument(op, "offset").value, kind)
            np.testing.assert_array_equal(zeros, wanted.zeros)


@pytest.mark.parametrize("zero", ["fixed", "integer"])
def test_five_bits_are_refused_before_anything_is_written(
    zero: ZeroKind, small: Path, tmp_path: Path
) -> None:
    grid = Grid(5, 32, zero)
    assert not Coreml().holds(grid)
    student = random_grid_student(small, tmp_path / "student", grid)
    with pytest.raises(InputError, match=r"is on int5 group 32[\s\S]*hint: quantize to 2, 3, 4 or"):
        export(student, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_float_weights_are_the_nearest_float16(tiny: Tiny, tmp_path: Path) -> None:
    student = Student(tiny("qwen3"))
    saved = Saved(export(student.path, tmp_path / "out"))
    for name in student.facts.tensor_shapes():
        value = saved.by_output[name.replace(".", "_")].attributes["val"]
        np.testing.assert_array_equal(
            saved.values(value, "fp16"), student.read(name).astype(np.float16)
        )


def test_norms_of_gemma_are_stored_as_what_multiplies(tiny: Tiny, tmp_path: Path) -> None:
    """1 + w rounded once, behind a half divided by 64: the stream is carried in that scale."""
    student = Student(tiny("gemma3"))
    saved = Saved(export(student.path, tmp_path / "out"))
    behind = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    for name in student.facts.all_norms():
        value = saved.by_output[name.replace(".", "_")].attributes["val"]
        wanted = (1 + student.read(name)) / (64 if name.endswith(behind) else 1)
        np.testing.assert_array_equal(saved.values(value, "fp16"), wanted.astype(np.float16))


@pytest.mark.parametrize(("family", "mode"), [("gemma3", "TANH_APPROXIMATION"), ("llama", None)])
def test_the_activation_is_the_familys(
    family: str, mode: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    """Both kinds of gelu differ by less than what float16 tables do to the logits."""
    saved = Saved(export(tiny(family), tmp_path / "out"))
    gated = [op for op in saved.ops if op.type in ("silu", "gelu")]
    assert len(gated) == 3
    for op in gated:
        assert op.type == ("gelu" if mode else "silu")
        if mode:
            value = saved.by_output[saved.argument(op, "mode").name].attributes["val"]
            assert list(value.immediateValue.tensor.strings.values) == [mode]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tied_matrix_is_stored_once(family: str, tiny: Tiny, tmp_path: Path) -> None:
    student = Student(tiny(family))
    artifact = export(student.path, tmp_path / "out")
    saved = Saved(artifact)
    [lookup] = [op for op in saved.ops if op.outputs and op.outputs[0].name == "embed_gather_1"]
    used = (
        saved.argument(lookup, "x").name,
        saved.argument(saved.by_output["logits"], "weight").name,
    )
    assert (used[0] == used[1]) is student.facts.tied_embeddings
    facts = student.facts
    tables = 2 * CONTEXT_TOKENS * facts.head_dim // 2
    biases = {64, 32, 128, 512}  # of linears that have none: one for each size
    assert facts.heads * facts.head_dim in biases
    assert facts.kv_heads * facts.head_dim in biases
    assert Coreml().weight_bytes(artifact) == 2 * (facts.parameters + tables + sum(biases))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_it_says_that_tensors_take_is_what_it_writes(
    grid: Grid, small: Path, tmp_path: Path
) -> None:
    student = Student(random_grid_student(small, tmp_path / "student", grid))
    matrices = [student.shape(name) for name in student.facts.matrices()]
    said = sum(Coreml().stored_bytes(s, None) - Coreml().stored_bytes(s, grid) for s in matrices)
    # A table of so few values stands in the program, not among the weights.
    tables = (grid.max_code + 1) * len(matrices) if grid.bits in (2, 3) else 0
    plain, written = (
        Coreml().weight_bytes(export(s, tmp_path / name))
        for s, name in ((small, "plain"), (student.path, "out"))
    )
    assert plain - written == said + tables


def test_the_package_is_one_that_coremltools_opens(tiny: Tiny, tmp_path: Path) -> None:
    ct = import_coremltools()
    artifact = export(tiny("llama"), tmp_path / "out")
    model = ct.models.MLModel(str(artifact / "model.mlpackage"), skip_model_load=True)
    assert dict(model.user_defined_metadata)["context_tokens"] == str(CONTEXT_TOKENS)
    description = model.get_spec().description
    assert [i.name for i in description.input] == ["input_ids", "causal_mask", "logit_positions"]
    assert {s.name: list(s.type.stateType.arrayType.shape) for s in description.state} == {
        "key_cache": [3, 1, 2, 128, 16],  # 100 places, rounded up to a multiple of 32
        "value_cache": [3, 1, 2, 128, 16],
    }
    ranges = description.input[1].type.multiArrayType.shapeRange.sizeRanges
    assert [(r.lowerBound, r.upperBound) for r in ranges] == [(1, 1), (1, 1), (1, 100), (1, 100)]
    names = {path.name for path in artifact.iterdir()}
    assert names >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
    }
    assert read_json(artifact / "config.json") == Student(tiny("llama")).config


def test_two_exports_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        artifact = export(small, tmp_path / name)
        files = sorted(path for path in artifact.rglob("*") if path.is_file())
        digests.append([(f.relative_to(artifact), sha256(f.read_bytes()).digest()) for f in files])
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_an_export_says_nothing(tiny: Tiny, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from edgedistill.student import Student; "
        "from edgedistill.exporters.coreml import Coreml; "
        f"Coreml().export(Student(Path({str(tiny('llama'))!r})), Path({str(tmp_path)!r}), "
        "context_tokens=64)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == ""


def test_a_context_beyond_the_students_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="257 is more than the model's own 256"):
        export(tiny("llama"), tmp_path / "out", 257)


@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_a_weight_beyond_float16_is_refused_by_name(
    value: float, small: Path, tmp_path: Path
) -> None:
    student = Student(small)
    (tmp_path / "student").mkdir()
    name = "model.layers.0.mlp.up_proj.weight"
    with StudentWriter(tmp_path / "student", student) as writer:
        for other in student.names():
            values = student.read(other)
            if other == name:
                values[3, 5] = value
            writer.write(other, values)
    with pytest.raises(InputError, match=name):
        export(tmp_path / "student", tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_rotations_hold_at_the_last_of_many_positions(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    directory = write_student(tmp_path / "student", family, max_position_embeddings=8192)
    facts = DecoderFacts.from_config(read_json(directory / "config.json"))
    cos, sin = rope_tables(facts.rope, facts.head_dim, 8192)
    judge = LlamaRotaryEmbedding(AutoConfig.from_pretrained(directory))
    wanted = judge(torch.zeros(1), torch.arange(8192)[None])
    for table, expected in zip((cos, sin), wanted, strict=True):
        half = expected[0, :, : facts.head_dim // 2].numpy()
        assert np.abs(table.astype(np.float32) - half).max() < 1e-3
