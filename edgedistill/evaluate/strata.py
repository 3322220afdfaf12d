"""A stratified sample with more of the tails than traffic has, and the weights that undo that.

Within a stratum requests are taken systematically: the requests are laid out in a row, duplicates
next to each other, and taken at equal distances from a random start (Madow, "On the theory of
systematic sampling II", 1949).  A request is thus taken with the probability n / N of its stratum
and carries the weight N / n, so that every weighted total is the traffic's in expectation (Horvitz
and Thompson, 1952); the weights of a stratum add up to N exactly, so the weighted mean is unbiased
too.  A group of duplicates that fills a whole distance is taken for certain, with its own size as
its weight; no group gives two cases.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import sqrt
from typing import NamedTuple

from edgedistill.errors import UsageError

LEAST_DISTINCT = 5  # a property of fewer distinct requests is no stratum and no slice
OTHER = "other"


class Taken(NamedTuple):
    """A case: the ``member`` of the ``group`` (both indices), and how many requests it is."""

    group: int
    member: int
    weight: float


@dataclass(frozen=True)
class Stratum:
    """Groups of duplicate requests (their indices) that are sampled together."""

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def traffic(self) -> int:
        """Requests, duplicates included."""
        return sum(len(group) for group in self.groups)


def count_properties(
    groups: Sequence[Sequence[int]], properties: Sequence[Sequence[str]]
) -> dict[str, int]:
    """Property -> requests that have it, of those that at least ``LEAST_DISTINCT`` groups have.

    Args:
        groups: indices of duplicate requests.
        properties: of each group.
    """
    distinct: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    for group, names in zip(groups, properties, strict=True):
        for name in names:
            distinct[name] += 1
            traffic[name] += len(group)
    return {name: traffic[name] for name, count in distinct.items() if count >= LEAST_DISTINCT}


def stratify(groups: Sequence[Sequence[int]], properties: Sequence[Sequence[str]]) -> list[Stratum]:
    """Each group goes to the stratum of its rarest property, so every tail is a stratum.

    Rare is what few requests have, of what at least ``LEAST_DISTINCT`` groups have.  Within a
    stratum groups are in order of their properties, then of the log, over which a systematic
    sample spreads.
    """
    traffic = count_properties(groups, properties)
    members: dict[str, list[int]] = {}
    for index, names in enumerate(properties):
        known = [(traffic[name], name) for name in names if name in traffic]
        members.setdefault(min(known)[1] if known else OTHER, []).append(index)
    return [
        Stratum(
            name,
            tuple(tuple(groups[i]) for i in sorted(found, key=lambda i: (tuple(properties[i]), i))),
        )
        for name, found in sorted(members.items())
    ]


def choose(strata: Sequence[Stratum], cases: int, *, minimum: int, seed: int) -> list[list[Taken]]:
    """For each stratum the cases that are taken.

    Args:
        strata: of at least one group each.
        cases: how many in all; all groups if there are fewer.
        minimum: cases of every stratum, where it has so many groups and ``cases`` allows it.
        seed: of the random starts, one a stratum.

    Raises:
        UsageError: there are more strata than cases.
    """
    counts = allocate(
        [s.traffic for s in strata], [len(s.groups) for s in strata], cases, minimum=minimum
    )
    return [
        take([len(group) for group in s.groups], count, random.Random(f"{seed}/{s.name}").random())
        for s, count in zip(strata, counts, strict=True)
    ]


def allocate(
    traffic: Sequence[int], available: Sequence[int], cases: int, *, minimum: int
) -> list[int]:
    """Cases for each stratum: first the minimum, then in proportion to the root of its traffic.

    The root is power allocation with the exponent 1/2 (Bankier, "Power allocations", 1988): large
    strata get more cases than small ones, and fewer than their share.

    Args:
        traffic: requests of each stratum.
        available: distinct ones, which bound its cases.
        cases: to be given away.
        minimum: of each stratum; less where that is more than there is.

    Raises:
        UsageError: there are more strata than cases.
    """
    if cases < len(traffic):
        raise UsageError(
            f"{cases} cases are fewer than the {len(traffic)} kinds of request in the log",
            hint=f"ask for {len(traffic) * minimum}, which gives each of them {minimum}",
        )
    least = min(minimum, cases // len(traffic))
    counts = [min(least, groups) for groups in available]

    def urgency(stratum: int) -> tuple[float, int]:
        return -sqrt(traffic[stratum]) / (counts[stratum] + 1), stratum

    waiting = [urgency(i) for i in range(len(traffic)) if counts[i] < available[i]]
    heapq.heapify(waiting)
    for _ in range(min(cases, sum(available)) - sum(counts)):
        stratum = waiting[0][1]
        counts[stratum] += 1
        if counts[stratum] < available[stratum]:
            heapq.heapreplace(waiting, urgency(stratum))
        else:
            heapq.heappop(waiting)
    return counts


def take(sizes: Sequence[int], count: int, start: float) -> list[Taken]:
    """A systematic sample of ``count`` groups, in order, each with one of its members.

    Args:
        sizes: members of each group.
        count: from 1 to the number of groups.
        start: in [0, 1), the random number of the sample.
    """
    certain: set[int] = set()
    total, left = sum(sizes), count
    # Largest first: once one does not fill a distance, no smaller one does.
    for group in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if left == 0 or sizes[group] * left < total:
            break
        certain.add(group)
        total, left = total - sizes[group], left - 1
    taken = [Taken(g, int(start * sizes[g]), float(sizes[g])) for g in certain]
    rest = [group for group in range(len(sizes)) if group not in certain]
    ends = list(accumulate(sizes[group] for group in rest))
    for number in range(left):
        place = min(int((start + number) * total / left), total - 1)
        index = bisect_right(ends, place)
        member = place - (ends[index] - sizes[rest[index]])
        taken.append(Taken(rest[index], member, total / left))
    return sorted(taken)
