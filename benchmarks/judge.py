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
from torch.nn import functional

from edgedistill.calibration import Calibration, Ids, calibration_ids
from edgedistill.chat import Chat
from edgedistill.errors import UsageError
from edgedistill.reference_model import load_reference
from edgedistill.student import Student

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "recipes" / "data" / "sentiment" / "suite.jsonl"
TRAIN = ROOT / "recipes" / "data" / "sentiment" / "train.jsonl"
SEQUENCE_TOKENS = 512
PASSAGE_CHARACTERS = 1600
POSITIONS = 32
TEXTS = ("manual", "reviews")

LogProbabilities = npt.NDArray[np.float32]
Predict = Callable[[Ids], LogProbabilities]


def off_grid_student(student: Path, work: Path) -> Path:
    """The student off its grid, in ``work``; made where it is not there yet.

    Raises:
        UsageError: that in ``work`` is another student's.
    """
    moved = work / "off-grid"
    if not (moved / "config.json").exists():
        moved.mkdir(exist_ok=True)
        take_off_grid(Student(student), moved)
    if Student(moved).config != Student(student).config:
        raise UsageError(
            "holds another student", where=str(moved), hint="give each student a --work of its own"
        )
    return moved


def labelled(section: str, student: str) -> str:
    """The section of the results of a student; SmolLM2-135M, the first, has no label."""
    return f"{student}: {section}" if student else section


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
    """The float student's log-probabilities on the evaluation texts, made anew from kept states.

    Log-probabilities of all tokens are 10 GB a text where the vocabulary has 262,144; what the
    head reads is a few MB, and the head is run again, a sequence at a time.

    Args:
        student: float.
        texts: file by name, as :func:`write_texts` gives them.
        work: where the states are kept: tokens x hidden x 4 bytes for each text.
        tokens: of each text.
    """

    def __init__(self, student: Path, texts: dict[str, Path], work: Path, tokens: int) -> None:
        def ids(name: str) -> list[Ids]:
            settings = Calibration(file=texts[name], tokens=tokens, sequence_tokens=SEQUENCE_TOKENS)
            return calibration_ids(student, settings, Chat())

        self.ids = {name: ids(name) for name in TEXTS}
        self._files = {
            name: work / f"{name}.{student.name}.{_digest(found)}.states"
            for name, found in self.ids.items()
        }
        if not all(file.exists() for file in self._files.values()):
            self._run(student)
        opened = Student(student)
        self._head = torch.from_numpy(opened.read(opened.facts.head))

    def _run(self, student: Path) -> None:
        model: Any = load_reference(student, threads=torch.get_num_threads())
        for name, file in self._files.items():
            written = file.with_suffix(".part")
            with written.open("wb") as out, torch.inference_mode():
                for ids in self.ids[name]:
                    states = model.model(torch.from_numpy(ids)[None]).last_hidden_state
                    out.write(states[0].numpy().tobytes())
            written.rename(file)

    def judge(self, predict: Predict) -> dict[str, dict[str, float]]:
        """Mean KL in nats, its 99th percentile, top-1 agreement and perplexities, by text.

        Args:
            predict: int64 [tokens] -> natural log-probabilities, float32 [tokens, vocab].
        """
        return {name: self._distances(name, predict) for name in self.ids}

    def _distances(self, name: str, predict: Predict) -> dict[str, float]:
        shape = len(self.ids[name]), SEQUENCE_TOKENS, -1
        judged = np.fromfile(self._files[name], dtype=np.float32).reshape(shape)
        kl, same, losses, own_losses = [], [], [], []
        for ids, states in zip(self.ids[name], judged, strict=True):
            p = log_softmax(functional.linear(torch.from_numpy(states), self._head))
            q = predict(ids)
            kl += [
                (np.exp(a) * (a - b)).sum(axis=1, dtype=np.float64)
                for a, b in zip(_parts(p), _parts(q), strict=True)
            ]
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
    model: Any = load_reference(student, threads=torch.get_num_threads())

    def predict(ids: Ids) -> LogProbabilities:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids)[None]).logits[0]
        return log_softmax(logits)

    return predict


def log_softmax(logits: torch.Tensor) -> LogProbabilities:
    """[tokens, vocab] -> the same, float32."""
    found: LogProbabilities = torch.log_softmax(logits, dim=-1).numpy()
    return found


def _parts(rows: LogProbabilities) -> list[LogProbabilities]:
    """A few rows at a time: what is computed between them is as large again."""
    return np.split(rows, range(POSITIONS, len(rows), POSITIONS))


def _digest(sequences: list[Ids]) -> str:
    return hashlib.sha256(np.stack(sequences).tobytes()).hexdigest()[:8]
