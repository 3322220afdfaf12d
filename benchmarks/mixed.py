"""Mixed bits to a target against plain rounding to 4 bits, on a student off its grid.

    python benchmarks/mixed.py --student DIR --work DIR sensitivity      # once, some minutes
    python benchmarks/mixed.py --student DIR --work DIR probe            # is what it says true?
    python benchmarks/mixed.py --student DIR --work DIR rtn rtn-4bit-embedding 3.5bits 105.5mb

SmolLM2-135M, or the student that ``--name`` labels in the results; a --work of its own for each.
Calibrated on the Python manual and on reviews in equal parts (every other topic, and
``recipes/data/sentiment/train.jsonl``), judged on the rest of the manual and on the reviews of the
suite, by ``transformers`` in float32 on dequantized weights.  Bytes are those of all tensors in
the fullest of ``--formats``, as their exporters store them.  Every result is written as soon as it
is known, and is not repeated when it is there.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from judge import (
    ROOT,
    Judge,
    by_transformers,
    labelled,
    off_grid_student,
    write_texts,
    write_two_domains,
)

from edgedistill.allocation import allocate, describe_allocation
from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.decoder_forward import DecoderForward
from edgedistill.estimate import artifact_bytes
from edgedistill.gptq_student import quantize_student
from edgedistill.grid_damage import Damage, SensitivityText, measure_damage
from edgedistill.held_out import Head, mean_kl, run_blocks
from edgedistill.memory import peak_rss_bytes
from edgedistill.mixed_bytes import MixedBytes
from edgedistill.quantized import QTensor
from edgedistill.recipe import StageStep
from edgedistill.stages.quantize_mixed import QuantizeMixed, split_for_sensitivity
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student

RESULTS = ROOT / "benchmarks" / "results" / "mixed.json"
EVALUATION_TOKENS = 10240  # a text
# Block, matrix, bits: early, middle and late, of every kind.
PROBES = (
    (0, "v", 2),
    (1, "o", 2),
    (2, "down", 2),
    (5, "q", 2),
    (10, "gate", 2),
    (14, "down", 2),
    (20, "up", 2),
    (25, "k", 2),
    (29, "down", 2),
    (2, "down", 4),
    (10, "gate", 4),
)
ROUNDED: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4},
    "rtn-fixed": {"bits": 4, "zero": "fixed"},
    "rtn-4bit-embedding": {"bits": 4, "zero": "fixed", "embeddings": {"bits": 4, "zero": "fixed"}},
}
MIXED: dict[str, dict[str, float]] = {
    "3.5bits": {"bits_per_weight": 3.5},
    "4bits": {"bits_per_weight": 4.0},
    "4.5bits": {"bits_per_weight": 4.5},
    "105.5mb": {"size_mb": 103.8},  # the size of Q4_K_M's file, less 1.7 MB of tokenizer
}
STEPS = ("sensitivity", "probe", *ROUNDED, *MIXED)


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    student: Student
    ids: list[Ids]
    formats: tuple[str, ...]
    work: Path

    @property
    def sizes(self) -> MixedBytes:
        """Bytes by matrix and grid."""
        return MixedBytes(self.student.facts, self.formats)

    def damage(self) -> tuple[Damage, dict[tuple[str, int], QTensor], dict[str, float]]:
        """Predicted losses, the probed matrices as they were quantized, and what it took."""
        file = self.work / f"damage.{'-'.join(self.formats)}.pickle"
        if not file.exists():
            wall, processor = time.monotonic(), time.process_time()
            facts, kept = self.student.facts, {}
            probed = {(facts.linears(layer)[s], bits) for layer, s, bits in PROBES}

            def watch(name: str, quantized: QTensor) -> None:
                if (name, quantized.grid.bits) in probed:
                    kept[name, quantized.grid.bits] = quantized

            text = split_for_sensitivity(self.ids)
            found = measure_damage(
                self.student, self.sizes.candidates, text, self.work, watch=watch
            )
            took = {
                "seconds": round(time.monotonic() - wall, 1),
                "cpu_seconds": round(time.process_time() - processor, 1),
                "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
            }
            file.write_bytes(pickle.dumps((found, kept, took)))
        loaded: tuple[Damage, dict[tuple[str, int], QTensor], dict[str, float]]
        loaded = pickle.loads(file.read_bytes())
        return loaded


class _WithOne(DecoderForward):
    """The student with another matrix in one place."""

    def __init__(self, student: Student, name: str, matrix: npt.NDArray[np.float32]) -> None:
        super().__init__(student)
        self._name, self._matrix = name, torch.from_numpy(matrix)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._matrix if name == self._name else super()._tensor(name)


def sensitivity(bench: Bench) -> dict[str, Any]:
    """What it took, and the sums of predicted losses by grid and kind of matrix."""
    damage, _, took = bench.damage()
    kinds: dict[str, dict[str, float]] = {}
    for name, losses in damage.items():
        kind = kinds.setdefault(name.split(".")[-2], {})
        for grid, loss in losses.items():
            kind[str(grid)] = kind.get(str(grid), 0.0) + loss
    return {**took, "loss_by_kind": kinds}


def probe(bench: Bench) -> list[dict[str, Any]]:
    """Predicted and measured KL of the student with one matrix quantized."""
    damage, kept, _ = bench.damage()
    text: SensitivityText = split_for_sensitivity(bench.ids)
    layers, head = range(bench.student.facts.layers), Head(bench.student)
    rows = []
    with torch.no_grad():
        whole = DecoderForward(bench.student)
        own = run_blocks(whole, layers, whole.embed(text.measured))
        for (name, bits), quantized in kept.items():
            other = _WithOne(bench.student, name, quantized.dequantize())
            hidden = run_blocks(other, layers, other.embed(text.measured))
            measured = mean_kl(head.log_probs, own, head.log_probs, hidden)
            predicted = damage[name][quantized.grid]
            rows.append({"tensor": name, "bits": bits, "predicted": predicted, "kl": measured})
            print(rows[-1], flush=True)
    return rows


def rounded(bench: Bench, variant: str, dst: Path) -> dict[str, Any]:
    """Round to nearest; its bytes."""
    stage = QuantizeRtn.model_validate(ROUNDED[variant])
    stage.run(bench.student.path, dst)
    steps = (StageStep.model_construct(name="quantize_rtn", config=stage),)
    facts = bench.student.facts
    total = max(artifact_bytes(facts, steps, name) for name in bench.formats)
    return {"total_bytes": total, "bits_per_weight": round(8 * total / facts.parameters, 3)}


def mixed(bench: Bench, variant: str, dst: Path) -> dict[str, Any]:
    """Allocate and quantize as the stage does, on sensitivities that all variants share."""
    stage = QuantizeMixed.model_validate({**MIXED[variant], "formats": bench.formats})
    facts, (damage, _, _) = bench.student.facts, bench.damage()
    target = stage.target_bytes(facts)
    grids = allocate(bench.sizes, damage, target)
    wall, processor = time.monotonic(), time.process_time()
    quantize_student(bench.student, dst, bench.ids, grids.__getitem__, label=variant)
    allocation = describe_allocation(facts, bench.sizes, damage, grids, target)
    counts: dict[str, int] = {}
    for matrix in allocation.matrices:
        key = f"{matrix.tensor.split('.')[-2]}: {matrix.grid}"
        counts[key] = counts.get(key, 0) + 1
    return {
        "total_bytes": allocation.total_bytes,
        "bits_per_weight": round(allocation.bits_per_weight, 3),
        "predicted_loss": allocation.loss,
        "matrices": counts,
        "gptq_seconds": round(time.monotonic() - wall, 1),
        "gptq_cpu_seconds": round(time.process_time() - processor, 1),
        "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
    }


def measure(bench: Bench, step: str, judge: Judge | None) -> Any:
    """One entry of the results."""
    if judge is None:
        return sensitivity(bench) if step == "sensitivity" else probe(bench)
    dst = bench.work / f"{bench.student.path.name}.{step}"
    shutil.rmtree(dst, ignore_errors=True)
    dst.mkdir()
    took = (rounded if step in ROUNDED else mixed)(bench, step, dst)
    found = {**took, **judge.judge(by_transformers(dst))}
    shutil.rmtree(dst)
    return found


def main() -> None:
    """Measure what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--student", type=Path, required=True, help="a directory")
    parser.add_argument("--name", default="", help="of a student that is not SmolLM2-135M")
    parser.add_argument("--work", type=Path, required=True, help="for texts, logits, weights")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--formats", nargs="+", default=["gguf"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = off_grid_student(arguments.student, arguments.work)
    texts = write_texts(arguments.work)
    calibration = Calibration(
        file=write_two_domains(arguments.work, texts["calibration"]), tokens=arguments.tokens
    )
    ids = calibration_ids(path, calibration, Chat())
    bench = Bench(Student(path), ids, tuple(arguments.formats), arguments.work)
    section = labelled(f"{'+'.join(arguments.formats)}, {arguments.tokens} tokens", arguments.name)
    for step in arguments.steps:
        found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        results = found.setdefault(section, {})
        if step in results:
            continue
        judge = None
        if step in {*ROUNDED, *MIXED}:
            judge = Judge(path, texts, arguments.work, EVALUATION_TOKENS)
        results[step] = measure(bench, step, judge)
        found["evaluation_tokens_a_text"] = EVALUATION_TOKENS
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(section, step, results[step], flush=True)


if __name__ == "__main__":
    main()
