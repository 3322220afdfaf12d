"""Which blocks to drop: block scores propose candidates, the measured KL on a text decides.

A beam search from the whole decoder: each round drops one block more.  States up to a dropped block
are those of the decoder that it was dropped from, so that a candidate costs only what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgedistill.block_importance import block_influence, nearest_run
from edgedistill.decoder_forward import DecoderForward
from edgedistill.held_out import Head, mean_kl, run_block
from edgedistill.progress import Bar, progress_bar
from edgedistill.pruning_results import ChosenBy, DroppedSet, TriedBlock
from edgedistill.student import Student


@dataclass(frozen=True)
class DepthChoice:
    """What a search found.

    Attributes:
        dropped: the blocks to drop, ascending: of all sets that were measured the one with the
            least KL.
        kl: of it on that text, in nats a token.
        sets: the result of each way to choose, the search's first.
        tried: every candidate of the search, in the order of its measurement.
    """

    dropped: tuple[int, ...]
    kl: float
    sets: list[DroppedSet]
    tried: list[TriedBlock]


@dataclass(frozen=True)
class _Branch:
    """A decoder with some blocks left out.

    Attributes:
        kept: its blocks, ascending.
        states: what enters each of them, and what leaves the last: [sequences, tokens, hidden].
        kl: to the whole decoder.
    """

    kept: tuple[int, ...]
    states: tuple[Tensor, ...]
    kl: float


def search_depth(
    student: Path, ids: Tensor, *, drop: int, candidates: int, beam: int
) -> DepthChoice:
    """Choose ``drop`` blocks.

    Args:
        student: a student directory; its blocks are streamed.
        ids: int64 [sequences, tokens], the text that the KL is measured on.
        drop: how many blocks, fewer than there are.
        candidates: blocks of least influence that are tried in each round, for each branch; the
            ends of the run with the least angular distance are tried too.
        beam: branches that are followed; 1 is greedy.
    """
    with torch.inference_mode():
        search = _DepthSearch(student, ids)
        return search.choose(drop, candidates, beam)


class _DepthSearch:
    def __init__(self, student: Path, ids: Tensor) -> None:
        opened = Student(student)
        self._decoder = DecoderForward(opened)
        self._head = Head(opened)
        kept = tuple(range(self._decoder.facts.layers))
        states = self._run(kept, self._decoder.embed(ids))
        self._whole = _Branch(kept, states, 0.0)
        self._tried: list[TriedBlock] = []

    def choose(self, drop: int, candidates: int, beam: int) -> DepthChoice:
        branches = [self._whole]
        with progress_bar(None, "measuring what dropped blocks cost") as bar:
            for gone in range(drop):
                branches = self._round(branches, candidates, beam, drop - gone, bar)
            return self._settle(branches[0], drop)

    def _round(
        self, branches: list[_Branch], candidates: int, beam: int, left: int, bar: Bar
    ) -> list[_Branch]:
        """Drop one block more: the best ``beam`` of all candidates, the best first."""
        best: list[_Branch] = []
        seen = set()
        for branch in branches:
            for place, influence in self._propose(branch, candidates, left):
                kept = _without(branch.kept, place)
                if kept in seen:
                    continue
                seen.add(kept)
                # Who is out of the race lets go of its states at once; of equals the first stays.
                best = sorted([*best, self._try(branch, place, influence)], key=_kl)[:beam]
                bar.advance()
        return best

    def _propose(self, branch: _Branch, candidates: int, left: int) -> Iterator[tuple[int, float]]:
        """Places in ``branch.kept`` with their influence, each once."""
        influence = block_influence(branch.states)
        order = sorted(range(len(influence)), key=influence.__getitem__)[:candidates]
        run, _ = nearest_run(branch.states, left)
        for place in dict.fromkeys([*order, run, run + left - 1]):
            yield place, influence[place]

    def _try(self, branch: _Branch, place: int, influence: float) -> _Branch:
        kept = _without(branch.kept, place)
        # What entered the dropped block enters the one behind it.
        states = branch.states[:place] + self._run(kept[place:], branch.states[place])
        tried = _Branch(kept, states, self._kl(states[-1]))
        block = branch.kept[place]
        self._tried.append(
            TriedBlock(
                dropped=self._gone(branch.kept), block=block, influence=influence, kl=tried.kl
            )
        )
        return tried

    def _settle(self, found: _Branch, drop: int) -> DepthChoice:
        """Hold the search's result against what one score alone would have dropped."""
        states = self._whole.states
        influence = block_influence(states)
        lowest = sorted(range(len(influence)), key=influence.__getitem__)[:drop]
        run, _ = nearest_run(states, drop)
        sets = [DroppedSet(chosen_by="search", blocks=self._gone(found.kept), kl=found.kl)]
        others: tuple[tuple[ChosenBy, list[int]], ...] = (
            ("block influence", sorted(lowest)),
            ("angular distance", list(range(run, run + drop))),
        )
        for name, blocks in others:
            known = next((s.kl for s in sets if s.blocks == blocks), None)
            kl = self._kl_without(blocks) if known is None else known
            sets.append(DroppedSet(chosen_by=name, blocks=blocks, kl=kl))
        best = min(sets, key=lambda s: s.kl)
        return DepthChoice(tuple(best.blocks), best.kl, sets, self._tried)

    def _kl_without(self, blocks: list[int]) -> float:
        first = blocks[0]
        kept = [block for block in self._whole.kept[first:] if block not in blocks]
        hidden = self._whole.states[first]
        for block in kept:
            hidden = run_block(self._decoder, block, hidden)
        return self._kl(hidden)

    def _run(self, layers: tuple[int, ...], hidden: Tensor) -> tuple[Tensor, ...]:
        """What enters each block, and what leaves the last."""
        states = [hidden]
        for layer in layers:
            states.append(run_block(self._decoder, layer, states[-1]))
        return tuple(states)

    def _kl(self, hidden: Tensor) -> float:
        log_probs = self._head.log_probs
        return mean_kl(log_probs, self._whole.states[-1], log_probs, hidden)

    def _gone(self, kept: tuple[int, ...]) -> list[int]:
        return [block for block in self._whole.kept if block not in kept]


def _without(kept: tuple[int, ...], place: int) -> tuple[int, ...]:
    return kept[:place] + kept[place + 1 :]


def _kl(branch: _Branch) -> float:
    return branch.kl
