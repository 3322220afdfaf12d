"""The arithmetic of `init` against what exporters write and runtimes allocate.

Files are read by the formats' own libraries, never by the code that stated the sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgedistill.bench.roofline import bytes_per_token
from edgedistill.calibration import Calibration
from edgedistill.decoder import DecoderFacts
from edgedistill.device_facts import DEVICES, find_devices
from edgedistill.errors import UsageError
from edgedistill.fit import FitRow, Load, fit_row
from edgedistill.offered_rungs import RUNGS, able_formats, offer_rungs
from edgedistill.plugins import load_plugin
from edgedistill.student import Student
from tests.tiny import EXPORTS, FAMILY_CONFIGS, HELD

Tiny = Callable[[str], Path]
CONTEXT_TOKENS = 256
LAPTOP = find_devices(["laptop"])


def row_of(facts: DecoderFacts, rung_name: str, format_name: str) -> FitRow:
    rungs, left_out = offer_rungs(facts, [format_name], CONTEXT_TOKENS)
    assert not left_out
    (rung,) = (r for r in rungs if r.name == rung_name)
    return fit_row(Load(facts, CONTEXT_TOKENS), rung, format_name, DEVICES)


def quantized(student: Path, rung_name: str, dst: Path) -> Student:
    """By the rung's first stage, on little text."""
    (rung,) = (r for r in RUNGS if r.name == rung_name)
    ((stage, fields),) = rung.data[0].items()
    own = {"calibration": Calibration(tokens=256, sequence_tokens=64)}
    own = own if "calibration" in load_plugin("stages", stage).model_fields else {}
    dst.mkdir()
    load_plugin("stages", stage).model_validate(fields | own).run(student, dst)
    return Student(dst)


