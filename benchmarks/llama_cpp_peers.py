"""Our GGUF files against llama.cpp's own with an importance matrix, both run by llama.cpp.

    python benchmarks/llama_cpp_peers.py --student DIR --work DIR
    python benchmarks/llama_cpp_peers.py --student DIR --work DIR --only IQ4_XS int4
    python benchmarks/llama_cpp_peers.py --student DIR --work DIR --text both --tokens 65536
    python benchmarks/llama_cpp_peers.py --student DIR --work DIR --name gemma-3-270m

The student, SmolLM2-135M or the one that ``--name`` labels in the results, is taken off its grid
(``benchmarks/off_grid.py`` says where Gemma comes from); all are calibrated on the same ids, of the
Python manual or of the manual and reviews in equal parts.  Every file is judged by what llama.cpp
computes with it (which rounds activations to 8 bits) against the float student by
``transformers``, on the rest of the manual and on reviews.  Results are kept one by one, and what
is known is not measured again; compressed students stay in ``--work`` until they are judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import (
    SEQUENCE_TOKENS,
    Judge,
    LogProbabilities,
    Predict,
    labelled,
    log_softmax,
    off_grid_student,
    write_texts,
    write_two_domains,
)
from llama_cpp_quantizer import importance_matrix, quantize, weights_by_type

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.errors import UsageError
from edgedistill.exporters.gguf import WEIGHTS_FILE, Gguf
from edgedistill.gguf_file import GgufFile
from edgedistill.memory import peak_rss_bytes
from edgedistill.plugins import load_plugin
from edgedistill.runtimes.llama_cpp import LlamaCpp
from edgedistill.student import Student

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "llama_cpp_peers.json"
EVALUATION_TOKENS = 10240

Steps = list[dict[str, dict[str, Any]]]

# Peers, by llama.cpp's names; all with the importance matrix.
PEERS = ("Q4_0", "IQ4_XS", "Q4_K_M")
# Whose bytes a mixture is to take.
MIXED = {"mixed-iq4xs": "IQ4_XS", "mixed-q4km": "Q4_K_M"}
# Ours, as a recipe's rung states them; the calibration is the script's.
OURS: dict[str, Steps] = {
    "int8": [{"quantize_rtn": {"bits": 8}}],
    "int4-rtn": [{"quantize_rtn": {"bits": 4, "zero": "fixed"}}],
    "int4": [{"quantize_gptq": {"bits": 4, "zero": "fixed"}}],
    "int4-embeddings4": [
        {"quantize_gptq": {"bits": 4, "zero": "fixed", "embeddings": {"bits": 4, "zero": "fixed"}}}
    ],
    "int4-embeddings4-integer": [
        {"quantize_gptq": {"bits": 4, "zero": "fixed", "embeddings": {"bits": 4}}}
    ],
    "int4-integer-embeddings4": [{"quantize_gptq": {"bits": 4, "embeddings": {"bits": 4}}}],
    # Tensors alone; some 1.8 MB of tokenizer come on top.  Of another student: as many as the peer.
    "mixed-iq4xs": [{"quantize_mixed": {"size_mb": 89.0, "formats": ["gguf"]}}],
    "mixed-q4km": [{"quantize_mixed": {"size_mb": 103.6, "formats": ["gguf"]}}],
}


def main() -> None:
    """Measure what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="a directory")
    parser.add_argument("--name", default="", help="of a student that is not SmolLM2-135M")
    parser.add_argument("--work", type=Path, required=True, help="for texts, logits, files")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS], default=[*PEERS, *OURS])
    parser.add_argument("--text", choices=["manual", "both"], default="manual")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    student = off_grid_student(arguments.student, arguments.work)
    texts = write_texts(arguments.work)
    file = texts["calibration"]
    if arguments.text == "both":
        file = write_two_domains(arguments.work, file)
    calibration = Calibration(file=file, tokens=arguments.tokens)
    section = labelled(f"{arguments.text}, {arguments.tokens} tokens", arguments.name)
    judge = Judge(student, texts, arguments.work, EVALUATION_TOKENS)
    for name in arguments.only:
        results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
        if name in results.get(section, {}) and not arguments.again:
            continue
        file = arguments.work / f"{name}.gguf"
        steps = None if name in PEERS else steps_of(name, arguments.name, results.get(section, {}))
        took = make(name, student, file, calibration, steps)
        measured = {
            "bytes": file.stat().st_size,
            "tensor_bytes": sum(t.size_bytes for t in GgufFile(file).tensors.values()),
            "weights_by_type": weights_by_type(file),
            **took,
            **judge.judge(by_llama_cpp(file)),
        }
        file.unlink()
        keep(arguments.out, section, name, measured)
        kl = {text: measured[text]["kl"] for text in judge.ids}
        print(name, measured["bytes"], kl, f"{measured['seconds']} s", flush=True)


