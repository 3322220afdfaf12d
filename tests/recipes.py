"""Recipes for tests, written to disk."""

from __future__ import annotations

import json
from pathlib import Path

MINIMAL = """\
name: tiny
student: {student}
context_tokens: 64
rungs:
  float: []
  int8: [quantize_rtn: {{bits: 8}}]
export: [gguf]
"""


def write_recipe(directory: Path, student: Path, text: str = MINIMAL) -> Path:
    """Writes ``recipe.yaml`` into the directory; ``{student}`` in the text is filled in."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "recipe.yaml"
    path.write_text(text.format(student=student), encoding="utf-8")
    return path


def write_suite(path: Path, cases: int = 12) -> Path:
    """A suite of short questions in the slices ``even`` and ``odd``."""
    rows = [
        {
            "id": f"case-{i}",
            "kind": "choice",
            "messages": [{"role": "user", "content": f"The quick brown fox {i}"}],
            "choices": ["good", "bad", "The"],
            "answer": i % 3,
            "slices": ["odd" if i % 2 else "even"],
        }
        for i in range(cases)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