def stored_bytes(artifact: Path, format_name: str) -> int:
    """Bytes of the weights in a file, by the format's own library."""
    if format_name == "gguf":
        import llama_cpp

        # The gguf package does not know blocks of 2 bits; llama.cpp counts what it loads.
        model = llama_cpp.Llama(str(artifact / "model.gguf"), vocab_only=False, verbose=False)
        size = int(llama_cpp.llama_model_size(model.model))
        model.close()
        return size
    if format_name == "onnx":
        import onnx

        graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
        weights = [t for t in graph.initializer if t.name.startswith(("model.", "lm_head."))]
        places = [{entry.key: entry.value for entry in t.external_data} for t in weights]
        # A tied matrix stands there twice, in two shapes over the same bytes.
        return sum({p["offset"]: int(p["length"]) for p in places if p}.values())
    return (artifact / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("rung_name", ["int8", "int4", "int2"])
@pytest.mark.parametrize(("family", "format_name"), EXPORTS)
def test_stated_bytes_are_those_in_the_file(
    tiny: Tiny, tmp_path: Path, family: str, format_name: str, rung_name: str
) -> None:
    student = quantized(tiny(family), rung_name, tmp_path / "student")
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    load_plugin("exporters", format_name)().export(student, artifact, context_tokens=CONTEXT_TOKENS)
    stated = row_of(student.facts, rung_name, format_name).weight_bytes
    found = stored_bytes(artifact, format_name)
    if format_name != "coreml":
        # Divisors of RoPE's frequencies, float32; LongRoPE has two sets.
        sets = {"llama3": 1, "phi4_mini": 2}.get(family, 0) if format_name == "gguf" else 0
        assert found == stated + sets * 4 * student.facts.rotary_dim // 2
        return
    # Beside the weights: the tables of RoPE, and for each blob a header and the padding around it.
    import coremltools

    spec = coremltools.utils.load_spec(str(artifact / "model.mlpackage"))
    blobs = str(spec).count("blobFileValue")
    pairs = 1 if student.facts.sliding_rope is None else 2
    tables = pairs * 2 * CONTEXT_TOKENS * student.facts.rotary_dim // 2 * 2
    assert 0 <= found - stated - tables <= 192 * blobs


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_mixed_bits_meet_their_target_in_the_fullest_format(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    formats, _ = able_formats(facts)
    rungs, _ = offer_rungs(facts, formats, CONTEXT_TOKENS)
    (mixed,) = (r for r in rungs if r.name == "mixed")
    load = Load(facts, CONTEXT_TOKENS)
    bits = [fit_row(load, mixed, name, ()).bits_per_weight for name in formats]
    assert max(bits) == pytest.approx(3.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", HELD["onnx"])
def test_the_cache_of_graphs_is_what_their_inputs_say(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import coremltools
    import onnx

    student = Student(tiny(family))
    load = Load(student.facts, CONTEXT_TOKENS)
    for name in ("onnx", "coreml"):
        (tmp_path / name).mkdir()
        load_plugin("exporters", name)().export(
            student, tmp_path / name, context_tokens=CONTEXT_TOKENS
        )
    graph = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph
    pasts = [i.type.tensor_type for i in graph.input if i.name.startswith("past_key_values.")]
    sizes = (math.prod(d.dim_value for d in t.shape.dim if d.dim_value) for t in pasts)
    assert {t.elem_type for t in pasts} == {onnx.TensorProto.FLOAT}
    assert load.cache_bytes("onnx") == 4 * CONTEXT_TOKENS * sum(sizes)
    spec = coremltools.utils.load_spec(str(tmp_path / "coreml/model.mlpackage"))
    states = [s.type.stateType.arrayType.shape for s in spec.description.state]
    assert load.cache_bytes("coreml") == 2 * sum(map(math.prod, states))


@pytest.mark.slow
@pytest.mark.parametrize("family", HELD["gguf"])
def test_the_cache_of_llama_cpp_is_what_it_says_that_it_allocates(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import ctypes

    import llama_cpp

    student = Student(tiny(family))
    load_plugin("exporters", "gguf")().export(student, tmp_path, context_tokens=CONTEXT_TOKENS)
    said: list[str] = []

    def hear(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        said.append(text.decode())

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    heard = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(heard, ctypes.c_void_p(0))
    try:
        model = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=CONTEXT_TOKENS, verbose=True)
        model.close()
    finally:
        llama_cpp.llama_log_set(before, data)
    sizes = re.findall(r"KV buffer size = +([0-9.]+) MiB", "".join(said))
    assert sizes
    allocated = sum(map(float, sizes)) * 2**20
    stated = Load(student.facts, CONTEXT_TOKENS).cache_bytes("gguf")
    assert stated == pytest.approx(allocated, abs=0.006 * 2**20 * len(sizes))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_token_reads_what_the_roofline_of_the_bench_says(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    row = row_of(facts, "int4", "gguf")
    (rung,) = (r for r in RUNGS if r.name == "int4")
    step = offer_rungs(facts, ["gguf"], CONTEXT_TOKENS)[0][1].steps[0]
    grids = {name: step.config.grids(facts)[0] for name in facts.matrices()}
    bandwidth = LAPTOP[0].bandwidth_gb_per_s * 1e9
    assert rung.name == row.rung
    for depth, rate in (
        (0, row.on["laptop"].most_tok_per_s),
        (CONTEXT_TOKENS, row.on["laptop"].most_tok_per_s_full),
    ):
        expected = bytes_per_token(facts, grids, row.weight_bytes, depth)
        assert bandwidth / rate == pytest.approx(expected, rel=1e-6, abs=4)


def test_what_a_process_holds_fits_or_not(tiny: Tiny) -> None:
    facts = replace(Student(tiny("llama")).facts, max_context_tokens=1 << 24)
    (rung, *_), _ = offer_rungs(facts, ["gguf", "onnx"], CONTEXT_TOKENS)
    short = fit_row(Load(facts, 256), rung, "gguf", DEVICES)
    assert short.on["android-4gb"].fits
    assert "android-4gb" not in fit_row(Load(facts, 256), rung, "coreml", DEVICES).on
    spare = 2_000_000_000 - short.peak_ram_bytes
    assert short.on["android-4gb"].spare_bytes == spare
    # 3 layers, keys and values of 2 heads of 16, float16, for each token of the context.
    most = spare // (3 * 2 * 2 * 16 * 2)
    for tokens, fits in ((most - 2000, True), (most + 2000, False)):
        assert fit_row(Load(facts, tokens), rung, "gguf", DEVICES).on["android-4gb"].fits is fits


def test_bandwidth_is_transfers_times_the_bus() -> None:
    stated = {device.name: device.bandwidth_gb_per_s for device in DEVICES}
    assert stated["iphone-15-pro"] == 51.2
    assert stated["laptop"] == 89.6
    assert stated["raspberry-pi-5"] == pytest.approx(17.1, abs=0.05)
    assert all(device.app_ram_mb < 1000 * device.ram_gb for device in DEVICES)


def test_a_device_that_nobody_knows_is_refused_with_a_hint() -> None:
    assert find_devices([]) == DEVICES
    with pytest.raises(UsageError, match="iphone-15: there are no facts") as caught:
        find_devices(["iphone-15"])
    assert "did you mean" in str(caught.value.hint)


def test_a_rung_that_no_grid_fits_is_left_out_with_the_reason(tiny: Tiny) -> None:
    facts = replace(Student(tiny("llama")).facts, hidden_size=96)
    rungs, left_out = offer_rungs(facts, ["gguf"], CONTEXT_TOKENS)
    assert [rung.name for rung in rungs] == ["int8", "int4"]
    assert "cannot be met" in left_out["mixed"]
    assert "group_size 64 does not divide the 96 columns" in left_out["int2"]
