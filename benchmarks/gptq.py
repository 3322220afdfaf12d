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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from off_grid import take_off_grid

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.gptq import GptqSettings
from edgedistill.gptq_student import quantize_student
from edgedistill.grid_choice import MatrixGrids
from edgedistill.memory import peak_rss_bytes
from edgedistill.runtimes.torch_reference import load_model
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "recipes" / "data" / "sentiment" / "suite.jsonl"
CALIBRATION_TOKENS, EVALUATION_TOKENS, SEQUENCE_TOKENS = 6144, 4096, 512

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
    "default": GptqSettings(),
    "default-sequential": replace(GptqSettings(), sequential=False),
}
GRIDS = {
    "int4-g64": MatrixGrids(bits=4, group_size=64, zero="fixed"),
    "int4-g32": MatrixGrids(bits=4, group_size=32, zero="fixed"),
    "int4-g32-integer": MatrixGrids(bits=4, group_size=32, zero="integer"),
    "int2-g64": MatrixGrids(bits=2),
}


def write_texts(work: Path) -> dict[str, Path]:
    """Calibration and evaluation texts as files; no paragraph is in two of them.

    Topics quote each other, so topics that differ are not enough.
    """
    from pydoc_data.topics import topics

    def paragraphs(names: list[str]) -> dict[str, str]:
        """Its words -> a paragraph, each once."""
        parts = (part for name in names for part in topics[name].split("\n\n"))
        return {" ".join(part.split()): part for part in parts}

    names = sorted(topics)
    reviews = [
        json.loads(line)["messages"][-1]["content"]
        for line in SUITE.read_text("utf-8").splitlines()
    ]
    seen, unseen = paragraphs(names[::2]), paragraphs(names[1::2])
    texts = {
        "calibration": "\n\n".join(seen.values()),
        "manual": "\n\n".join(text for key, text in unseen.items() if key not in seen),
        "reviews": "\n".join(reviews),
    }
    paths = {}
    for name, text in texts.items():
        paths[name] = work / f"{name}.txt"
        paths[name].write_text(text, encoding="utf-8")
    return paths


class Judge:
    """The float student's log-probabilities on the evaluation texts, kept in files."""

    def __init__(
        self,
        student: Path,
        texts: dict[str, Path],
        work: Path,
        tokens: int = EVALUATION_TOKENS,
    ) -> None:
        def ids(name: str) -> list[Ids]:
            settings = Calibration(file=texts[name], tokens=tokens, sequence_tokens=SEQUENCE_TOKENS)
            return calibration_ids(student, settings, Chat())

        self.ids = {name: ids(name) for name in ("manual", "reviews")}
        self._files = {n: work / f"{n}.{student.name}.{tokens}.logits" for n in self.ids}
        if not all(file.exists() for file in self._files.values()):
            self._run(student)

    def _run(self, student: Path) -> None:
        model = load_model(student, threads=torch.get_num_threads())
        for name, file in self._files.items():
            written = file.with_suffix(".part")
            with written.open("wb") as out:
                for logits in log_probabilities(model, self.ids[name]):
                    out.write(logits.tobytes())
            written.rename(file)

    def judge(self, student: Path) -> dict[str, dict[str, float]]:
        """Mean KL in nats, its 99th percentile, top-1 agreement and perplexities, by text."""
        model = load_model(student, threads=torch.get_num_threads())
        return {name: self._distances(name, model) for name in self.ids}

    def _distances(self, name: str, model: Any) -> dict[str, float]:
        shape = len(self.ids[name]), SEQUENCE_TOKENS, -1
        judged = np.memmap(self._files[name], dtype=np.float32, mode="r").reshape(shape)
        kl, same, losses, own_losses = [], [], [], []
        for ids, p, q in zip(
            self.ids[name], judged, log_probabilities(model, self.ids[name]), strict=True
        ):
            kl.append((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64))
            same.append(p.argmax(axis=1) == q.argmax(axis=1))
            said = np.arange(len(ids) - 1), ids[1:]
            losses.append(-q[said])
            own_losses.append(-p[said])
        every = np.concatenate(kl)
        return {
            "kl": round(float(every.mean()), 4),
            "kl_p99": round(float(np.quantile(every, 0.99)), 3),
            "top1": round(float(np.concatenate(same).mean()), 4),
            "perplexity": round(float(np.exp(np.concatenate(losses).mean())), 3),
            "perplexity_of_student": round(float(np.exp(np.concatenate(own_losses).mean())), 3),
        }


def log_probabilities(model: Any, sequences: list[Ids]) -> Iterator[npt.NDArray[np.float32]]:
    """float32 [tokens, vocab] for each sequence."""
    for ids in sequences:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids)[None]).logits[0]
        yield torch.log_softmax(logits, dim=-1).numpy()


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
        student = arguments.work / "off-grid"
        if not (student / "config.json").exists():
            student.mkdir(exist_ok=True)
            take_off_grid(Student(arguments.student), student)
    texts = write_texts(arguments.work)
    calibration = Calibration(file=texts["calibration"], tokens=CALIBRATION_TOKENS)
    ids = calibration_ids(student, calibration, Chat())
    judge = Judge(student, texts, arguments.work)
    section = f"{arguments.grid}{' on the grid' if arguments.on_grid else ''}"
    for variant in arguments.only:
        found = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        results = found.setdefault(section, {})
        if variant in results and not arguments.again:
            continue
        quantized = arguments.work / f"{student.name}.{arguments.grid}.{variant}"
        took = quantize(student, quantized, ids, GRIDS[arguments.grid], variant)
        results[variant] = {**took, **judge.judge(quantized)}
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
