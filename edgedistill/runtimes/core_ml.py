"""Core ML on a Mac; elsewhere an interpreter of the saved package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError, UsageError
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.session import Agreement, Logits, Runtime, Session

PACKAGE = "model.mlpackage"
# Finite, so that no runtime makes NaN of it, and in float16's range with any score up to 25e3.
MASKED = np.float16(-4e4)
PREFILL_TOKENS = 256
LOGIT_TOKENS = 256  # rows of logits that lie in memory at once


class Predictor(Protocol):
    """A loaded package with its state: the one difference between a Mac and other machines."""

    context_tokens: int
    vocab_size: int

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Logits:
        """Logits float32 [m, vocab]; the state is changed."""


class CoreMl(Runtime):
    """Runs ``model.mlpackage`` through its state.

    On macOS through Core ML itself (CPU and GPU, its own choice of threads); elsewhere the
    package's program is executed op by op with the package's weights.

    Args:
        precision: of the interpreter: ``float16`` rounds every result as a device stores it,
            ``float32`` rounds nothing and is for diagnosis.  Core ML itself always uses float16.
    """

    extra: ClassVar[str] = "coreml"
    limitation: ClassVar[str | None] = (
        "weights and program proven by an interpreter that rounds every result to float16, "
        "device unproven: no Core ML runtime has executed this package"
        if sys.platform != "darwin"
        else None
    )
    # Both with float16 activations, whatever the weights are.
    float_agreement: ClassVar[Agreement] = Agreement(5e-4, 0.99, "float16", 12)
    quantized_agreement: ClassVar[Agreement] = Agreement(5e-4, 0.99, "float16", 12)

    def __init__(self, precision: Literal["float16", "float32"] = "float16") -> None:
        self.precision = precision

    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> Session:
        """Load ``artifact/model.mlpackage``.

        Args:
            artifact: a directory that the ``coreml`` exporter wrote.
            context_tokens: at most what the package was exported for.
            threads: of the interpreter (for the whole process); Core ML takes what it likes.

        Raises:
            InputError: the package is missing or damaged, or shorter than ``context_tokens``.
            UnavailableError: coremltools is not installed.
        """
        package = artifact / PACKAGE
        if not package.is_dir():
            raise InputError(f"there is no {PACKAGE}", where=str(artifact))
        predictor: Predictor
        if sys.platform == "darwin":
            predictor = _CoreMlPredictor(package)
        else:
            predictor = _InterpreterPredictor(package, self.precision, threads)
        if context_tokens > predictor.context_tokens:
            raise InputError(
                f"context_tokens is {context_tokens}, the package holds {predictor.context_tokens}",
                where=str(package),
                hint="export it for the longer context",
            )
        return CoreMlSession(predictor, context_tokens)

    def settings(self) -> dict[str, str]:
        """The program that computes, and its versions."""
        if sys.platform == "darwin":
            return {"mode": "Core ML, CPU and GPU", "coremltools": _version("coremltools")}
        return {
            "mode": f"interpreter of the package, {self.precision}",
            "coremltools": _version("coremltools"),
            "torch": _version("torch"),
        }


class CoreMlSession(Session):
    """Keeps the position; the keys and values lie in the predictor's state.

    Places of the state beyond ``position`` hold what was rewound: the mask's width hides them.
    """

    def __init__(self, predictor: Predictor, context_tokens: int) -> None:
        self._predictor: Predictor | None = predictor
        self.vocab_size = predictor.vocab_size
        self.context_tokens = context_tokens
        self.position = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """See :class:`Session`; long texts go in chunks."""
        self._check(ids)
        for start in range(0, len(ids), PREFILL_TOKENS):
            chunk = ids[start : start + PREFILL_TOKENS]
            logits = self._append(chunk, [len(chunk) - 1])
        last: Logits = logits[0]
        return last

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """See :class:`Session`."""
        self._check(ids)
        for start in range(0, len(ids), LOGIT_TOKENS):
            chunk = ids[start : start + LOGIT_TOKENS]
            yield self._append(chunk, range(len(chunk)))

    def rewind(self, position: int) -> None:
        """See :class:`Session`."""
        if not 0 <= position <= self.position:
            raise UsageError(
                f"cannot rewind to {position}: {self.position} tokens are in the cache"
            )
        self.position = position

    def close(self) -> None:
        """Drop the model and its state."""
        self._predictor = None

    def _append(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Logits [len(wanted), vocab] at these places of ``ids``."""
        if self._predictor is None:
            raise UsageError("the session is closed")
        end = self.position + len(ids)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.array([ids], dtype=np.int32),
            "causal_mask": causal_mask(self.position, end),
            "logit_positions": np.array(wanted, dtype=np.int32),
        }
        logits = self._predictor.predict(inputs)
        self.position = end
        return logits

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("no tokens were given")
        if self.position + len(ids) > self.context_tokens:
            raise UsageError(
                f"{len(ids)} tokens after {self.position} do not fit into the context of "
                f"{self.context_tokens}"
            )
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise UsageError(f"token {outside[0]} lies outside the vocabulary of {self.vocab_size}")


def causal_mask(start: int, end: int) -> npt.NDArray[np.float16]:
    """float16 [1, 1, end - start, end]: the token at place p looks at 0 .. p."""
    hidden = np.arange(end)[None, :] > np.arange(start, end)[:, None]
    return np.where(hidden, MASKED, np.float16(0))[None, None].astype(np.float16)


class _InterpreterPredictor:
    """The package's program, executed here."""

    def __init__(
        self, package: Path, precision: Literal["float16", "float32"], threads: int
    ) -> None:
        import torch

        from edgedistill.mil_interpreter import Interpreter

        torch.set_num_threads(threads)
        self._interpreter = Interpreter(package, precision=precision)
        self._state = self._interpreter.new_state()
        described = self._interpreter.package
        if set(described.inputs) != {"input_ids", "causal_mask", "logit_positions"}:
            raise InputError(f"takes {sorted(described.inputs)}", where=str(package))
        ids = described.inputs["input_ids"].largest
        if len(ids) != 2 or described.outputs != ("logits",):
            raise InputError(f"gives {described.outputs}, input_ids of {ids}", where=str(package))
        self.context_tokens = ids[1]
        self.vocab_size = self.predict(_probe()).shape[-1]

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Logits:
        found = self._interpreter.run(inputs, self._state)["logits"]
        if found.ndim != 3 or found.shape[:2] != (1, inputs["logit_positions"].size):
            raise InputError(f"gives logits of the shape {found.shape}")
        logits: Logits = found[0]
        return logits


class _CoreMlPredictor:
    """Core ML itself; macOS only."""

    def __init__(self, package: Path) -> None:
        ct = import_coremltools()
        # Not the Neural Engine: it does not take flexible shapes with a state
        # (apple/coremltools #2600), and trying costs minutes.
        self._model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit.CPU_AND_GPU)
        self._state = self._model.make_state()
        ids = next(i for i in self._model.get_spec().description.input if i.name == "input_ids")
        self.context_tokens = int(ids.type.multiArrayType.shapeRange.sizeRanges[1].upperBound)
        self.vocab_size = self.predict(_probe()).shape[-1]

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Logits:
        outputs = self._model.predict(inputs, state=self._state)
        return np.asarray(outputs["logits"][0], dtype=np.float32)


def _probe() -> dict[str, npt.NDArray[Any]]:
    """One token: it tells the size of the vocabulary, and the next prediction overwrites it."""
    return {
        "input_ids": np.zeros((1, 1), dtype=np.int32),
        "causal_mask": causal_mask(0, 1),
        "logit_positions": np.zeros(1, dtype=np.int32),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
