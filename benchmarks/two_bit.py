"""2 bits, and what recovery gives behind GPTQ, with the curve of what more tokens give.

    python benchmarks/two_bit.py --student DIR --work DIR --tokens 65536
    python benchmarks/two_bit.py --student DIR --work DIR --tokens 65536 --text manual
    python benchmarks/two_bit.py --student DIR --work DIR --tokens 16384 --text own
    python benchmarks/two_bit.py --student DIR --work DIR --tokens 16384 --case int4-scales

SmolLM2-135M, or the student that ``--name`` labels, off its grid.  Calibrated on the Python manual
and reviews in equal parts, on the manual alone, or on it and as much that the student wrote itself;
judged are the rest of the manual and other reviews: every point of the curve on 2,048 tokens a text
by our own float32 decoder, what was written on 10,240 a text by ``transformers``.  A run that was
killed goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from judge import labelled, off_grid_student, write_texts, write_two_domains
from torch import Tensor

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder_forward import DecoderForward
from edgedistill.distill import Distillation
from edgedistill.distill_state import DistillState
from edgedistill.grid_choice import GridChoice, MatrixGrids
from edgedistill.grid_learner import GridLearner
from edgedistill.held_out import other_text
from edgedistill.reference_model import load_reference
from edgedistill.stages.quantize_gptq import QuantizeGptq
from edgedistill.stages.recover import Recover
from edgedistill.student import Student, StudentWriter
from edgedistill.write_text import WritingSettings, write_own_text

ROOT = Path(__file__).resolve().parents[1]
GPTQ_TOKENS, CURVE_TOKENS, FINAL_TOKENS, SEQUENCE_TOKENS = 16384, 2048, 10240, 512
OWN_TOKENS = 24576  # enough for budgets up to 28,000
POINT_TOKENS = 8192  # between two points of the curve of a large budget
COMMON: dict[str, Any] = {"held_out_tokens": 4096, "patience": 1000}
ON_8, ON_4 = GridChoice(bits=8), GridChoice(bits=4, zero="fixed")
CASES: dict[str, tuple[MatrixGrids, Recover]] = {
    "int2": (
        MatrixGrids(bits=2, linears={"v": ON_8, "o": ON_8}, embeddings=ON_4),
        Recover(**COMMON),
    ),
    # Of Gemma 3 270M 63% is the embedding: under 3.6 bits only so.
    "int2-v": (
        MatrixGrids(
            bits=2,
            linears={"v": ON_8},
            embeddings=GridChoice(bits=4, group_size=128, zero="fixed"),
        ),
        Recover(**COMMON),
    ),
    "int2-scales": (MatrixGrids(bits=2), Recover(trained="scales", **COMMON)),
    "int4-scales": (
        MatrixGrids(bits=4, group_size=32, zero="fixed"),
        Recover(trained="scales", **COMMON),
    ),
}
Logits = Callable[[Tensor], Tensor]


def distances(judge: Logits, judged: dict[str, Logits], ids: Tensor) -> dict[str, dict[str, float]]:
    """Mean KL in nats and both perplexities of each, on sequences [count, tokens]."""
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in judged}
    with torch.inference_mode():
        for sequence in ids:
            p, said = judge(sequence[None])[0].log_softmax(-1), sequence[1:, None]
            for name, run in judged.items():
                q = run(sequence[None])[0].log_softmax(-1)
                kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
                losses = [-x[:-1].gather(1, said).sum(dtype=torch.float64) for x in (q, p)]
                totals[name] += torch.stack([kl, *losses])
    predicted = len(ids) * (ids.shape[1] - 1)
    return {
        name: {
            "kl": round(float(kl) / ids.numel(), 4),
            "perplexity": round(math.exp(own / predicted), 2),
            "perplexity_of_student": round(math.exp(its / predicted), 2),
        }
        for name, (kl, own, its) in totals.items()
    }


def transformers_logits(student: Path) -> Logits:
    """The student in ``transformers``, float32, dequantized if it is quantized."""
    model = load_reference(student, threads=torch.get_num_threads())
    return lambda ids: model(ids).logits


class Watched(Distillation):
    """A run that is judged on both texts at each point of its curve.

    Args:
        judged: by name of a text, its sequences.
        stage: whose settings the run has.
        learner: what is trained.
        teacher: what it learns from.
        work: for checkpoints, and the points so far.
    """

    def __init__(
        self,
        judged: dict[str, Tensor],
        stage: Recover,
        learner: GridLearner,
        teacher: Student,
        work: Path,
    ) -> None:
        super().__init__(learner, teacher, stage.settings(), work)
        self._judged = judged
        self._float = DecoderForward(teacher)
        self._file = work / "points.json"
        self._started = time.process_time()
        self.points: list[dict[str, Any]] = []
        if self._file.exists():
            self.points = json.loads(self._file.read_text("utf-8"))

    def _evaluate(self, state: DistillState, *arguments: Any) -> None:
        super()._evaluate(state, *arguments)
        found = {
            name: distances(self._float.logits, {"now": self._student.logits}, ids)["now"]
            for name, ids in self._judged.items()
        }
        took = {"cpu_seconds": round(time.process_time() - self._started)}
        self.points.append({**state.curve[-1].model_dump(), **took, **found})
        self._file.write_text(json.dumps(self.points), encoding="utf-8")
        print(json.dumps(self.points[-1]), flush=True)


def texts_of(student: Path, texts: dict[str, Path], tokens: int) -> dict[str, Tensor]:
    """The sequences that are judged on."""
    settings = Calibration(sequence_tokens=SEQUENCE_TOKENS)
    return {
        name: other_text(student, texts[name], settings, Chat(), tokens=tokens)
        for name in ("manual", "reviews")
    }


def quantize(student: Path, dst: Path, text: Calibration, choice: MatrixGrids) -> None:
    """GPTQ on some of the text, unless it is there."""
    if dst.exists():
        return
    aside = dst.with_name(f"{dst.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    fields = choice.model_dump(exclude_unset=True)
    QuantizeGptq(**fields, calibration=text).run(student, aside)
    aside.rename(dst)


def calibrated_on(name: str, student: Path, work: Path) -> Calibration:
    """What GPTQ reads of a text by its name; recovery reads what lies behind."""
    file, own = write_texts(work)["calibration"], work / "own.jsonl"
    if name == "both":
        file = write_two_domains(work, file)
    if name == "own" and not own.exists():
        settings = WritingSettings(
            tokens=OWN_TOKENS, sequence_tokens=SEQUENCE_TOKENS, threads=torch.get_num_threads()
        )
        write_own_text(student, own, settings)
    return Calibration(
        file=file,
        own_text=own if name == "own" else None,
        tokens=GPTQ_TOKENS,
        sequence_tokens=SEQUENCE_TOKENS,
    )


def recover(
    student: Path,
    quantized: Path,
    dst: Path,
    text: Calibration,
    stage: Recover,
    watched: dict[str, Tensor],
) -> dict[str, Any]:
    """Train as the stage does, judged on the way; what it took and the curve."""
    work = dst.with_name(f"{dst.name}.work")
    work.mkdir(exist_ok=True)
    shutil.rmtree(dst, ignore_errors=True)
    dst.mkdir()
    stage = stage.model_copy(update={"calibration": text})
    source, teacher = Student(quantized), Student(student)
    learner, split = stage.learner(source), stage.split_text(quantized)
    run = Watched(watched, stage, learner, teacher, work)
    state = run.train(split.fitting, split.held_out)
    with StudentWriter(dst, source) as writer:
        for name, value in learner.written():
            writer.write(name, value)
    return {
        "stage": stage.model_dump(mode="json", exclude={"calibration", "chat"}),
        "sequences_of_text": len(split.fitting.ids),
        "kept_step": state.best_step,
        "codes_changed": learner.changed_codes(),
        "codes": learner.codes(),
        "curve": run.points,
    }


def bits_per_weight(student: Student) -> float:
    """Over everything, norms in 16 bits."""
    facts = student.facts
    bits = 0.0
    for name, shape in facts.tensor_shapes().items():
        grid = student.grids.get(name)
        bits += math.prod(shape) * (grid.bits_per_weight if grid else 16)
    return bits / facts.parameters


def measure(case: str, tokens: int, student: Path, work: Path, name: str) -> dict[str, Any]:
    """Quantize and recover on a text with a budget, judge both."""
    texts = write_texts(work)
    choice, stage = CASES[case]
    stage = stage.model_copy(
        update={
            "tokens": tokens,
            "evaluations": max(4, tokens // POINT_TOKENS),
        }
    )
    text = calibrated_on(name, student, work)
    quantized, recovered = (
        work / f"{case}.{name}.{made}" for made in ("gptq", f"recovered-{tokens}")
    )
    quantize(student, quantized, text, choice)
    found = recover(
        student,
        quantized,
        recovered,
        text,
        stage,
        texts_of(student, texts, CURVE_TOKENS),
    )
    judge, judged = transformers_logits(student), texts_of(student, texts, FINAL_TOKENS)
    result: dict[str, Any] = {
        "bits_per_weight": round(bits_per_weight(Student(quantized)), 3),
    }
    models = {"gptq": quantized, "recovered": recovered}
    runs = {name: transformers_logits(path) for name, path in models.items()}
    result |= {text: distances(judge, runs, ids) for text, ids in judged.items()}
    return {**result, "recovery": found}


def main() -> None:
    """Measure what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="a directory")
    parser.add_argument("--name", default="", help="of a student that is not SmolLM2-135M")
    parser.add_argument("--work", type=Path, required=True, help="for texts, weights, checkpoints")
    parser.add_argument("--case", choices=CASES, default="int2")
    parser.add_argument("--text", choices=["manual", "both", "own"], default="both")
    parser.add_argument("--tokens", nargs="+", type=int, required=True, help="budgets, a run each")
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    default = ROOT / "benchmarks" / "results" / "two_bit.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    student = off_grid_student(arguments.student, arguments.work)
    section = labelled(f"{arguments.case}, {arguments.text}", arguments.name)
    for tokens in arguments.tokens:
        found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        runs = found.setdefault(section, {})
        if str(tokens) in runs and not arguments.again:
            continue
        runs[str(tokens)] = measure(arguments.case, tokens, student, arguments.work, arguments.text)
        found["settings"] = {
            "gptq_tokens": GPTQ_TOKENS,
            "evaluation_tokens_a_text": FINAL_TOKENS,
            "evaluation_tokens_a_text_and_point": CURVE_TOKENS,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
