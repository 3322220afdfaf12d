"""What healing mends of the demo's student without 4 of its 30 blocks, by each way to train it.

    python benchmarks/healing.py --student DIR --work DIR [NAME ...]

The student is SmolLM2-135M-Instruct as a float32 directory; the demo's adapter is merged into it,
blocks are dropped by ``prune_depth``, and the rest is healed on ``train.jsonl`` of the demo.  All
are then asked the same cases of the suite by ``transformers``.  Without names, everything that the
JSON file lacks is run; every result is added to it as soon as it is known, and a run that was
stopped goes on from its last evaluation.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.pruning_results import PRUNING_FILE, Pruning
from edgedistill.stages.heal import Heal
from edgedistill.stages.merge_lora import MergeLora
from edgedistill.stages.prune_depth import PruneDepth

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "recipes" / "data" / "sentiment"
TRAIN = DATA / "train.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "healing.json"
LAYERS = 4
RECORDED_LINES = 300
SAMPLE = 300  # cases, stratified
CHAT = Chat(system="Rate the sentiment.")
TEXT = Calibration(file=TRAIN, sequence_tokens=256)
COMMON: dict[str, Any] = {
    "tokens": 8192,
    "batch_tokens": 512,
    "held_out_tokens": 1024,
    "evaluations": 2,
    "calibration": TEXT,
    "chat": CHAT,
}
ANSWERS = {"answer_weight": 20.0}
# Text of the demo, with the slices that its suite has; written by `prepare`.
TAILED = "tailed.jsonl"
RUNS: dict[str, dict[str, Any]] = {
    "full-3e-4": {"learning_rate": 3e-4},
    "full-3e-4-answers": {"learning_rate": 3e-4, **ANSWERS},
    "lora-1e-3": {"trained": "lora", "learning_rate": 1e-3},
    "full-1e-3": {"learning_rate": 1e-3},
    "full-1e-4": {"learning_rate": 1e-4},
    "full-3e-4-answers-tail": {"learning_rate": 3e-4, **ANSWERS, "data": TAILED, "tail_power": 0.5},
    "lora-3e-3": {"trained": "lora", "learning_rate": 3e-3},
    "full-3e-4-hidden": {"learning_rate": 3e-4, "hidden_weight": 1.0},
    "recorded-words": {"learning_rate": 3e-4, "recorded": "words.jsonl"},
    "recorded-top": {"learning_rate": 3e-4, "recorded": "top.jsonl"},
}


def main() -> None:
    """Run what was named, or what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then start no other")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(RUNS)}")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    prepare(arguments.student, work)
    for name in arguments.names or RUNS:
        if (
            "accuracy" not in results().get(name, {})
            and time.monotonic() - started < arguments.seconds
        ):
            heal(name, work)


def prepare(student: Path, work: Path) -> None:
    """The reference and the pruned student, and what the suite says of both."""
    if not (work / "reference").exists():
        MergeLora(adapter=DATA / "adapter").run(student, fresh(work / "reference.new"))
        (work / "reference.new").rename(work / "reference")
    if not (work / "pruned").exists():
        stage = PruneDepth(layers=LAYERS, search_tokens=512, calibration=TEXT, chat=CHAT)
        stage.run(work / "reference", fresh(work / "pruned.new"))
        (work / "pruned.new").rename(work / "pruned")
    if not (work / TAILED).exists():
        write_tailed(work / TAILED)
    if "pruned" not in results():
        keep("reference", asked("reference", work))
        found = Pruning.model_validate_json((work / "pruned" / PRUNING_FILE).read_bytes())
        keep("pruned", asked("pruned", work) | {"dropped": found.model_dump(exclude={"tried"})})


def write_tailed(file: Path) -> None:
    """``train.jsonl`` with the slices that can be told from a text."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from sentiment_data import text_slices

    with file.open("w", encoding="utf-8") as out:
        for line in TRAIN.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["slices"] = text_slices(row["messages"][-1]["content"])
            out.write(json.dumps(row) + "\n")


def record(file: Path, work: Path, top_k: int) -> None:
    """The reference's answers to the first lines of ``train.jsonl``."""
    from edgedistill.record_answers import RecordSettings, record_answers

    if not file.exists():
        settings = RecordSettings(CHAT, top_k=top_k, max_tokens=8, lines=RECORDED_LINES, threads=1)
        record_answers(work / "reference", TRAIN, file, settings)


