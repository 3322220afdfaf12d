"""A production log made of real texts: the demo's training data, with what logs have besides."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[1] / "recipes" / "data" / "sentiment" / "train.jsonl"
CHOICES = ("bad", "poor", "neutral", "good", "great")
START_S = 1_760_000_000


def real_cases(count: int, *, offset: int = 0) -> list[dict[str, Any]]:
    """Cases of the training data, spread over its four sources; other ones for another offset."""
    lines = TRAIN.read_text(encoding="utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    return cases[offset :: len(cases) // count][:count]


def log_rows(count: int, *, repeats: int = 0) -> list[dict[str, Any]]:
    """Requests with answers, times and tags; ``repeats`` of them are said again, unevenly often."""
    rng = random.Random(7)
    rows = [
        {
            "messages": case["messages"],
            "answer": CHOICES[case["answer"]],
            "tags": [case["id"].split("-")[0]],
        }
        for case in real_cases(count)
    ]
    rows += [rows[min(rng.randrange(count), rng.randrange(count))] for _ in range(repeats)]
    rng.shuffle(rows)
    return [row | {"timestamp": START_S + 60 * number} for number, row in enumerate(rows)]


def write_log(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines; a row that is a string is written as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