def steps_of(name: str, student: str, measured: dict[str, Any]) -> Steps:
    """The steps of one of ours.

    Args:
        name: one of ``OURS``.
        student: its label; empty for SmolLM2, whose sizes stand in ``OURS``.
        measured: the results of the same section.

    Raises:
        UsageError: a mixture's peer was not measured yet.
    """
    if name not in MIXED or not student:
        return OURS[name]
    peer = MIXED[name]
    if peer not in measured:
        raise UsageError(f"{name} takes the bytes of {peer}, which is not measured yet")
    size_mb = round(measured[peer]["tensor_bytes"] / 1e6, 2)
    return [{"quantize_mixed": {"size_mb": size_mb, "formats": ["gguf"]}}]


def make(
    name: str, student: Path, file: Path, calibration: Calibration, steps: Steps | None
) -> dict[str, Any]:
    """Write the GGUF file of a peer, which has no steps, or of ours; what that took."""
    wall, processor = time.monotonic(), time.process_time()
    work = file.with_name(f"{name}.{calibration.tokens}")
    continued = work.exists()  # what went before is not in the times
    if steps is None:
        ids = calibration_ids(student, calibration, Chat())
        source = file.with_name("float16.gguf")
        if not source.exists():
            export(student, source)
        quantize(source, file, name, kept_importance(student, ids, file.parent))
    else:
        export(run_steps(student, steps, calibration, work), file)
        shutil.rmtree(work)
    return {
        "steps": steps,
        "continued": continued,
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
    }


def run_steps(student: Path, steps: Steps, calibration: Calibration, work: Path) -> Path:
    """Run the stages of a rung one after the other; the last one's directory, in ``work``."""
    for number, step in enumerate(steps):
        ((name, fields),) = step.items()
        written, aside = work / str(number), work / f"{number}.new"
        if written.exists():  # by a run that was killed
            student = written
            continue
        kind = load_plugin("stages", name)
        given = {"calibration": calibration} if "calibration" in kind.model_fields else {}
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        kind(**(given | fields)).run(student, aside)
        student = aside.rename(written)
    return student


def export(student: Path, file: Path) -> None:
    """Write a student, float or quantized, as a GGUF file by our exporter."""
    directory = file.with_suffix(".artifact")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    source = Student(student)
    Gguf().export(source, directory, context_tokens=source.facts.max_context_tokens)
    (directory / WEIGHTS_FILE).rename(file)
    shutil.rmtree(directory)


def kept_importance(student: Path, ids: list[Ids], work: Path) -> dict[str, Any]:
    """The importance matrix on ``ids``, computed once."""
    digest = hashlib.sha256(np.stack(ids).tobytes()).hexdigest()[:8]
    kept = work / f"importance.{digest}.npz"
    if not kept.exists():
        np.savez(kept, allow_pickle=False, **importance_matrix(Student(student), ids))
    with np.load(kept) as arrays:
        return {name: arrays[name] for name in arrays.files}


def by_llama_cpp(file: Path) -> Predict:
    """A GGUF file on one thread, every sequence with an empty cache."""
    session = LlamaCpp().open(file, context_tokens=SEQUENCE_TOKENS, threads=1)

    def predict(ids: Ids) -> LogProbabilities:
        session.reset()
        chunks = session.stream_logits(ids.tolist())
        return np.concatenate([log_softmax(torch.from_numpy(chunk)) for chunk in chunks])

    return predict


def keep(out: Path, section: str, name: str, measured: dict[str, Any]) -> None:
    """Add a result to the file, and under what settings."""
    results = json.loads(out.read_text("utf-8")) if out.exists() else {}
    results.setdefault(section, {})[name] = measured
    results["settings"] = {
        "evaluation_tokens_a_text": EVALUATION_TOKENS,
        "sequence_tokens": SEQUENCE_TOKENS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **LlamaCpp().settings(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
