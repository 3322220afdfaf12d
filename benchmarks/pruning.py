"""What dropping blocks of SmolLM2-135M costs, by each way to choose them, and what healing mends.

    python benchmarks/pruning.py --student DIR --work DIR [--layers 4 6] [--heal-tokens 16384]

Chosen on the Python manual (every other one of ``pydoc_data.topics``); the second domain are the
reviews of ``recipes/data/sentiment/suite.jsonl``.  Every result is added to the JSON file as soon
as it is known, and is not repeated when it is there.
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
from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.memory import peak_rss_bytes
from edgedistill.pruning_loss import measure_losses
from edgedistill.pruning_results import PRUNING_FILE, Pruning
from edgedistill.stage import Stage
from edgedistill.stages.heal import Heal
from edgedistill.stages.prune_depth import PruneDepth
from edgedistill.stages.prune_width import PruneWidth

ROOT = Path(__file__).resolve().parents[1]
REVIEWS = ROOT / "recipes" / "data" / "sentiment" / "suite.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "pruning.json"
SEARCH_TOKENS = 1024


def main() -> None:
    """Prune and heal what the results lack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 6])
    parser.add_argument("--heal-tokens", type=int, default=0)
    parser.add_argument("--heal-layers", type=int, default=6)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--trained", choices=["full", "lora", "norms"], default="full")
    parser.add_argument(
        "--width", action="store_true", help="FFN at 3/4 and two KV groups of three"
    )
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    text = manual(work)
    for layers in arguments.layers:
        stage = PruneDepth(
            layers=layers, search_tokens=SEARCH_TOKENS, second=REVIEWS, calibration=text
        )
        prune(f"depth-{layers}", stage, arguments.student, work)
    if arguments.width:
        common: dict[str, Any] = {"importance_tokens": 6144, "held_out_tokens": SEARCH_TOKENS}
        common |= {"second": REVIEWS, "calibration": text}
        prune("ffn-1152", PruneWidth(ffn_share=0.75, **common), arguments.student, work)
        prune("kv-2", PruneWidth(kv_heads=2, **common), arguments.student, work)
    if arguments.heal_tokens:
        stage_fields = {
            "teacher": arguments.student,
            "tokens": arguments.heal_tokens,
            "trained": arguments.trained,
            "learning_rate": arguments.learning_rate,
            "held_out_tokens": SEARCH_TOKENS,
            "batch_tokens": 512,
            "evaluations": 4,
            "calibration": text,
        }
        heal(f"depth-{arguments.heal_layers}", Heal(**stage_fields), arguments.student, work)


def manual(work: Path) -> Calibration:
    """Every other topic of the Python manual, as a calibration text."""
    from pydoc_data.topics import topics

    file = work / "manual.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[::2]), encoding="utf-8")
    return Calibration(file=file)


def prune(name: str, stage: Stage, student: Path, work: Path) -> None:
    """Run a pruning stage into ``work``, and keep what it found."""
    if name in results() and (work / name).exists():
        return
    out = fresh(work / name)
    started = time.monotonic()
    stage.run(student, out)
    found = Pruning.model_validate_json((out / PRUNING_FILE).read_bytes())
    keep(
        name,
        {
            "seconds": round(time.monotonic() - started),
            "peak_rss_bytes": peak_rss_bytes(),
            **found.model_dump(exclude={"tried"}),
        },
    )


def heal(source: str, stage: Heal, student: Path, work: Path) -> None:
    """Heal a pruned student, and measure it as the pruned one was measured."""
    rate = stage.learning_rate or "default"
    name = f"{source}-healed-{stage.trained}-{stage.tokens}-{rate}"
    if name in results():
        return
    out = fresh(work / name)
    started = time.monotonic()
    stage.run(work / source, out)
    seconds = time.monotonic() - started
    healed = Healing.model_validate_json((out / HEALING_FILE).read_bytes())
    from edgedistill.chat import Chat
    from edgedistill.held_out import split_text

    short = stage.calibration.model_copy(update={"tokens": 2 * SEARCH_TOKENS})
    ids = split_text(student, short, Chat(), held_out_tokens=SEARCH_TOKENS).held_out
    losses = measure_losses(student, out, ids, second=REVIEWS, calibration=short, chat=Chat())
    keep(
        name,
        {
            "seconds": round(seconds),
            "peak_rss_bytes": peak_rss_bytes(),
            "losses": [loss.model_dump() for loss in losses],
            **healed.model_dump(),
        },
    )


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
    print(name, json.dumps({k: v for k, v in found.items() if k != "curve"}), flush=True)


if __name__ == "__main__":
    main()
