"""A tied embedding on 4 bits, rounded and by GPTQ, with all else as it is.

    python benchmarks/tied_embedding.py --student DIR --work DIR

SmolLM2-135M off its grid (its embedding stays on the Q4_1 grid that it came from, which the grid
here, of fixed zeros, does not hold).  GPTQ reads 8,192 tokens of the manual and of reviews; judged
are 1,024 others of each by our own float32 decoder: the KL of both uses of the matrix, of the head
alone, and of the embedding alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import ROOT, TEXTS, off_grid_student, write_texts, write_two_domains
from torch import Tensor
from torch.nn import functional

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.decoder_forward import DecoderForward
from edgedistill.gptq import GptqSettings
from edgedistill.gptq_head import head_inputs, quantize_head
from edgedistill.gptq_polish import FloatArray
from edgedistill.held_out import Head, mean_kl, run_blocks
from edgedistill.quantized import Grid
from edgedistill.stages.quantize_rtn import round_to_grid
from edgedistill.student import Student

RESULTS = ROOT / "benchmarks" / "results" / "tied_embedding.json"
GRID = Grid(4, 32, "fixed")
CALIBRATION_TOKENS, EVALUATION_TOKENS = 8192, 1024
DAMPINGS = (0.05, 0.5, 2.0)


def read(student: Path, file: Path, tokens: int) -> Tensor:
    """int64 [sequences, tokens] of a text."""
    found = calibration_ids(student, Calibration(file=file, tokens=tokens), Chat())
    return torch.from_numpy(np.stack(found))


class Losses:
    """What a student loses by another matrix in the place of its tied embedding."""

    def __init__(self, student: Student, texts: dict[str, Tensor]) -> None:
        self._student, self._texts = student, texts
        self._forward, self._head = DecoderForward(student), Head(student)
        self._own = {n: self._run(self._forward.embed(ids)) for n, ids in texts.items()}

    def _run(self, hidden: Tensor) -> Tensor:
        return run_blocks(self._forward, range(self._student.facts.layers), hidden)

    def of(self, matrix: FloatArray) -> dict[str, dict[str, float]]:
        """Mean KL in nats by text: of both uses, of the head's, of the embedding's."""
        head, other = self._head.log_probs, Head(self._student, matrix).log_probs
        found = {}
        for name, ids in self._texts.items():
            own = self._own[name]
            embedded = self._run(functional.embedding(ids, torch.from_numpy(matrix)))
            found[name] = {
                "both": mean_kl(head, own, other, embedded),
                "head": mean_kl(head, own, other, own),
                "embedding": mean_kl(head, own, head, embedded),
            }
        return {name: {k: round(v, 4) for k, v in row.items()} for name, row in found.items()}


@torch.no_grad()
def measure(path: Path, texts: dict[str, Path], calibration: Path) -> dict[str, Any]:
    """By rounding, and by GPTQ with each damping."""
    student = Student(path)
    losses = Losses(student, {n: read(path, texts[n], EVALUATION_TOKENS) for n in TEXTS})
    weights = student.read(student.facts.embedding)
    results: dict[str, Any] = {"rounded": losses.of(round_to_grid(weights, GRID).dequantize())}
    inputs = head_inputs(student, read(path, calibration, CALIBRATION_TOKENS))
    for damping in DAMPINGS:
        started = time.process_time()
        quantized = quantize_head(weights, GRID, inputs, GptqSettings(damping=damping))
        took = {"cpu_seconds": round(time.process_time() - started, 1)}
        results[f"gptq, damping {damping}"] = took | losses.of(quantized.dequantize())
    return results


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="SmolLM2-135M, a directory")
    parser.add_argument("--work", type=Path, required=True, help="for texts and weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    student = off_grid_student(arguments.student, arguments.work)
    texts = write_texts(arguments.work)
    results = measure(student, texts, write_two_domains(arguments.work, texts["calibration"]))
    results["settings"] = {
        "grid": str(GRID),
        "calibration_tokens": CALIBRATION_TOKENS,
        "evaluation_tokens_a_text": EVALUATION_TOKENS,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
