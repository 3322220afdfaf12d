"""Texts, and a judge that holds models against the float student: for all quantization benchmarks.

Calibrated on every other topic of the Python manual (``pydoc_data.topics``), or on as much of it
as of training reviews; judged on the rest of it and on reviews
(``recipes/data/sentiment/suite.jsonl``), another domain.  The reference is the float student by
``transformers`` in float32, whoever is judged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from off_grid import take_off_grid

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.runtimes.torch_reference import load_model
from edgedistill.student import Student

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "recipes" / "data" / "sentiment" / "suite.jsonl"
TRAIN = ROOT / "recipes" / "data" / "sentiment" / "train.jsonl"
SEQUENCE_TOKENS = 512
PASSAGE_CHARACTERS = 1600
TEXTS = ("manual", "reviews")

LogProbabilities = npt.NDArray[np.float32]
Predict = Callable[[Ids], LogProbabilities]


def off_grid_student(student: Path, work: Path) -> Path:
    """The student off its grid, in ``work``; made where it is not there yet."""
    moved = work / "off-grid"
    if not (moved / "config.json").exists():
        moved.mkdir(exist_ok=True)
        take_off_grid(Student(student), moved)
    return moved


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


def write_two_domains(work: Path, manual: Path) -> Path:
    """Passages of the manual and of training reviews, as many characters of each.

    Args:
        work: where the file is written.
        manual: the calibration text that :func:`write_texts` wrote.
    """
    lines = TRAIN.read_text("utf-8").splitlines()
    reviews = "\n".join(json.loads(line)["messages"][-1]["content"] for line in lines)
    texts = (manual.read_text("utf-8"), reviews)
    shorter = min(map(len, texts))
    path = work / "two-domains.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            for start in range(0, shorter, PASSAGE_CHARACTERS):
                file.write(json.dumps({"text": text[start : start + PASSAGE_CHARACTERS]}) + "\n")
    return path


class Judge:
    """The float student's log-probabilities on the evaluation texts, kept in files.

    Args:
        student: float.
        texts: file by name, as :func:`write_texts` gives them.
        work: where the files are kept: tokens x vocabulary x 4 bytes for each text.
        tokens: of each text.
    """

    def __init__(self, student: Path, texts: dict[str, Path], work: Path, tokens: int) -> None:
        def ids(name: str) -> list[Ids]:
            settings = Calibration(file=texts[name], tokens=tokens, sequence_tokens=SEQUENCE_TOKENS)
            return calibration_ids(student, settings, Chat())

        self.ids = {name: ids(name) for name in TEXTS}
        self._files = {
            name: work / f"{name}.{student.name}.{_digest(found)}.logits"
            for name, found in self.ids.items()
        }
        if not all(file.exists() for file in self._files.values()):
            self._run(student)

    def _run(self, student: Path) -> None:
        predict = by_transformers(student)
        for name, file in self._files.items():
            written = file.with_suffix(".part")
            with written.open("wb") as out:
                for ids in self.ids[name]:
                    out.write(predict(ids).tobytes())
            written.rename(file)

    def judge(self, predict: Predict) -> dict[str, dict[str, float]]:
        """Mean KL in nats, its 99th percentile, top-1 agreement and perplexities, by text.

        Args:
            predict: int64 [tokens] -> natural log-probabilities, float32 [tokens, vocab].
        """
        return {name: self._distances(name, predict) for name in self.ids}

    def _distances(self, name: str, predict: Predict) -> dict[str, float]:
        shape = len(self.ids[name]), SEQUENCE_TOKENS, -1
        judged = np.memmap(self._files[name], dtype=np.float32, mode="r").reshape(shape)
        kl, same, losses, own_losses = [], [], [], []
        for ids, p in zip(self.ids[name], judged, strict=True):
            q = predict(ids)
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


def by_transformers(student: Path) -> Predict:
    """A student directory, float or quantized, by ``transformers`` in float32."""
    model: Any = load_model(student, threads=torch.get_num_threads())

    def predict(ids: Ids) -> LogProbabilities:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids)[None]).logits[0]
        return log_softmax(logits)

    return predict


def log_softmax(logits: torch.Tensor) -> LogProbabilities:
    """[tokens, vocab] -> the same, float32."""
    found: LogProbabilities = torch.log_softmax(logits, dim=-1).numpy()
    return found


def _digest(sequences: list[Ids]) -> str:
    return hashlib.sha256(np.stack(sequences).tobytes()).hexdigest()[:8]
