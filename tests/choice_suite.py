"""Random suites of the kind ``choice`` with scores of two models, for tests of evaluate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.beside import Beside
from edgedistill.evaluate.compare import compare
from edgedistill.evaluate.score import write_scores
from edgedistill.evaluate.suite import ChoiceCase
from edgedistill.results import Evaluation

Scores = dict[str, npt.NDArray[np.float64]]
CHOICES = ["bad", "fair", "good", "best"]


def make_cases(count: int, seed: int = 0) -> list[ChoiceCase]:
    """Cases in two slices of two thirds and one third, with uneven answers and weights."""
    rng = np.random.default_rng(seed)
    return [
        ChoiceCase.model_validate(
            {
                "id": f"c{seed}-{i:05d}",
                "kind": "choice",
                "messages": ({"role": "user", "content": f"text {i}"},),
                "choices": tuple(CHOICES),
                "answer": int(rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])),
                "slices": ("rare",) if i % 3 == 0 else ("common",),
                "weight": round(float(rng.uniform(0.3, 2.0)), 3),
            }
        )
        for i in range(count)
    ]


def make_scores(cases: list[ChoiceCase], seed: int, skill: float = 1.2) -> Scores:
    """Scores of a model that leans towards the right answer, shifted as sums of tokens are."""
    rng = np.random.default_rng(seed)
    scores = {}
    for case in cases:
        row = rng.normal(0.0, 1.5, len(case.choices)) - 20.0
        row[case.answer] += skill * rng.gamma(2.0, 1.0)
        scores[case.id] = row
    return scores


def disturb(scores: Scores, seed: int, noise: float = 0.4) -> Scores:
    """The scores of an artifact of rounded weights."""
    rng = np.random.default_rng(seed)
    return {name: row + rng.normal(0.0, noise, len(row)) for name, row in scores.items()}


@dataclass
class Disk:
    """A suite and a reference's scores on disk."""

    root: Path
    cases: list[ChoiceCase]

    @classmethod
    def write(cls, root: Path, cases: list[ChoiceCase], reference: Scores) -> Disk:
        lines = [case.model_dump_json(exclude_defaults=True) for case in cases]
        root.mkdir(parents=True, exist_ok=True)
        (root / "suite.jsonl").write_text("\n".join(lines))
        (root / "reference").mkdir()
        write_scores(root / "reference", cases, reference, seconds=1.0)
        return cls(root, cases)

    def evaluate(
        self, artifact: Scores, beside: Beside | None = None, name: str = "artifact"
    ) -> Evaluation:
        """Compare an artifact; its scores and results lie in the directory ``name``."""
        directory = self.root / name
        directory.mkdir(exist_ok=True)
        scored = [case for case in self.cases if case.id in artifact]
        write_scores(directory, scored, artifact, seconds=1.0)
        compare(
            [self.root / "suite.jsonl"],
            self.root / "reference",
            directory,
            floor=None,
            slices={},
            runtime="llama_cpp",
            out=directory / "evaluation.json",
            beside=beside,
        )
        return Evaluation.model_validate(json.loads((directory / "evaluation.json").read_text()))
