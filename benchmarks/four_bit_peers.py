"""4 bits in groups of 64, symmetric: our GPTQ against GPTQModel and AutoRound, on the same ids.

    python benchmarks/four_bit_peers.py ours --student DIR --work DIR
    python benchmarks/four_bit_peers.py gptqmodel --student DIR --work DIR --python ENV/bin/python
    python benchmarks/four_bit_peers.py autoround --student DIR --work DIR --python ENV/bin/python

``--text both`` calibrates all on the manual and on reviews in equal parts, not on the manual alone.
Each peer runs in its own environment (see ``gptqmodel_peer.py``, ``autoround_peer.py``) and hands
back the weights that its integers mean; all else stays float32.  Ours also has its embedding on 8
bits.  All are judged by ``transformers`` in float32: rounding alone, without a runtime's
arithmetic.  The student, SmolLM2-135M or the one that ``--name`` labels, is taken off its grid.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import (
    SEQUENCE_TOKENS,
    Judge,
    by_transformers,
    labelled,
    off_grid_student,
    write_texts,
    write_two_domains,
)
from safetensors import safe_open

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.memory import peak_rss_bytes
from edgedistill.stages.quantize_gptq import QuantizeGptq
from edgedistill.student import Student, StudentWriter

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "four_bit_peers.json"
EVALUATION_TOKENS, BITS, GROUP_SIZE = 10240, 4, 64
OURS: dict[str, Any] = {
    "bits": BITS,
    "group_size": GROUP_SIZE,
    "zero": "fixed",
    "embeddings": {"bits": 8},
}
PEERS: dict[str, dict[str, Any]] = {
    "gptqmodel": {
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "act_group_aware": True,
        "damp_percent": 0.05,
    },
    "autoround": {
        "group_size": GROUP_SIZE,
        "sym": True,
        "iters": 200,
        "batch_size": 8,
        "amp": False,
    },
}


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=Path, required=True, help="a directory")
    parser.add_argument("--name", default="", help="of a student that is not SmolLM2-135M")
    parser.add_argument("--work", type=Path, required=True, help="for texts, logits, weights")
    parser.add_argument("who", choices=["ours", *PEERS])
    parser.add_argument("--python", type=Path, help="the interpreter of the peer's environment")
    parser.add_argument("--text", choices=["manual", "both"], default="manual")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--fields", type=json.loads, default={}, help="of the peer, as JSON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.who != "ours" and arguments.python is None:
        parser.error(f"{arguments.who} needs --python")
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    student = off_grid_student(arguments.student, work)
    texts = write_texts(work)
    file = texts["calibration"]
    if arguments.text == "both":
        file = write_two_domains(work, file)
    calibration = Calibration(file=file, tokens=arguments.tokens)
    ids = calibration_ids(student, calibration, Chat())
    quantized = work / f"{arguments.who}.{os.getpid()}"
    quantized.mkdir()
    wall = time.monotonic()
    if arguments.who == "ours":
        fields = OURS
        QuantizeGptq(**OURS, calibration=calibration).run(student, quantized)
    else:
        fields = PEERS[arguments.who] | arguments.fields
        run_peer(arguments.who, arguments.python, student, ids, fields, quantized)
    took = {
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(_cpu_seconds(), 1),
        "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
    }
    judge = Judge(student, texts, work, EVALUATION_TOKENS)
    measured = {
        "calibration_tokens": sum(map(len, ids)),
        "fields": fields,
        **took,
        **judge.judge(by_transformers(quantized)),
    }
    shutil.rmtree(quantized)
    name = arguments.who + (f", {fields['iters']} iterations" if "iters" in fields else "")
    section = labelled(f"{arguments.text}, {arguments.tokens} tokens", arguments.name)
    keep(arguments.out, section, name, measured)


def run_peer(
    peer: str, python: Path, student: Path, ids: list[Ids], fields: dict[str, Any], out: Path
) -> None:
    """Run the peer's script on one thread, and write the student with its weights to ``out``."""
    scratch = out.with_suffix(".peer")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    np.save(scratch / "ids.npy", np.stack(ids))
    command = [str(python), str(HERE / f"{peer}_peer.py"), "--student", str(student)]
    command += ["--ids", str(scratch / "ids.npy"), "--out", str(scratch)]
    command += ["--fields", json.dumps(fields)]
    # The peers' libraries are not ours: nothing of this environment may shadow them.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    subprocess.run(command, check=True, env=kept | offline)
    source = Student(student)
    linears = {name for name in source.facts.matrices() if name.endswith("_proj.weight")}
    with (
        safe_open(scratch / "linears.safetensors", framework="np") as weights,
        StudentWriter(out, source) as writer,
    ):
        if set(weights.keys()) != linears:
            raise SystemExit(f"{peer} gave other matrices: {set(weights.keys()) ^ linears}")
        for name in source.names():
            values = weights.get_tensor(name) if name in linears else source.read(name)
            if name in linears and most_levels(values) > 1 << BITS:
                raise SystemExit(f"{peer}: {name} has groups of {most_levels(values)} levels")
            writer.write(name, values)
    shutil.rmtree(scratch)


def most_levels(weights: np.ndarray[Any, np.dtype[np.float32]]) -> int:
    """The most distinct values in a group of the first 64 rows: what 4 bits cannot hold shows."""
    groups = np.sort(weights[:64].reshape(-1, GROUP_SIZE), axis=1)
    # Products of a code and a scale may differ in their last bits.
    steps = np.diff(groups, axis=1) > 1e-5 * np.abs(groups).max(axis=1, keepdims=True)
    return int(steps.sum(axis=1).max()) + 1


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def keep(out: Path, section: str, name: str, measured: dict[str, Any]) -> None:
    """Add a result to the file, and tell it.

    Args:
        out: the file.
        section: the calibration text, the same for all that are compared.
        name: who was measured.
        measured: what.
    """
    results = json.loads(out.read_text("utf-8")) if out.exists() else {}
    results.setdefault(section, {})[name] = measured
    results["settings"] = {
        "evaluation_tokens_a_text": EVALUATION_TOKENS,
        "sequence_tokens": SEQUENCE_TOKENS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "judge": "transformers, float32",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(name, json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
