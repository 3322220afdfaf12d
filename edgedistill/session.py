"""The one contract of all runtimes: a session that holds a model and its cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from edgedistill.errors import UsageError
from edgedistill.text_program import ShippedText, TextProgram

Logits = npt.NDArray[np.float32]


class Session(ABC):
    """A loaded artifact with the cache of the tokens that it has seen.

    ``position`` counts the tokens in the cache.  Every call appends to them; :meth:`rewind` takes
    tokens back.  One session serves one thread.
    """

    vocab_size: int
    context_tokens: int
    position: int

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append ``ids`` (at least one) and return the logits after the last: float32 [vocab].

        Raises:
            UsageError: the tokens do not fit into ``context_tokens``.
        """

    @abstractmethod
    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append ``ids`` and yield the logits after each, in order, in chunks: float32 [n, vocab].

        The text's logits never lie in memory at once.  The iterator has to be exhausted.
        """

    @abstractmethod
    def rewind(self, position: int) -> None:
        """Keep the first ``position`` tokens of the cache and forget the others."""

    def prefill_each(self, tails: Sequence[Sequence[int]]) -> Iterator[Logits]:
        """The logits after the cached tokens and each of ``tails`` on its own: float32 [vocab].

        In order, each tail at least one token; the cache is left as it was.  One after the other
        here; a runtime that computes several in a batch does so.  The iterator has to be exhausted.

        Raises:
            UsageError: a tail does not fit into ``context_tokens``.
        """
        start = self.position
        for tail in tails:
            logits = self.prefill(tail)
            self.rewind(start)
            yield logits

    def step(self, token: int) -> Logits:
        """Append one token and return the logits after it: float32 [vocab]."""
        return self.prefill([token])

    def reset(self) -> None:
        """Forget everything."""
        self.rewind(0)

    def tokenize(self, text: str) -> list[int] | None:
        """Ids by the tokenizer that the artifact carries for its runtime, special tokens parsed.

        Nothing is added (no BOS).  None where the runtime has no tokenizer of its own.
        """
        return None

    def text_program(self, artifact: Path) -> TextProgram:
        """What the runtime's own program makes of text; by default an app reads the files beside.

        Args:
            artifact: that was opened.

        Raises:
            InputError: the artifact's tokenizer is missing or damaged.
        """
        return ShippedText(artifact)

    @abstractmethod
    def close(self) -> None:
        """Give back memory and files; the session is of no use afterwards."""

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class Agreement(NamedTuple):
    """How near a runtime's logits must come to float32 ones of the same weights.

    Attributes:
        kl_mean: largest mean KL(judge || artifact), in nats a token.
        top1: least share of positions with the same most probable token.
        rounding: how the runtime rounds activations, ``float16`` or ``int8``; None: not at all.
        times: for a model that rounding moves by more, both limits are this many times what that
            rounding costs the model in the judge's own hands (:mod:`~edgedistill.verify.rounding`).
    """

    kl_mean: float
    top1: float
    rounding: str | None = None
    times: float = 1.0


class RoundingCost(NamedTuple):
    """What rounding the activations alone does to a model.

    Attributes:
        kl_mean: KL(exact || rounded), in nats a token.
        flips: positions whose most probable token is another.
        tokens: all positions.
    """

    kl_mean: float
    flips: int
    tokens: int


class Runtime(ABC):
    """A program that runs artifacts; ``runtimes/<name>.py`` holds one subclass.

    Attributes:
        extra: the pip extra that installs it.
        limitation: what a measurement in this runtime cannot show, said wherever its figures are.
        float_agreement: what an unquantized artifact is held to.
        quantized_agreement: what a quantized one is held to, against its own dequantized weights;
            looser where the runtime rounds activations to 8 bits.
        kv_cache_choices: bits in which keys and values can be cached, the default first; none
            where the runtime has no such choice.
        kv_cache_bits: that sessions are opened with; None where there is no choice.
    """

    extra: ClassVar[str]
    limitation: ClassVar[str | None] = None
    float_agreement: ClassVar[Agreement] = Agreement(1e-4, 0.995)
    quantized_agreement: ClassVar[Agreement] = Agreement(1e-4, 0.995)
    kv_cache_choices: ClassVar[tuple[int, ...]] = ()
    kv_cache_bits: int | None = None

    @classmethod
    def kv_cache_problem(cls, bits: int, head_dim: int | None = None) -> str | None:
        """Why keys and values cannot be cached in ``bits`` bits; None when they can.

        Args:
            bits: of one number.
            head_dim: numbers in one key of one head; None leaves out what depends on it.
        """
        if not cls.kv_cache_choices:
            return "it has no choice of bits for its cache of keys and values"
        if bits not in cls.kv_cache_choices:
            known = " or ".join(map(str, sorted(cls.kv_cache_choices)))
            return f"it caches keys and values in {known} bits, not in {bits}"
        return None

    def with_kv_cache_bits(self, bits: int) -> Runtime:
        """The same runtime, whose sessions cache keys and values in ``bits`` bits.

        Raises:
            UsageError: it cannot.
        """
        raise UsageError(f"{type(self).__name__}: {self.kv_cache_problem(bits)}")

    def agreement(self, quantized: bool) -> Agreement:
        """What an artifact is held to; ``quantized``: its weights are."""
        return self.quantized_agreement if quantized else self.float_agreement

    @abstractmethod
    def open(self, artifact: Path, *, context_tokens: int, threads: int) -> Session:
        """Load an artifact's directory with the settings that ship.

        Raises:
            InputError: the artifact is missing, damaged or of another kind.
            UnavailableError: the runtime is not installed; the hint names the extra.
        """

    @abstractmethod
    def settings(self) -> dict[str, str]:
        """Versions and settings that decide the numbers, for reports and cache keys."""
