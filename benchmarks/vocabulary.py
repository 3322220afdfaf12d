"""What a smaller vocabulary costs and saves on SmolLM2-135M: bytes, tokens a character, KL.

    python benchmarks/vocabulary.py --student DIR --work DIR [--verify]

The domain is ``recipes/data/sentiment/train.jsonl``, the second one the Python manual (every other
topic of ``pydoc_data.topics``).  With ``--verify`` each rung is quantized to 8 bits, written as
GGUF and held against its own weights and the reference, as a build does it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.pipeline import Pipeline
from edgedistill.plan import ArtifactSteps, plan_build
from edgedistill.pruning_results import PRUNING_FILE, Pruning
from edgedistill.recipe_load import load_recipe
from edgedistill.results import Verification
from edgedistill.stages.prune_vocabulary import PruneVocabulary
from edgedistill.student import Student
from edgedistill.tasks import VERIFICATION_FILE, WEIGHTS_FILE, Weights
from edgedistill.vocabulary_proof import count_tokens

ROOT = Path(__file__).resolve().parents[1]
DOMAIN = ROOT / "recipes" / "data" / "sentiment" / "train.jsonl"
SUITE = DOMAIN.with_name("suite.jsonl")
RESULTS = ROOT / "benchmarks" / "results" / "vocabulary.json"
# Name -> fields: all that the domain uses, and what fits into 16,384.
RUNGS: dict[str, dict[str, int]] = {
    "whole": {},
    "all-used": {"vocab_size": 27072},
    "16k": {"vocab_size": 16384, "least_count": 3},
}


def main() -> None:
    """Prune, and verify if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    manual = write_manual(work)
    if arguments.verify:
        verify(arguments.student, work, manual)
        return
    for name, fields in RUNGS.items():
        if fields:
            prune(name, fields, arguments.student, work, manual)


def write_manual(work: Path) -> Path:
    """Every other topic of the Python manual."""
    from pydoc_data.topics import topics

    file = work / "manual.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[::2]), encoding="utf-8")
    return file


def prune(name: str, fields: dict[str, int], student: Path, work: Path, manual: Path) -> None:
    """Run the stage, and keep what it found."""
    stated = {"second": manual, "calibration": Calibration(file=DOMAIN), **fields}
    stage = PruneVocabulary.model_validate(stated)
    out = work / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.monotonic()
    stage.run(student, out)
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    before, after = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (student, out))
    keep(
        name,
        {
            "seconds": round(time.monotonic() - started, 1),
            "float32_bytes_saved": before - after,
            "suite_tokens": [count_suite(path) for path in (student, out)],
            "tokenizer_bytes": (out / "tokenizer.json").stat().st_size,
            **found.model_dump(),
        },
    )


def count_suite(student: Path) -> int:
    """Tokens of the suite, which are other texts of the domain."""
    rows = Student(student).facts.vocab_size
    return count_tokens(student, (SUITE,), Chat(), rows).tokens


def verify(student: Path, work: Path, manual: Path) -> None:
    """Export every rung with 8 bits to GGUF and verify it."""
    lines = [
        "name: vocabulary",
        f"student: {student}",
        "context_tokens: 256",
        f"calibration: {{file: {DOMAIN}}}",
        "rungs:",
    ]
    for name, fields in RUNGS.items():
        stated = ", ".join(f"{k}: {v}" for k, v in fields.items())
        lines.append(f"  {name}:")
        lines += [f"    - prune_vocabulary: {{{stated}, second: {manual}}}"] if fields else []
        lines.append("    - quantize_rtn: {bits: 8}")
    lines += ["export: [gguf]", "build: {threads: 1}"]
    path = work / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    steps = plan_build(load_recipe(path).recipe, student, machine="any")
    pipeline = Pipeline(work_cache(work))
    pipeline.run([artifact.verify for artifact in steps.artifacts])
    for artifact in steps.artifacts:
        keep(f"{artifact.rung}, gguf, 8 bits", verified(artifact, pipeline))


def work_cache(work: Path) -> Any:
    """A cache of the benchmark's own."""
    from edgedistill.cache import Cache

    return Cache(work / "cache")


def verified(artifact: ArtifactSteps, pipeline: Pipeline) -> dict[str, Any]:
    """Size, distances and failed checks of an artifact."""
    made, checked = pipeline.output(artifact.export), pipeline.output(artifact.verify)
    if made is None or checked is None:
        raise SystemExit(f"{artifact.rung} failed")
    found = Verification.model_validate_json((checked / VERIFICATION_FILE).read_bytes())
    weights = Weights.model_validate_json((made / WEIGHTS_FILE).read_bytes())
    return {
        **weights.model_dump(),
        "artifact_bytes": sum(f.stat().st_size for f in (made / "artifact").iterdir()),
        "failed": [f"{c.name}: {c.detail}" for c in found.checks if not c.passed],
        "checks": len(found.checks),
        "against_weights": {t.text: t.kl_mean for t in found.against_weights},
        "against_reference": {
            t.text: {"kl": t.kl_mean, "top1": t.top1, "removed_mass": t.removed_mass}
            for t in found.against_reference
        },
    }


def keep(name: str, found: dict[str, Any]) -> None:
    """Add a result to the file, and tell it."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    everything = {**known, name: found, "machine": platform.machine()}
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
