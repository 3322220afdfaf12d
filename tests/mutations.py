"""Planting tools: a fault goes into a good artifact, nothing else in it changes.

A fault is planted in the artifact's own bytes, or in what the exporter is given, as a faulty
exporter would; always before anything is hashed, so that no check of hashes can help.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.student import Student, dequantize_student
from tests.artifact_tensors import FORMATS, StudentTensors, Tensors
from tests.peaked import TEXTS, Good, export

Edit = Callable[[Tensors], None]
Remake = Callable[[Good, Path], Path]  # the good student -> a faulty one, in a new directory
Plant = Callable[[Good, Path, Path], Path]  # good artifact, new directory -> the faulty artifact
Distance = Callable[[Good], float]

LOGITS = "logits: mean KL"
ALL = ("gguf", "onnx", "coreml")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: what went wrong, in words.
        caught_by: the checks that are meant for it, by name; all of them have to fail.
        plants: format -> how it is planted there.
        distance: what it does to the model, in nats a token, by ``transformers`` alone; None where
            the model stays as it is (tokenizer, template, files).
        good: family and rung of the artifact that it is planted in.
    """

    name: str
    caught_by: tuple[str, ...]
    plants: Mapping[str, Plant]
    distance: Distance | None = None
    good: str = "llama/float"


def fault_in_weights(name: str, edit: Edit, *caught_by: str, good: str = "llama/float") -> Fault:
    """The same change of tensors in the bytes of all three formats."""
    return Fault(
        name, caught_by or (LOGITS,), {f: in_tensors(f, edit) for f in ALL}, edited(edit), good
    )


def fault_in_input(name: str, remake: Remake, *caught_by: str, good: str = "llama/float") -> Fault:
    """Another student than the one that is claimed was exported, in all three formats."""

    def plant(format_name: str) -> Plant:
        def run(good: Good, _artifact: Path, dst: Path) -> Path:
            with tempfile.TemporaryDirectory() as scratch:
                return export(remake(good, Path(scratch) / "student"), dst, format_name)

        return run

    return Fault(name, caught_by or (LOGITS,), {f: plant(f) for f in ALL}, remade(remake), good)


def in_tensors(format_name: str, edit: Edit) -> Plant:
    """Change tensors in the artifact's own bytes."""

    def run(good: Good, artifact: Path, dst: Path) -> Path:
        shutil.copytree(artifact, dst)
        edit(FORMATS[format_name](dst, Student(good.rung.student).facts))
        return dst

    return run


def in_file(change: Callable[[Path], None]) -> Plant:
    """Change a file of the artifact."""

    def run(_good: Good, artifact: Path, dst: Path) -> Path:
        shutil.copytree(artifact, dst)
        change(dst)
        return dst

    return run


def in_json(name: str, change: Callable[[Any], None]) -> Plant:
    """Change a JSON file of the artifact."""

    def run(artifact: Path) -> None:
        path = artifact / name
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    return in_file(run)


def with_edit(edit: Callable[[StudentTensors], None]) -> Remake:
    """The good student with its tensors changed."""

    def run(good: Good, dst: Path) -> Path:
        tensors = StudentTensors(good.rung.student)
        edit(tensors)
        return tensors.write(dst)

    return run


def with_config(**fields: Any) -> Remake:
    """The good student with another config."""

    def run(good: Good, dst: Path) -> Path:
        shutil.copytree(good.rung.student, dst)
        config = json.loads((dst / "config.json").read_text())
        (dst / "config.json").write_text(json.dumps(config | fields))
        return dst

    return run


def edited(edit: Edit) -> Distance:
    """How far a change of tensors moves the model."""
    return remade(with_edit(edit))


def remade(remake: Remake) -> Distance:
    """How far another student is from the good one."""

    def run(good: Good) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            return distance(good.rung.student, remake(good, Path(scratch) / "student"))

    return run


def distance(student: Path, faulty: Path) -> float:
    """Mean KL(student || faulty) in nats a token over the texts, by ``transformers`` alone."""
    import torch

    kl = []
    for ids, wanted in judge_logits(student):
        found = _logits(load_model(faulty), ids)
        kl.append(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none"))
    return float(torch.cat(kl).sum(-1).mean())


@cache
def judge_logits(student: Path) -> list[tuple[Any, Any]]:
    """(ids, log-probabilities) of each text, as ``transformers`` reads it."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(student), load_model(student)
    ids = [torch.tensor([tokenizer(text).input_ids[:200]]) for text in TEXTS.values()]
    return [(each, _logits(model, each)) for each in ids]


def distance_after_cache(student: Path, *, lost: int, shift: int) -> float:
    """Mean KL between steps on a whole cache, and on one that lost its end.

    Args:
        student: opened by ``transformers``.
        lost: tokens that are missing at the end of the cache.
        shift: what is added to the positions of the tokens that follow.
    """
    import torch
    from transformers import DynamicCache

    model = load_model(student)
    kl = []
    for ids, wanted in judge_logits(student):
        held = ids.shape[1] // 2
        cache_, rest = DynamicCache(), ids[:, held:]
        with torch.inference_mode():
            model(ids[:, :held], past_key_values=cache_)
            if lost:
                cache_.crop(-lost)
            positions = torch.arange(held, ids.shape[1])[None] + shift
            logits = model(rest, past_key_values=cache_, position_ids=positions).logits[0]
        found = torch.log_softmax(logits.double(), -1)
        kl.append(
            torch.nn.functional.kl_div(found, wanted[held:], log_target=True, reduction="none")
        )
    return float(torch.cat(kl).sum(-1).mean())


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[0].double(), -1)


def load_model(student: Path) -> Any:
    """The student in ``transformers``, float32, dequantized where it is quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        readable = student
        if (student / "grids.json").exists():
            readable = Path(scratch)
            dequantize_student(student, readable)
        return AutoModelForCausalLM.from_pretrained(readable, dtype=torch.float32).eval()


def misread_as_float16(values: np.ndarray) -> np.ndarray:
    """bfloat16 numbers whose bits are taken for float16."""
    halves = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.nan_to_num(halves.view(np.float16))
