"""Tiny students whose attention and logits are peaked, so that a fault shows; judged and exported.

With plain random weights every key gets nearly the same attention, and a wrong rotation or a lost
cache cell hardly moves the logits.  Here q and k are larger, and magnitudes vary
from one block of weights to the next as they do in trained models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.chat import Chat
from edgedistill.gguf_pretokenizers import pre_tokenizer_named
from edgedistill.plugins import load_plugin
from edgedistill.results import Verification
from edgedistill.stage import Stage
from edgedistill.student import Student, StudentWriter
from edgedistill.verify.artifact import verify_artifact
from edgedistill.verify.judge import write_judge_logits
from edgedistill.verify.texts import load_texts
from tests.tiny import write_student

CONTEXT = 256
THREADS = 1
TEXTS = {name: text[:200] for name, text in load_texts({}).items()}
BLOCK = 32


@dataclass(frozen=True)
class Judged:
    """A student with the judge's log-probabilities on it."""

    student: Path
    judge: Path


@dataclass(frozen=True)
class Good:
    """What a good artifact is made from and held against.

    Attributes:
        rung: the student that is exported.
        reference: the same before quantization.
        base: before the adapter was merged.
    """

    rung: Judged
    reference: Judged
    base: Judged


def peaked_student(dst: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A student of a family of ``tests.tiny``; returns ``dst``."""
    plain = write_student(dst.with_name(f"{dst.name}-plain"), family, seed, **changes)
    rng = np.random.default_rng(seed)
    student = Student(plain)
    facts = student.facts
    dst.mkdir(parents=True)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            values = student.read(name)
            if values.ndim == 2:
                values = _uneven(values, rng)
            if "q_proj" in name or "k_proj" in name:
                values = values * np.float32(1.4)
            elif name == facts.embedding != facts.head:
                # Small beside the blocks' results, so that the epsilon of the first norm counts.
                values = values * np.float32(0.15)
            writer.write(name, values.astype(np.float32))
    _edit_tokenizer(dst, family)
    _add_second_end(dst)
    shutil.rmtree(plain)
    return dst


def adapted(base: Path, dst: Path, seed: int, times: float = 1.0) -> Path:
    """A copy of a student with "the adapter", of rank 4, merged as often as asked."""
    student = Student(base)
    rng = np.random.default_rng(seed)
    dst.mkdir(parents=True)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            values = student.read(name)
            if name.endswith(("q_proj.weight", "up_proj.weight")):
                rows, columns = values.shape
                product = rng.normal(0, 1, (rows, 4)) @ rng.normal(0, 1, (4, columns))
                values = values + np.float32(times * 0.005) * product.astype(np.float32)
            writer.write(name, values)
    return dst


def judged(student: Path, dst: Path) -> Judged:
    """The judge's log-probabilities on a student, in the new directory ``dst``."""
    dst.mkdir(parents=True)
    write_judge_logits(student, TEXTS, dst, chat=Chat(), threads=THREADS, context_tokens=CONTEXT)
    return Judged(student, dst)


def make_good(
    root: Path, family: str, rungs: Mapping[str, Sequence[Stage]], seed: int = 0, **changes: Any
) -> dict[str, Good]:
    """Rung -> what its artifacts are held against; the base and the reference are shared."""
    base = judged(peaked_student(root / "base", family, seed, **changes), root / "judge-base")
    merged = adapted(base.student, root / "reference", seed)
    reference = judged(merged, root / "judge-reference")
    made = {}
    for rung, stages in rungs.items():
        student = merged
        for number, stage in enumerate(stages):
            out = root / f"{rung}-{number}"
            out.mkdir()
            stage.run(student, out)
            student = out
        own = reference if student is merged else judged(student, root / f"judge-{rung}")
        made[rung] = Good(own, reference, base)
    return made


def export(student: Path, dst: Path, format_name: str) -> Path:
    """Export a student into the new directory ``dst``; returns it."""
    dst.mkdir(parents=True)
    load_plugin("exporters", format_name)().export(Student(student), dst, context_tokens=CONTEXT)
    return dst


def verify(good: Good, artifact: Path, format_name: str, *, pruned: bool = False) -> Verification:
    """Hold an artifact against the good student and its judges."""
    return verify_artifact(
        artifact,
        format_name,
        student=good.rung.student,
        weights_judge=good.rung.judge,
        reference_judge=good.reference.judge,
        base_judge=good.base.judge,
        context_tokens=CONTEXT,
        threads=THREADS,
        pruned=pruned,
    )


def _uneven(values: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Each block of a row times a factor of its own, the matrix as large as before."""
    rows, columns = values.shape
    factors = np.exp(rng.normal(0, 0.5, (rows, -(-columns // BLOCK))))
    uneven = values * np.repeat(factors, BLOCK, axis=1)[:, :columns]
    scale = np.sqrt(np.square(values).mean() / np.square(uneven).mean())
    rescaled: npt.NDArray[np.float32] = (uneven * scale).astype(np.float32)
    return rescaled


def _edit_tokenizer(student: Path, family: str) -> None:
    """A merge of two digits: whoever loses the splitting of digits uses it.

    A Qwen gets its own way to cut text, because transformers gives it that in any case.
    """
    path = student / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer["model"].get("byte_fallback"):
        return  # merges digits in any case
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in merges]
    parts = {part for pair in pairs for part in pair}
    # The last token that no other merge is made of gives way.
    free = {left + right for left, right in pairs} - parts
    last = max(free, key=lambda token: int(vocabulary[token]))
    merges[:] = [m for m, (left, right) in zip(merges, pairs, strict=True) if left + right != last]
    merges.append(["1", "2"] if isinstance(merges[0], list) else "1 2")
    vocabulary["12"] = vocabulary.pop(last)
    if family.startswith("qwen"):
        tokenizer["pre_tokenizer"] = pre_tokenizer_named("qwen2", str(path)).structure
        tokenizer["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _add_second_end(student: Path) -> None:
    """Generation ends at the end of a turn or of a text, as in chat models."""
    path = student / "generation_config.json"
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stated | {"bos_token_id": 1, "eos_token_id": [2, 0]}))
