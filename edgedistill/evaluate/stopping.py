"""Sampling that stops when the verdict is decided: the order, the looks, and the decision.

Cases are scored in a random order of which every beginning has the suite's own mix of slices.
Now and then the judge looks, with intervals that allow for being looked at.  docs/evaluate.md says
what is decided when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import ValidationError

from edgedistill.errors import InputError
from edgedistill.evaluate.capabilities import VISIBLE_LOSS, Measured, measure, tolerated_loss
from edgedistill.evaluate.judge import judge
from edgedistill.evaluate.pairing import pair_scores
from edgedistill.evaluate.score import Score
from edgedistill.evaluate.sequential import FINAL_LEVEL, Bounds, measure_anytime
from edgedistill.evaluate.statistics import Bools, Pairs
from edgedistill.evaluate.suite import ALL_CASES, Case, TextCase
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import Document, Verdict

STOPPING_FILE = "stopping.json"
SEED = "edgedistill sampling 1"
FIRST_LOOK = 100
LOOK_GROWTH = 1.15
# Slices up to this many cases are scored in full: where 6% of the answers flip, it takes about as
# many to exclude a loss of 0.05 while looking.
SMALL_SLICE = 600


class Stopping(Document):
    """How far the random order was followed.

    Attributes:
        order: ids of the cases that were scored in that order.  Others that were scored belong to
            slices that are scored in full.
        looks: how many cases there were at each look.
    """

    order: list[str]
    looks: list[int]


def read_stopping(directory: Path) -> Stopping | None:
    """What :class:`Stopping` was written beside the scores; None where the cases were fixed.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / STOPPING_FILE
    if not path.exists():
        return None
    try:
        found = Stopping.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError("says nothing of how sampling stopped", where=str(path)) from error
    if not found.looks or found.looks[-1] != len(found.order):
        raise InputError("its looks do not belong to its order", where=str(path))
    return found


def random_order(cases: Sequence[Case]) -> list[int]:
    """Indices of the cases in a random order, the same every time.

    Of a stratum (all cases with the same slices) with n cases, one lies at random in each n-th
    part of the order, so every beginning holds each stratum in proportion, to within one case.
    """
    strata: dict[tuple[str, ...], list[int]] = {}
    for index, case in enumerate(cases):
        strata.setdefault(tuple(sorted(case.slices)), []).append(index)
    places: dict[int, float] = {}
    for members in strata.values():
        shuffled = sorted(members, key=lambda i: _random("rank", cases[i].id))
        for rank, index in enumerate(shuffled):
            places[index] = (rank + _random("place", cases[index].id)) / len(members)
    return sorted(places, key=lambda i: (places[i], cases[i].id))


