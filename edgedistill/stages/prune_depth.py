"""Drop whole blocks: those whose absence, measured on held-out text, changes predictions least."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student


class PruneDepth(Stage):
    """Drop blocks, chosen by a search over their measured KL.

    Block influence and angular distance propose candidates; no such score is reliable enough to
    decide by itself.  What is written is a plain checkpoint with fewer layers, and
    ``pruning.json`` with all that was tried.

    Attributes:
        layers: how many blocks go.
        candidates: blocks of least influence that are tried in each round of the search.
        beam: sets that the search follows at once; 1 is greedy.
        search_tokens: of the calibration text that the search measures on; as many more are held
            back, for the KL that is told of the result.
        second: text of another domain, on which the result is measured too.
        calibration: the text to choose on; from the recipe where it is not stated.
        chat: likewise.
    """

    layers: Annotated[int, Field(ge=1)]
    candidates: Annotated[int, Field(ge=1)] = 6
    beam: Annotated[int, Field(ge=1, le=16)] = 1
    search_tokens: Annotated[int, Field(ge=32)] = 2048
    second: Path | None = None
    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    @property
    def prunes(self) -> bool:
        """It does."""
        return True

    def facts_after(self, facts: DecoderFacts) -> DecoderFacts:
        """So many layers less; which of them attend to a window, or rotate, is not known yet."""
        layers = max(1, facts.layers - self.layers)
        return dataclasses.replace(
            facts,
            layers=layers,
            sliding_layers=facts.sliding_layers[:layers],
            unrotated_layers=facts.unrotated_layers[:layers],
        )

    def cost(self, facts: DecoderFacts) -> StageCost:
        """A candidate costs the blocks behind it, about half of them, and the head twice."""
        tried = self.layers * (self.candidates + 2) * self.beam
        # What enters each block, of the branches and of the candidate that is tried.
        states = 4 * self.search_tokens * facts.hidden_size * facts.layers * (self.beam + 2)
        head = 4 * facts.vocab_size * facts.hidden_size
        return StageCost((0.8 * tried + 5) * self.search_tokens, states + 2 * head)

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A quantized student; more layers than there are."""
        if quantized:
            return ["the student is quantized already: prune it before"]
        if self.layers >= facts.layers:
            return [f"layers: {self.layers} of the student's {facts.layers} leaves none"]
        return []

    def run(self, src: Path, dst: Path) -> None:
        """Search on one half of the text, measure on the other, write student and findings."""
        from edgedistill.depth_search import search_depth
        from edgedistill.held_out import split_text
        from edgedistill.pruned_student import drop_layers
        from edgedistill.pruning_loss import measure_losses
        from edgedistill.pruning_results import Pruning, second_loses_more

        student = Student(src)
        self.refuse_misfit(student)
        tokens = min(self.calibration.tokens, 2 * self.search_tokens)
        calibration = self.calibration.model_copy(update={"tokens": tokens})
        text = split_text(src, calibration, self.chat, held_out_tokens=self.search_tokens)
        choice = search_depth(
            src, text.fitting, drop=self.layers, candidates=self.candidates, beam=self.beam
        )
        drop_layers(student, dst, choice.dropped)
        losses = measure_losses(
            src, dst, text.held_out, second=self.second, calibration=calibration, chat=self.chat
        )
        pruned = Student(dst).facts
        Pruning(
            stage="prune_depth",
            parameters_before=student.facts.parameters,
            parameters_after=pruned.parameters,
            before={"num_hidden_layers": student.facts.layers},
            after={"num_hidden_layers": pruned.layers},
            losses=losses,
            second_loses_more=second_loses_more(losses),
            dropped_layers=list(choice.dropped),
            sets=choice.sets,
            tried=choice.tried,
        ).write(dst)
