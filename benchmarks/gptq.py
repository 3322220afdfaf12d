"""What each ingredient of our GPTQ gives, on SmolLM2-135M off its grid.

    python benchmarks/gptq.py --student DIR --work DIR            # all variants, some minutes each
    python benchmarks/gptq.py --student DIR --work DIR --only rtn default

Calibrated on 6,144 tokens of the Python manual (every other of ``pydoc_data.topics``), judged on
the rest of it and on reviews (``recipes/data/sentiment/suite.jsonl``).  Judge and judged are both
``transformers`` in float32, the judged one on dequantized weights: what rounding does, without the
arithmetic of a runtime.  Every variant is written to the results as soon as it is known, and is not
repeated when it is there; one that was killed while it was judged is not quantized again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from judge import SEQUENCE_TOKENS, Judge, by_transformers, off_grid_student, write_texts

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.gptq import GptqSettings
from edgedistill.gptq_student import quantize_student
from edgedistill.grid_choice import MatrixGrids
from edgedistill.memory import peak_rss_bytes
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION_TOKENS, EVALUATION_TOKENS = 6144, 4096

PLAIN = GptqSettings(
    damping=0.01, order="given", clipping="plain", sequential=False, compensation=0.0, polish=0
)
SEQUENTIAL = replace(PLAIN, sequential=True)
ORDERED = replace(SEQUENTIAL, order="groups")
CLIPPED = replace(ORDERED, clipping="conditional")
DAMPED = replace(CLIPPED, damping=0.05)
POLISHED = replace(DAMPED, polish=2)
# Each from the one that it is built on; None is rounding to nearest.
VARIANTS: dict[str, GptqSettings | None] = {
    "rtn": None,
    "plain": PLAIN,
    "sequential": SEQUENTIAL,
    "sequential+columns": replace(SEQUENTIAL, order="columns"),
    "sequential+groups": ORDERED,
    "groups+diagonal": replace(ORDERED, clipping="diagonal"),
    "groups+conditional": CLIPPED,
    "conditional+damping.05": DAMPED,
    "conditional+damping.2": replace(CLIPPED, damping=0.2),
    "damping.05+polish1": replace(DAMPED, polish=1),
    "damping.05+polish2": POLISHED,
    "polish2+compensation.5": replace(POLISHED, compensation=0.5),
    "polish2+compensation1": replace(POLISHED, compensation=1.0),
    "compensation1+damping.3": replace(POLISHED, compensation=1.0, damping=0.3),
    "compensation1+damping1": replace(POLISHED, compensation=1.0, damping=1.0),
    "default": GptqSettings(),
    "default-sequential": replace(GptqSettings(), sequential=False),
}
GRIDS = {
    "int4-g64": MatrixGrids(bits=4, group_size=64, zero="fixed"),
    "int4-g32": MatrixGrids(bits=4, group_size=32, zero="fixed"),
    "int4-g32-integer": MatrixGrids(bits=4, group_size=32, zero="integer"),
    "int3-g64": MatrixGrids(bits=3, group_size=64),
    "int2-g64": MatrixGrids(bits=2),
}


def quantize(
    student: Path, quantized: Path, ids: list[Ids], choice: MatrixGrids, variant: str
) -> dict[str, Any]:
    """Write the student to ``quantized``, if that was not done yet; what it took."""
    took = quantized.with_name(quantized.name + ".json")
    if not took.exists():
        shutil.rmtree(quantized, ignore_errors=True)
        quantized.mkdir()
        settings = VARIANTS[variant]
        wall, processor = time.monotonic(), time.process_time()
        if settings is None:
            QuantizeRtn(**choice.model_dump(exclude_unset=True)).run(student, quantized)
        else:
            source = Student(student)
            facts = source.facts
            quantize_student(
                source,
                quantized,
                ids,
                lambda name: choice.grid_of(name, facts),
                settings,
                label=variant,
            )
        measured = {
            "settings": asdict(settings) if settings else None,
            "seconds": round(time.monotonic() - wall, 1),
            "cpu_seconds": round(time.process_time() - processor, 1),
            "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
        }
        took.write_text(json.dumps(measured), encoding="utf-8")
    return dict(json.loads(took.read_text("utf-8")))


def main() -> None:
    """Measure what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="SmolLM2-135M, a directory")
    parser.add_argument("--work", type=Path, required=True, help="for texts, logits, weights")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--grid", choices=GRIDS, default="int4-g64")
    parser.add_argument("--on-grid", action="store_true", help="the student as it comes")
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    default = ROOT / "benchmarks" / "results" / "gptq.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    student = arguments.student
    if not arguments.on_grid:
        student = off_grid_student(student, arguments.work)
    texts = write_texts(arguments.work)
    calibration = Calibration(file=texts["calibration"], tokens=CALIBRATION_TOKENS)
    ids = calibration_ids(student, calibration, Chat())
    judge = Judge(student, texts, arguments.work, EVALUATION_TOKENS)
    section = f"{arguments.grid}{' on the grid' if arguments.on_grid else ''}"
    for variant in arguments.only:
        found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        results = found.setdefault(section, {})
        if variant in results and not arguments.again:
            continue
        quantized = arguments.work / f"{student.name}.{arguments.grid}.{variant}"
        took = quantize(student, quantized, ids, GRIDS[arguments.grid], variant)
        results[variant] = {**took, **judge.judge(by_transformers(quantized))}
        shutil.rmtree(quantized)
        quantized.with_name(quantized.name + ".json").unlink()
        found["settings"] = {
            "calibration_tokens": CALIBRATION_TOKENS,
            "evaluation_tokens_a_text": EVALUATION_TOKENS,
            "sequence_tokens": SEQUENCE_TOKENS,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        kl = {text: results[variant][text]["kl"] for text in judge.ids}
        print(section, variant, kl, f"{results[variant]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