def _random(purpose: str, case_id: str) -> float:
    """In [0, 1), from the hash of an id."""
    digest = hashlib.sha256(f"{SEED} {purpose} {case_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def look_sizes(count: int) -> list[int]:
    """After how many cases the judge looks; the last time after all of them."""
    sizes = []
    size = float(FIRST_LOOK)
    while size < count:
        sizes.append(int(size))
        size *= LOOK_GROWTH
    return [*sizes, count]


class Sampling:
    """A suite on the way to a verdict.

    Args:
        cases: the whole suite.
        reference: of all cases, in that order: the reference's answers paired with themselves.
        floor, specs: as :func:`judge` takes them.

    Raises:
        InputError: a case is a text.

    Attributes:
        order: indices of all cases in the order in which they are scored.
        in_full: the slices that are scored in full, unless something fails before.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        reference: Pairs,
        floor: Floor | None,
        specs: Mapping[str, SliceSpec],
    ) -> None:
        self._check_kinds(cases)
        self._index = {case.id: index for index, case in enumerate(cases)}
        self._reference = reference
        self._floor = floor
        self._specs = specs
        names = sorted({name for case in cases for name in case.slices})
        self._members: dict[str, Bools] = {ALL_CASES: np.ones(len(cases), dtype=np.bool_)}
        for name in names:
            self._members[name] = np.array([name in case.slices for case in cases])
        self._bounds = {name: self._bounds_of(name) for name in self._members}
        self.order = random_order(cases)
        self.in_full = {
            name
            for name, members in self._members.items()
            if members.sum() <= SMALL_SLICE or (name in specs and specs[name].protected)
        }

    @classmethod
    def of(
        cls,
        cases: Sequence[Case],
        reference: Mapping[str, Score],
        floor: Floor | None,
        specs: Mapping[str, SliceSpec],
    ) -> Self:
        """From the reference's scores of all cases."""
        return cls(cases, pair_scores(cases, reference, reference), floor, specs)

    def rest(self, scored: int) -> list[int]:
        """The cases of slices that are scored in full, beyond the first ``scored`` of the order."""
        return [
            i for i in self.order[scored:] if any(self._members[name][i] for name in self.in_full)
        ]

    def measure(
        self, pairs: Pairs, scored: Sequence[int], looks: Sequence[int]
    ) -> dict[str, Measured]:
        """Slice -> what was measured; ``all`` first, then by name.

        Args:
            pairs: of the cases ``scored``, in that order: the beginning of the random order, which
                ends at the last look, and cases of slices that are scored in full.
            looks: how many cases there were at each look.
        """
        measured = {}
        chosen, counts = np.asarray(scored), np.asarray(looks)
        for name, members in self._members.items():
            inside = members[chosen]
            if int(inside.sum()) == int(members.sum()):
                measured[name] = measure(pairs.select(inside), FINAL_LEVEL)
                continue
            # What was scored for the sake of other slices is no random part of this one.
            inside[counts[-1] :] = False
            if inside.any():
                seen = np.cumsum(inside)[counts - 1].tolist()
                measured[name] = measure_anytime(pairs.select(inside), self._bounds[name], seen)
        return measured

    def measure_stopped(
        self, pairs: Pairs, scored: Sequence[str], stopping: Stopping
    ) -> dict[str, Measured]:
        """As :meth:`measure`, from what was written down.

        Args:
            pairs: of the cases with the ids ``scored``, in that order.
            stopping: how they were chosen.

        Raises:
            InputError: it does not belong to these cases.
        """
        places = {case_id: place for place, case_id in enumerate(scored)}
        missing = [case_id for case_id in stopping.order if case_id not in places]
        if missing:
            raise InputError(f"case {missing[0]} was not scored", where=STOPPING_FILE)
        later = places.keys() - set(stopping.order)
        ids = [*stopping.order, *sorted(later)]
        ordered = pairs.select(np.array([places[case_id] for case_id in ids]))
        return self.measure(ordered, [self._index[case_id] for case_id in ids], stopping.looks)

    def verdict(self, pairs: Pairs, scored: Sequence[int], looks: Sequence[int]) -> Verdict | None:
        """``fail`` or ``pass`` when that is decided; None when more cases are needed.

        A pass is decided up to the slices that are scored in full.
        """
        measured = self.measure(pairs, scored, looks)
        checks, verdict = judge(measured, self._floor, self._specs)
        if verdict == "fail":
            return "fail"
        held = [check for check in checks if check.slice not in self.in_full]
        if any(check.verdict != "pass" for check in held):
            return None
        unseen = (name for name in self._members if self._may_hide_a_loss(name, measured.get(name)))
        return None if any(unseen) else "pass"

    @staticmethod
    def _check_kinds(cases: Sequence[Case]) -> None:
        """A text's bits have no bound, so nothing holds however early one stops."""
        texts = [case.id for case in cases if isinstance(case, TextCase)]
        if texts:
            raise InputError(
                f"case {texts[0]} is a text, and sampling cannot stop early on texts",
                hint="take evaluate.stop_early out, or the texts out of the suite",
            )

    def _may_hide_a_loss(self, name: str, found: Measured | None) -> bool:
        """Whether a slice that nobody named could still have lost visibly."""
        if name == ALL_CASES or name in self._specs or name in self.in_full:
            return False
        if found is None:
            return True
        tolerated = tolerated_loss(self._floor, found.value("reference_score"))
        interval = found.intervals["score_loss"]
        if interval.low > 0.0 and found.value("score_loss") > tolerated:
            return True  # a loss, and all cases have to say whether it is tolerated
        return interval.high > max(VISIBLE_LOSS, tolerated)

    def _bounds_of(self, name: str) -> Bounds:
        members = self._members[name]
        return Bounds(
            largest_weight=float(self._reference.weights[members].max()),
            largest_loss=float(np.nanmax(self._reference.reference_loss[members])),
        )
