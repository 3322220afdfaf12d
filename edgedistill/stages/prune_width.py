"""Make every block narrower: FFN channels, KV groups with their query heads, hidden channels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student

Size = Annotated[int, Field(ge=1)]


class PruneWidth(Stage):
    """Remove the channels that the others can best make up for, on the calibration text.

    Which channels go is each layer's own choice; how many is the same everywhere, so that the
    result is a plain checkpoint.  The matrices that write to the stream are fitted anew to what
    stays.  Channels of the stream itself go by their activations in the student that arrives.

    Attributes:
        ffn_size: channels of the feed-forward network that stay.
        ffn_share: the same as a share of those there are, rounded down to ``multiple_of``.
        kv_heads: key heads that stay, each with the query heads that share it.
        hidden_size: channels of the residual stream that stay.
        multiple_of: that FFN and hidden sizes have to be; groups of quantization and kernels of
            runtimes want 32 or 64, K-quants 256.
        importance_tokens: of the calibration text that channels are chosen and matrices fitted on.
        held_out_tokens: as many more that the result is measured on.
        second: text of another domain, on which the result is measured too.
        calibration: the text to choose on; from the recipe where it is not stated.
        chat: likewise.
    """

    ffn_size: Size | None = None
    ffn_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    kv_heads: Size | None = None
    hidden_size: Size | None = None
    multiple_of: Size = 64
    importance_tokens: Annotated[int, Field(ge=32)] = 16384
    held_out_tokens: Annotated[int, Field(ge=32)] = 2048
    second: Path | None = None
    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    @model_validator(mode="after")
    def _one_thing_to_do(self) -> Self:
        if self.ffn_size is not None and self.ffn_share is not None:
            raise ValueError("ffn_size and ffn_share say the same thing: give one of them")
        sizes = (self.ffn_size, self.ffn_share, self.kv_heads, self.hidden_size)
        if all(size is None for size in sizes):
            raise ValueError("nothing to prune: give ffn_size, ffn_share, kv_heads or hidden_size")
        return self

    @property
    def prunes(self) -> bool:
        """It does."""
        return True

    def facts_after(self, facts: DecoderFacts) -> DecoderFacts:
        """The sizes that stay."""
        ffn_size = self.ffn_size or facts.ffn_size
        if self.ffn_share is not None:
            wanted = int(facts.ffn_size * self.ffn_share)
            ffn_size = max(wanted // self.multiple_of, 1) * self.multiple_of
        kv_heads = self.kv_heads or facts.kv_heads
        return dataclasses.replace(
            facts,
            ffn_size=ffn_size,
            kv_heads=kv_heads,
            heads=kv_heads * (facts.heads // facts.kv_heads),
            hidden_size=self.hidden_size or facts.hidden_size,
        )

    def cost(self, facts: DecoderFacts) -> StageCost:
        """Passes of the whole and the narrow student over the text to choose on, and what it holds.

        That is both streams, what a matrix reads, and the sums, inverse and solution of its fit.
        The fit is counted as the tokens whose pass takes as many operations.
        """
        passes = 2 if self.hidden_size is None else 3
        tokens = passes * self.importance_tokens + 4 * self.held_out_tokens
        tokens += self._fit_operations(facts) // (2 * facts.parameters)
        states = 4 * self.importance_tokens * (3 * facts.hidden_size + facts.ffn_size)
        fit = 8 * 4 * facts.ffn_size**2
        return StageCost(tokens, max(states + fit, 2 * 4 * facts.vocab_size * facts.hidden_size))

    def _fit_operations(self, facts: DecoderFacts) -> int:
        """Of sums, inverses and eliminations in all blocks, in float32's time."""
        after, operations = self.facts_after(facts), 0
        attended = facts.heads * facts.head_dim, after.heads * after.head_dim
        for columns, kept in ((facts.ffn_size, after.ffn_size), attended):
            if kept < columns:
                wide = columns + facts.hidden_size  # of the Hessian and the moment together
                operations += 2 * self.importance_tokens * columns * wide
                solved = 2 * columns**3 + 2 * (columns - kept) * columns * wide
                operations += 2 * solved  # in float64, which is half as fast
        return facts.layers * operations

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A quantized student; sizes that are no smaller, or that formats do not like."""
        if quantized:
            return ["the student is quantized already: prune it before"]
        after = self.facts_after(facts)
        stated = {
            "ffn_size": self.ffn_size is not None or self.ffn_share is not None,
            "kv_heads": self.kv_heads is not None,
            "hidden_size": self.hidden_size is not None,
        }
        problems = []
        for name in (name for name, given in stated.items() if given):
            new, old = getattr(after, name), getattr(facts, name)
            if new >= old:
                problems.append(f"{name}: {new} is not below the student's {old}")
            if name != "kv_heads" and new % self.multiple_of:
                problems.append(
                    f"{name}: {new} is no multiple of {self.multiple_of}, which formats want "
                    "(multiple_of)"
                )
        if (self.kv_heads or self.hidden_size) and after.hidden_size % after.heads:
            problems.append(
                f"hidden_size {after.hidden_size} is no multiple of the {after.heads} query heads "
                "that stay, as a plain checkpoint has to have it"
            )
        elif facts.rope.short_text_tokens and after.hidden_size // after.heads != facts.head_dim:
            problems.append(
                f"hidden_size {after.hidden_size} is not {facts.head_dim} times the {after.heads} "
                "query heads that stay, which transformers takes for the number of LongRoPE's "
                "factors: prune both in step, or ffn_size alone"
            )
        return problems

    def run(self, src: Path, dst: Path) -> None:
        """Weigh the channels, write the narrower student and what was found."""
        import numpy as np

        from edgedistill.held_out import split_text
        from edgedistill.hidden_importance import hidden_importance, kept_share, largest
        from edgedistill.pruned_student import narrow, width_sizes
        from edgedistill.pruning_loss import measure_losses
        from edgedistill.pruning_results import Pruning, second_loses_more
        from edgedistill.width_choice import WidthChoice

        student = Student(src)
        self.refuse_misfit(student)
        tokens = min(self.calibration.tokens, self.importance_tokens + self.held_out_tokens)
        calibration = self.calibration.model_copy(update={"tokens": tokens})
        text = split_text(src, calibration, self.chat, held_out_tokens=self.held_out_tokens)
        after = self.facts_after(student.facts)
        hidden, shares = np.arange(after.hidden_size), []
        if self.hidden_size is not None:
            scores = hidden_importance(src, text.fitting)
            hidden = largest(scores, after.hidden_size)
            shares = [kept_share(scores, hidden)]
        choice = WidthChoice(src, text.fitting, hidden, after)
        narrow(student, dst, hidden, choice, after)
        losses = measure_losses(
            src, dst, text.held_out, second=self.second, calibration=calibration, chat=self.chat
        )
        Pruning(
            stage="prune_width",
            parameters_before=student.facts.parameters,
            parameters_after=after.parameters,
            before=width_sizes(student.facts),
            after=width_sizes(after),
            losses=losses,
            second_loses_more=second_loses_more(losses),
            kept=choice.kept_shares() + shares,
        ).write(dst)
