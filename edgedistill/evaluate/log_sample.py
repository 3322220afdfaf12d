"""The requests of a log that are worth looking at: no duplicates, and the tails."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from edgedistill.evaluate.ambiguity import clarify_reasons, has_several_readings
from edgedistill.evaluate.duplicates import group_duplicates, normalize
from edgedistill.evaluate.logs import Request
from edgedistill.evaluate.properties import properties_of
from edgedistill.evaluate.strata import LEAST_DISTINCT, choose, count_properties, stratify
from edgedistill.evaluate.suite import ALL_CASES

CLARIFY = "clarify?"
SEVERAL_READINGS = "answered in two ways"
LEAST_CASES = 20  # of a kind of request, where the log has so many
MAX_TAG_VALUES = 50  # a key with more values names users or sessions, not kinds of request


@dataclass(frozen=True)
class SampledRequest:
    """A request that was chosen.

    Attributes:
        weight: how many requests of the log it stands for.
        stratum: the rarest of its properties.
        seen: requests that are its duplicates, itself included.
        properties: sorted; those that few distinct requests have are left out.
        clarify: why it may have to be asked back about.
    """

    request: Request
    weight: float
    stratum: str
    seen: int
    properties: tuple[str, ...]
    clarify: tuple[str, ...]


@dataclass(frozen=True)
class StratumCount:
    """A stratum: its requests in the log, the distinct ones among them, and its cases."""

    name: str
    traffic: int
    distinct: int
    cases: int


@dataclass(frozen=True)
class LogSample:
    """What was chosen, in the order of the log, and from what.

    Attributes:
        distinct: groups of duplicates in the log.
        exact_duplicates: requests that repeat an earlier one; ``near_duplicates`` resemble one.
        strata: by name; every request of the log belongs to one.
        ignored_tags: keys that have too many values to be kinds of request.
    """

    chosen: list[SampledRequest]
    distinct: int
    exact_duplicates: int
    near_duplicates: int
    strata: list[StratumCount]
    ignored_tags: list[str]


def sample_requests(requests: Sequence[Request], cases: int, *, seed: int) -> LogSample:
    """A stratified sample without duplicates, whose weights restore the log's mixture.

    The same requests, number and seed give the same sample.

    Args:
        requests: at least one.
        cases: at most so many.
        seed: of the random starts.

    Raises:
        UsageError: ``cases`` is fewer than the kinds of request.
    """
    groups = group_duplicates([request.text for request in requests])
    texts = len({normalize(request.text) for request in requests})
    clarify = [_clarify([requests[i] for i in group]) for group in groups]
    tags, ignored = _useful_tags([requests[group[0]].tags for group in groups])
    properties = [
        _properties(requests[group[0]], own, reasons)
        for group, own, reasons in zip(groups, tags, clarify, strict=True)
    ]
    common = count_properties(groups, properties)
    strata = stratify(groups, properties)
    taken = choose(strata, cases, minimum=LEAST_CASES, seed=seed)
    lead = {group[0]: number for number, group in enumerate(groups)}
    chosen = []
    for stratum, found in zip(strata, taken, strict=True):
        for case in found:
            group = stratum.groups[case.group]
            number = lead[group[0]]
            sampled = SampledRequest(
                request=requests[group[case.member]],
                weight=case.weight,
                stratum=stratum.name,
                seen=len(group),
                properties=tuple(name for name in properties[number] if name in common),
                clarify=clarify[number],
            )
            chosen.append(sampled)
    return LogSample(
        chosen=sorted(chosen, key=lambda case: case.request.line),
        distinct=len(groups),
        exact_duplicates=len(requests) - texts,
        near_duplicates=texts - len(groups),
        strata=[
            StratumCount(s.name, s.traffic, len(s.groups), len(found))
            for s, found in zip(strata, taken, strict=True)
        ],
        ignored_tags=ignored,
    )


def _user_turns(request: Request) -> int:
    return sum(turn.role == "user" for turn in request.turns)


def _properties(request: Request, tags: Sequence[str], clarify: Sequence[str]) -> tuple[str, ...]:
    found = {*properties_of(request.text, turns=_user_turns(request)), *tags}
    if clarify:
        found.add(CLARIFY)
    return tuple(sorted(found - {ALL_CASES}))


def _clarify(group: Sequence[Request]) -> tuple[str, ...]:
    """Reasons of a group's leader, whose exact repeats tell how it was answered."""
    first = group[0]
    reasons = clarify_reasons(first.turns[-1].content, turns=_user_turns(first))
    plain = normalize(first.text)
    answers = [r.answer for r in group if r.answer is not None and normalize(r.text) == plain]
    return (*reasons, SEVERAL_READINGS) if has_several_readings(answers) else reasons


def _useful_tags(tags: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[str]]:
    """The tags of each group that say a kind of request, and the keys that do not."""
    holders: dict[str, int] = defaultdict(int)
    for own in tags:
        for tag in own:
            holders[tag] += 1
    values: dict[str, int] = defaultdict(int)
    for tag, count in holders.items():
        values[_key(tag)] += count >= LEAST_DISTINCT
    # An identifier that hardly ever repeats is as little a kind as one with many values.
    ignored = {key for key, count in values.items() if count == 0 or count > MAX_TAG_VALUES}
    kept = [[tag for tag in own if _key(tag) not in ignored] for own in tags]
    return kept, sorted(key or "tags" for key in ignored)


def _key(tag: str) -> str:
    """``user`` of ``user=17``; empty for a plain tag."""
    return tag.partition("=")[0] if "=" in tag else ""
