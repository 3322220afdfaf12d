"""How many times as fast one rung decodes as another: exported files, turn by turn.

    python benchmarks/interleaved.py --exports exports/sentiment-135m --rungs int8 pruned

Each round decodes on every rung once, in an order that alternates, so that what else the machine
does falls on all alike; the first round warms up.  A ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from edgedistill.plugins import load_plugin
from edgedistill.session import Session

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {"gguf": "llama_cpp", "onnx": "onnx_runtime"}
PROMPT_TOKENS, DECODED_TOKENS, ROUNDS, CONTEXT_TOKENS = 64, 64, 17, 2048


def decode_rate(session: Session) -> float:
    """Tokens a second behind a prompt; which tokens does not matter."""
    session.reset()
    session.prefill(range(100, 100 + PROMPT_TOKENS))
    started = time.perf_counter()
    for token in range(200, 200 + DECODED_TOKENS):
        session.step(token)
    return DECODED_TOKENS / (time.perf_counter() - started)


def measure(exports: Path, rungs: list[str], format_name: str, threads: int) -> dict[str, Any]:
    """Median rates, and the second rung's over the first's."""
    runtime = load_plugin("runtimes", RUNTIMES[format_name])()
    sessions = {
        rung: runtime.open(
            exports / rung / format_name, context_tokens=CONTEXT_TOKENS, threads=threads
        )
        for rung in rungs
    }
    rounds = []
    for number in range(ROUNDS):
        order = rungs if number % 2 else rungs[::-1]
        rounds.append({rung: decode_rate(sessions[rung]) for rung in order})
    for session in sessions.values():
        session.close()
    ratios = [found[rungs[1]] / found[rungs[0]] for found in rounds[1:]]
    return {
        "decode_tok_per_s": {
            rung: round(statistics.median(found[rung] for found in rounds[1:]), 1) for rung in rungs
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Measure in both runtimes, for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--exports", type=Path, required=True, help="of a build")
    parser.add_argument("--rungs", nargs=2, required=True)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    default = ROOT / "benchmarks" / "results" / "interleaved.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    found = {
        f"{name}, threads {threads}": measure(arguments.exports, arguments.rungs, name, threads)
        for name in RUNTIMES
        for threads in arguments.threads
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