def heal(name: str, work: Path) -> None:
    """Heal the pruned student as a run says, and keep the curve and the suite's figures."""
    fields = COMMON | RUNS[name]
    for key in ("data", "recorded"):
        if key in fields:
            fields[key] = work / fields[key]
    if "recorded" in fields:
        record(fields["recorded"], work, 8 if name == "recorded-top" else 0)
    out, state = work / name, work / f"{name}.state"
    if not (out / HEALING_FILE).exists():  # else it was healed, and stopped before it was asked
        state.mkdir(exist_ok=True)
        stage = Heal(**fields)
        stage.run_beside(work / "pruned", fresh(out), teacher=work / "reference", work=state)
    healed = Healing.model_validate_json((out / HEALING_FILE).read_bytes())
    keep(name, healed.model_dump())
    keep(name, asked(name, work) | healed.model_dump())
    for directory in (out, state):
        shutil.rmtree(directory, ignore_errors=True)


def asked(name: str, work: Path) -> dict[str, Any]:
    """Accuracy, log-score, confidence and what is right of it, on the sample of the suite."""
    from edgedistill.evaluate.calibration import CONFIDENT
    from edgedistill.evaluate.cases import ChoiceCase
    from edgedistill.evaluate.choices import weigh_choices
    from edgedistill.evaluate.prompts import render_prompts
    from edgedistill.evaluate.score import log_probs_of, score_cases
    from edgedistill.evaluate.statistics import cross_entropy
    from edgedistill.evaluate.suite import load_suite, sample_cases
    from edgedistill.runtimes.torch_reference import TorchReference

    loaded = sample_cases(load_suite([DATA / "suite.jsonl"]), SAMPLE)
    cases = [case for case in loaded if isinstance(case, ChoiceCase)]
    student = work / name
    prompts = render_prompts(student, cases, CHAT, context_tokens=2048)
    with TorchReference().open(student, context_tokens=2048, threads=1) as session:
        scores = log_probs_of(score_cases(session, cases, prompts, student, CHAT))
    np.savez(work / f"{name}.npz", **scores)  # type: ignore[arg-type]
    with np.load(work / "reference.npz") as saved:
        reference = {case.id: saved[case.id] for case in cases}
    seen = weigh_choices(cases, reference, scores)
    losses = [cross_entropy(scores[c.id], np.array(c.soft_label)) for c in cases]
    bold = (seen.artifact_confidence >= CONFIDENT) & ~seen.artifact_right
    columns: dict[str, Any] = {
        "accuracy": seen.artifact_right,
        "log_score": losses,
        "confidence": seen.artifact_confidence,
        "confident": seen.artifact_confidence >= CONFIDENT,
        "confident_wrong": bold,
        "kl_to_reference": seen.divergence,
    }
    means = {k: round(float(np.average(v, weights=seen.weights)), 4) for k, v in columns.items()}
    return {"cases": len(cases), **means, "slices": by_slice(cases, seen.weights, columns)}


def by_slice(cases: Any, weights: Any, columns: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy and log-score of each slice."""
    found = {}
    for name in sorted({name for case in cases for name in case.slices}):
        inside = np.array([name in case.slices for case in cases])
        found[name] = {
            key: round(
                float(np.average(np.array(columns[key])[inside], weights=weights[inside])), 4
            )
            for key in ("accuracy", "log_score")
        }
    return found


def fresh(directory: Path) -> Path:
    """An empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def results() -> dict[str, Any]:
    """What was measured so far."""
    if not RESULTS.exists():
        return {}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def keep(name: str, found: dict[str, Any]) -> None:
    """Add a result to the file, and tell it."""
    RESULTS.parent.mkdir(exist_ok=True)
    everything = {**results(), name: found, "machine": platform.machine()}
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    hidden = {"curve", "slices", "dropped"}
    print(name, json.dumps({k: v for k, v in found.items() if k not in hidden}), flush=True)


if __name__ == "__main__":
    main()
