"""The climb: which candidates are measured, and that the smallest that passes wins."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from edgedistill.errors import ExitCode
from edgedistill.results import StepReport
from edgedistill.search.candidates import Candidate
from edgedistill.search.climb import Climb, Limits
from edgedistill.search.measure import Measured

OK, FLOOR, BROKEN = ExitCode.OK, ExitCode.FLOOR_NOT_MET, ExitCode.VERIFICATION_FAILED
Verdicts = dict[str, tuple[ExitCode, ExitCode]]


def candidate(name: str, size: int, gentler: tuple[str, ...] = ()) -> Candidate:
    return Candidate(name, "bits", [], "ladder", gentler, {"gguf": size, "onnx": size})


@dataclass
class Table:
    """Verdicts that are known beforehand, in the first format and in all."""

    verdicts: Verdicts
    judged: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    now: float = 0.0

    @property
    def step_reports(self) -> Mapping[str, Mapping[str, StepReport]]:
        return {}

    def judge(self, name: str) -> Measured:
        self.judged.append(name)
        self.now += 60
        return measured(self.verdicts[name][0])

    def confirm(self, name: str) -> Measured:
        self.confirmed.append(name)
        return measured(self.verdicts[name][1])


def measured(code: ExitCode) -> Measured:
    return Measured(code == OK, code, "" if code == OK else "because", ())


def climb(
    candidates: list[Candidate],
    table: Table,
    *,
    try_all: bool = False,
    minutes: float | None = None,
) -> Climb:
    seconds = None if minutes is None else 60 * minutes
    limits = Limits(try_all, seconds, clock=lambda: table.now)
    return Climb(candidates, table, lambda _: None, limits)


@pytest.mark.parametrize("try_all", [False, True])
def test_the_winner_is_the_smallest_that_passes_everywhere(try_all: bool) -> None:
    rng = random.Random(0)
    for _ in range(300):
        candidates = [candidate(f"c{i}", rng.randint(1, 6)) for i in range(rng.randint(1, 7))]
        codes = [OK, OK, FLOOR, BROKEN]
        verdicts = {c.name: (rng.choice(codes), rng.choice(codes)) for c in candidates}
        passing = [c.total_bytes for c in candidates if verdicts[c.name] == (OK, OK)]
        table = Table(verdicts)
        climbing = climb(candidates, table, try_all=try_all)
        winner = climbing.run()
        assert (winner.total_bytes if winner else None) == min(passing, default=None)
        assert (climbing.exit_code == OK) == bool(passing)
        assert climbing.complete
        assert len(set(table.judged)) == len(table.judged)
        assert len(set(table.confirmed)) == len(table.confirmed)
        if try_all:
            assert sorted(table.judged) == sorted(c.name for c in candidates)


def test_what_is_no_smaller_than_what_passes_is_not_measured() -> None:
    small, same, large = candidate("small", 1), candidate("same", 1), candidate("large", 2)
    table = Table(dict.fromkeys(("small", "same", "large"), (OK, OK)))
    climbing = climb([small, same, large], table)
    assert climbing.run() is small
    assert (table.judged, table.confirmed) == (["small"], ["small"])
    assert climbing.result(large).reason == "no smaller than small, which passes"
    assert climbing.result(large).state == "not tried"
    assert climbing.result(small).state == "wins"


def test_a_failure_in_another_format_climbs_back_to_what_was_spared() -> None:
    candidates = [candidate("int8", 8), candidate("int4", 4), candidate("gptq", 4)]
    table = Table({"int8": (OK, OK), "int4": (OK, FLOOR), "gptq": (OK, FLOOR)})
    climbing = climb(candidates, table)
    winner = climbing.run()
    assert winner is candidates[0]
    assert table.judged == ["int8", "int4", "gptq"]
    assert table.confirmed == ["int4", "gptq", "int8"]


def test_where_a_gentler_form_missed_the_floor_the_harsher_is_left_to_all() -> None:
    candidates = [candidate("int8", 8), candidate("int4", 4, ("int8",))]
    verdicts = {"int8": (FLOOR, FLOOR), "int4": (OK, OK)}
    table = Table(verdicts)
    climbing = climb(candidates, table)
    assert climbing.run() is None
    assert table.judged == ["int8"]
    assert climbing.exit_code == FLOOR
    assert "int8 is gentler" in climbing.result(candidates[1]).reason
    assert climb(candidates, Table(verdicts), try_all=True).run() is candidates[1]


def test_a_candidate_that_broke_says_nothing_of_a_harsher_one() -> None:
    candidates = [candidate("int8", 8), candidate("int4", 4, ("int8",))]
    table = Table({"int8": (BROKEN, BROKEN), "int4": (OK, OK)})
    assert climb(candidates, table).run() is candidates[1]


def test_when_the_time_is_over_the_best_so_far_is_still_confirmed() -> None:
    candidates = [candidate("int8", 8), candidate("int4", 4), candidate("int2", 2)]
    table = Table(dict.fromkeys(("int8", "int4", "int2"), (OK, OK)))
    climbing = climb(candidates, table, minutes=1.5)
    assert climbing.run() is candidates[1]
    assert not climbing.complete
    assert table.confirmed == ["int4"]
    assert climbing.result(candidates[2]).reason == "the time was over (1 min 30 s)"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([FLOOR, ExitCode.UNDERPOWERED], FLOOR),
        ([ExitCode.BUDGET_NOT_MET], ExitCode.BUDGET_NOT_MET),
        ([FLOOR, ExitCode.STAGE_FAILED], ExitCode.STAGE_FAILED),
        ([], ExitCode.BUDGET_NOT_MET),
    ],
)
def test_without_a_winner_the_exit_code_is_the_worst_of_all(
    codes: list[ExitCode], expected: ExitCode
) -> None:
    candidates = [candidate(f"c{i}", 9 - i) for i in range(len(codes))]
    climbing = climb(candidates, Table({f"c{i}": (c, c) for i, c in enumerate(codes)}))
    assert climbing.run() is None
    assert climbing.exit_code == expected


def test_without_time_for_anything_trying_again_is_what_helps() -> None:
    climbing = climb([candidate("int8", 8)], Table({"int8": (OK, OK)}), minutes=0)
    assert climbing.run() is None
    assert climbing.exit_code == ExitCode.UNAVAILABLE
