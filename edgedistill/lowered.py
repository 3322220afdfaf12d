"""Nobody lowers a floor in silence: what earlier releases were held to, against the recipe now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from edgedistill.evaluate.capabilities import TOLERATED_LOSS
from edgedistill.evaluate.judge import LARGEST_VALUE
from edgedistill.evaluate.suite import ALL_CASES
from edgedistill.floor import Floor, SliceSpec
from edgedistill.manifest import MANIFEST_FILE, Manifest
from edgedistill.results import LoweredClause

LOSS, UNDECIDED = "loss", "undecided"

Place = tuple[str, str]  # slice, clause


def lowered_clauses(
    earlier: Iterable[Manifest], floor: Floor | None, slices: Mapping[str, SliceSpec]
) -> list[LoweredClause]:
    """Every clause that an earlier release was held to and that is weaker now, or gone.

    A release remembers what was lowered before it, so that building twice hides nothing; an entry
    goes when the clause is as strict again.

    Args:
        earlier: manifests of the same recipe.
        floor: of the recipe now; ``slices`` its capability spec.
    """
    strictest: dict[Place, float] = {}
    for manifest in earlier:
        names = {*manifest.slices, *slices}
        promised = held_limits(manifest.floor, manifest.slices, names)
        remembered = {(c.slice, c.clause): c.was for c in manifest.floor_lowered}
        for place, limit in [*promised.items(), *remembered.items()]:
            if place not in strictest or is_weaker(place[1], strictest[place], limit):
                strictest[place] = limit
    held = held_limits(floor, slices, {name for name, _ in strictest})
    found = [
        LoweredClause(slice=name, clause=clause, was=was, now=held.get((name, clause)))
        for (name, clause), was in strictest.items()
        if is_weaker(clause, held.get((name, clause)), was)
    ]
    return sorted(found, key=lambda c: (c.slice != ALL_CASES, c.slice, c.clause))


def held_limits(
    floor: Floor | None, slices: Mapping[str, SliceSpec], names: Iterable[str]
) -> dict[Place, float]:
    """Every clause that is held, with its limit.

    Args:
        floor: on all cases.
        slices: the capability spec.
        names: slices of which the loss is looked at too; one that the spec does not name may lose
            little, one that it names with clauses alone, or as sacrificed, may lose anything.
    """
    if floor is None and not slices:
        return {}
    held = {(ALL_CASES, clause): v for clause, v in (floor or Floor()).all_limits().items()}
    if (floor or Floor()).when_underpowered == "fail":
        held[ALL_CASES, UNDECIDED] = 0.0
    for name, spec in slices.items():
        held |= {(name, clause): limit for clause, limit in spec.all_limits().items()}
    for name in set(names) - {ALL_CASES}:
        if name not in slices:
            held[name, LOSS] = TOLERATED_LOSS
        elif slices[name].protected:
            held[name, LOSS] = 0.0
    return held


def is_weaker(clause: str, limit: float | None, than: float) -> bool:
    """Whether a limit of a clause asks for less than another; None asks for nothing."""
    if limit is None:
        return True
    return limit > than if clause in {LOSS, UNDECIDED, *LARGEST_VALUE} else limit < than


def read_manifests(exports: Path) -> list[Manifest]:
    """The manifests of a recipe's exports, ``<rung>/<format>/manifest.json``.

    One that cannot be read says nothing: the build replaces it.
    """
    found = []
    for path in sorted(exports.glob(f"*/*/{MANIFEST_FILE}")):
        try:
            found.append(Manifest.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return found
