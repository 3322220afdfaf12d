"""Merging a LoRA adapter: equal to peft's, whole, once, and refused when it does not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgedistill.errors import InputError
from edgedistill.stages.merge_lora import MergeLora
from edgedistill.student import Student
from tests.tiny import FAMILY_CONFIGS

# Those whose modules are others in transformers, and so in their adapters.
FUSED_FAMILIES = ("phi3_sliding", "phi4_mini")
TARGETS = ("q", "k", "v", "o")


def _write_adapter(student: Student, directory: Path, rank: int = 4, **config: Any) -> Path:
    rng = np.random.default_rng(7)
    directory.mkdir()
    tensors = {}
    for layer in range(student.facts.layers):
        for short, name in student.facts.linears(layer).items():
            if short in TARGETS:
                rows, columns = student.shape(name)
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                a, b = rng.normal(0, 0.2, (rank, columns)), rng.normal(0, 0.2, (rows, rank))
                tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": [f"{t}_proj" for t in TARGETS],
        "bias": "none",
        "base_model_name_or_path": "",
    }
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    return directory


def _logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(40)[None]).logits[0]
    return logits


@pytest.mark.parametrize(
    ("family", "rslora"),
    [("llama", True), *((f, False) for f in FAMILY_CONFIGS if f not in FUSED_FAMILIES)],
)
def test_merged_student_equals_pefts_adapted_model(
    tiny: Callable[[str], Path], tmp_path: Path, family: str, rslora: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    student = Student(tiny(family))
    adapter = _write_adapter(student, tmp_path / "adapter", use_rslora=rslora)
    merged = tmp_path / "merged"
    merged.mkdir()
    MergeLora(adapter=adapter).run(student.path, merged)
    base = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        expected = adapted(torch.arange(40)[None]).logits[0]
    assert (expected - _logits(student.path)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(_logits(merged), expected, atol=1e-3, rtol=1e-4)


def _write_fused_adapter(student: Path, directory: Path) -> Path:
    """On every matrix of the blocks as transformers has them, each with a rank of its own."""
    rng = np.random.default_rng(7)
    directory.mkdir()
    tensors: dict[str, Any] = {}
    for name, values in load_file(student / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, shape in (("A", (4, values.shape[1])), ("B", (values.shape[0], 4))):
                drawn = rng.normal(0, 0.2, shape).astype(np.float32)
                tensors[f"{prefix}.lora_{factor}.weight"] = drawn
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in tensors})
    assert modules == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    fields |= {"target_modules": modules, "bias": "none", "base_model_name_or_path": ""}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_an_adapter_of_fused_modules_is_merged_as_peft_adapts_them(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    student = tiny(family)
    stage = MergeLora(adapter=_write_fused_adapter(student, tmp_path / "adapter"))
    assert stage.problems(Student(student).facts, quantized=False) == []
    (merged := tmp_path / "merged").mkdir()
    stage.run(student, merged)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(base, stage.adapter).eval()
        expected = adapted(torch.arange(40)[None]).logits[0]
    assert (expected - _logits(student)).abs().max() > 0.1
    torch.testing.assert_close(_logits(merged), expected, atol=1e-3, rtol=1e-4)


def test_fused_modules_of_another_shape_are_refused_before_any_work(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _write_fused_adapter(tiny("phi3_sliding"), tmp_path / "adapter")
    narrow = dataclasses.replace(Student(tiny("phi3_sliding")).facts, ffn_size=96)
    (problem,) = MergeLora(adapter=adapter).problems(narrow, False)
    assert "gate_up_proj.weight with 256 rows, the student's has 192" in problem
    (problem,) = MergeLora(adapter=adapter).problems(Student(tiny("llama")).facts, False)
    assert "gate_up_proj.weight, which the student does not have" in problem


def test_two_adapters_merge_in_order(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    student = Student(tiny("llama"))
    adapter = _write_adapter(student, tmp_path / "adapter")
    name = student.facts.linears(0)["q"]
    previous = student.path
    for step in ("once", "twice"):
        (tmp_path / step).mkdir()
        MergeLora(adapter=adapter).run(previous, tmp_path / step)
        previous = tmp_path / step
    base, once, twice = (
        Student(p).read(name) for p in (student.path, tmp_path / "once", tmp_path / "twice")
    )
    np.testing.assert_allclose(twice - base, 2 * (once - base), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_a_plain_merge_would_lose_is_refused_by_name(
    tiny: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    student = Student(tiny("llama"))
    adapter = _write_adapter(student, tmp_path / "adapter", **config)
    (problem,) = MergeLora(adapter=adapter).problems(student.facts, quantized=False)
    assert named in problem


def test_an_adapter_of_another_shape_is_refused_before_any_work(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = _write_adapter(Student(tiny("llama3")), tmp_path / "adapter")
    (problem,) = MergeLora(adapter=adapter).problems(Student(tiny("llama")).facts, False)
    assert "k_proj" in problem
    assert "another shape" in problem


def test_an_untrained_adapter_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    student = Student(tiny("llama"))
    adapter = _write_adapter(student, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()}, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="changes no weight"):
        MergeLora(adapter=adapter).run(student.path, tmp_path / "out")


def test_half_a_pair_and_a_missing_file_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    student = Student(tiny("llama"))
    adapter = _write_adapter(student, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if "lora_A" in n))
    save_file(tensors, file)
    assert "half a pair" in MergeLora(adapter=adapter).problems(student.facts, False)[0]
    file.unlink()
    assert "cannot be read" in MergeLora(adapter=adapter).problems(student.facts, False)[0]
