"""A compact baseline of the reference on a suite: KL on its prompts without the reference.

For each position where an answer is given, the file holds the reference's ``TOP_TOKENS`` most
probable next tokens with their log-probabilities, the mass of all other tokens, and the token ids
that lead there.  So a later run, another machine or a phone needs nothing but this file and an
artifact's logits; ``baseline_divergence.py`` compares.

Log-probabilities are float32: rounded to float16 they would shift a KL of 1e-5 by tens of
per cent, in both directions, and the bound would not hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.content import sha256_file
from edgedistill.errors import InputError, StageError
from edgedistill.evaluate.prompts import Prompt
from edgedistill.evaluate.score import LogProbs
from edgedistill.safetensors_file import SafetensorsFile

TOP_TOKENS = 32
PREFIX, SUFFIX = "baseline-", ".safetensors"

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BaselineCase:
    """One case of a baseline.

    Attributes:
        id: of the case.
        ids: the token ids of the prompt and, but for its last token, of the right answer.
        tokens: int32 [positions, k], the most probable next tokens, best first, at the last
            ``positions`` of ``ids``: after the prompt, then after each token of the answer.
        log_probs: float32 [positions, k], of those tokens, in nats.
        tail: float32 [positions], the probability of all others together.
    """

    id: str
    ids: tuple[int, ...]
    tokens: Ints
    log_probs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first answer position."""
        return self.ids[: len(self.ids) - len(self.tail) + 1]


@dataclass
class BaselineRecorder:
    """Takes what a reference computes while it scores, in any order, and writes the file.

    Attributes:
        answers: id of each case to record -> index of its right choice, in the order of the file.
        top_tokens: how many tokens of a position are kept.
    """

    answers: Mapping[str, int]
    top_tokens: int = TOP_TOKENS
    _cases: dict[str, list[Any]] = field(default_factory=dict, init=False)

    def add_first(self, prompt: Prompt, log_probs: LogProbs) -> None:
        """What follows a prompt: float64 [vocab], normalized."""
        if prompt.id in self.answers:
            self._cases[prompt.id] = [prompt, [*_compress(log_probs[None], self.top_tokens)]]

    def add_later(self, prompt: Prompt, choice: int, log_probs: LogProbs) -> None:
        """What follows all but the last token of a choice: float64 [tokens - 1, vocab].

        Comes after :meth:`add_first` of the same prompt; only the right choice is kept.
        """
        if self.answers.get(prompt.id) == choice:
            entry = self._cases[prompt.id]
            later = _compress(log_probs, self.top_tokens)
            entry[1] = [np.concatenate(pair) for pair in zip(entry[1], later, strict=True)]

    def write(self, dst: Path) -> Path | None:
        """Write ``baseline-<sha256 of the file>.safetensors`` and return its path.

        None where nothing was recorded.

        Raises:
            StageError: a case was not recorded to its end.
        """
        cases = [self._case(name) for name in self.answers if name in self._cases]
        return write_baseline(cases, dst) if cases else None

    def _case(self, name: str) -> BaselineCase:
        prompt, (tokens, log_probs, tail) = self._cases[name]
        answer = prompt.choices[self.answers[name]]
        if len(tail) != len(answer):
            raise StageError(f"case {name} has {len(tail)} of {len(answer)} answer positions")
        return BaselineCase(name, (*prompt.ids, *answer[:-1]), tokens, log_probs, tail)


def _compress(
    log_probs: LogProbs, count: int
) -> tuple[Ints, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The ``count`` most probable tokens of each row of float64 [n, vocab], and the tail's mass."""
    count = min(count, log_probs.shape[-1])
    top = np.argpartition(-log_probs, count - 1, axis=-1)[:, :count]
    values = np.take_along_axis(log_probs, top, axis=-1)
    best = np.lexsort((top, -values), axis=-1)
    top = np.take_along_axis(top, best, axis=-1)
    # Summed over the others: what 1 leaves would be lost in rounding where the tail is small.
    rest = np.exp(log_probs)
    np.put_along_axis(rest, top, 0.0, axis=-1)
    values = np.take_along_axis(values, best, axis=-1)
    return top.astype(np.int32), values.astype(np.float32), rest.sum(axis=-1).astype(np.float32)


def write_baseline(cases: Sequence[BaselineCase], dst: Path) -> Path:
    """Write cases of one number of tokens a position into ``dst``, named by the file's content.

    Tensors: ``ids`` int32 [all tokens], ``ends`` int32 [cases] where each case's ids end in it,
    ``positions`` int32 [cases], ``tokens`` int32 and ``log_probs`` float32 [all positions, k],
    ``tail`` float32 [all positions], ``case_ids`` uint8: a JSON list in UTF-8.
    """
    from safetensors.numpy import save

    names = json.dumps([case.id for case in cases], ensure_ascii=False).encode()
    lengths = [len(case.ids) for case in cases]
    data = save(
        {
            "case_ids": np.frombuffer(names, dtype=np.uint8),
            "ids": np.array([i for case in cases for i in case.ids], dtype=np.int32),
            "ends": np.cumsum(lengths).astype(np.int32),
            "positions": np.array([len(case.tail) for case in cases], dtype=np.int32),
            "tokens": np.concatenate([case.tokens for case in cases]),
            "log_probs": np.concatenate([case.log_probs for case in cases]),
            "tail": np.concatenate([case.tail for case in cases]),
        }
    )
    path = dst / f"{PREFIX}{hashlib.sha256(data).hexdigest()}{SUFFIX}"
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(data)
    aside.replace(path)
    return path


def read_baseline(path: Path) -> list[BaselineCase]:
    """The cases of a baseline's file, whose name vouches for its content.

    Raises:
        InputError: the file is missing, damaged, not what its name says, or no baseline.
    """
    if path.name != f"{PREFIX}{sha256_file(path)}{SUFFIX}":
        raise InputError(
            "its content is not what its name says",
            where=str(path),
            hint="it was changed or renamed: fetch or write it again",
        )
    file = SafetensorsFile(path)
    try:
        names = json.loads(file.read("case_ids").tobytes())
        parts = {n: file.read(n) for n in ("ids", "ends", "positions", "tokens", "log_probs")}
        return list(_cases(names, tail=file.read("tail"), **parts))
    except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        raise InputError(f"is not a baseline ({error})", where=str(path)) from error


def _cases(
    names: list[str],
    ids: Ints,
    ends: Ints,
    positions: Ints,
    tokens: Ints,
    log_probs: Any,
    tail: Any,
) -> Iterator[BaselineCase]:
    if not names or any(part.ndim != 1 for part in (ids, ends, positions, tail)):
        raise ValueError("it holds no case, or a part has too many dimensions")
    if not (len(names) == len(ends) == len(positions) and int(positions.sum()) == len(tail)):
        raise ValueError("its parts are of different lengths")
    if tokens.shape != log_probs.shape or len(tokens) != len(tail) or tokens.ndim != 2:
        raise ValueError(f"tokens have the shape {tokens.shape}")
    start = row = 0
    for name, end, count in zip(names, ends.tolist(), positions.tolist(), strict=True):
        own = slice(row, row + count)
        if not start < end <= len(ids) or not 0 < count <= end - start:
            raise ValueError(f"case {name!r} has no whole entry")
        yield BaselineCase(
            str(name), tuple(ids[start:end].tolist()), tokens[own], log_probs[own], tail[own]
        )
        start, row = end, own.stop
