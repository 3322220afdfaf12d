"""From a recipe to the candidates of its search: what arithmetic alone leaves to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgedistill.build import Prepared
from edgedistill.cache import Cache
from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import UsageError
from edgedistill.estimate import artifact_bytes, facts_of_rung
from edgedistill.plan import ArtifactSteps, BuildSteps, plan_build
from edgedistill.plugins import plugin_names
from edgedistill.preview import count_cases, plan_artifacts, plan_steps
from edgedistill.recipe import Recipe
from edgedistill.recipe_check import check_recipe
from edgedistill.recipe_load import LoadedRecipe, load_recipe
from edgedistill.recipe_yaml import read_yaml
from edgedistill.report.words import megabytes
from edgedistill.search.ladder import LADDER, Remedy, StepData, cost_rank

# Where a recipe has no rung yet: it is looked at with an unquantized one.
NO_RUNG: dict[str, list[StepData]] = {"float": []}


@dataclass(frozen=True)
class Candidate:
    """One rung that a search may measure.

    Attributes:
        name, what, steps: as of a :class:`Remedy`, the steps for this student.
        source: the ladder, or a rung of the recipe.
        gentler: names of candidates; where one of them misses the floor this one is not tried.
        planned_bytes: format -> bytes of its weights; the format that judges comes first.
        planned_seconds: of what the cache lacks.
        left_out: why arithmetic alone rules it out; None if it does not.
    """

    name: str
    what: str
    steps: list[StepData]
    source: Literal["ladder", "recipe"]
    gentler: tuple[str, ...]
    planned_bytes: dict[str, int]
    planned_seconds: float = 0.0
    left_out: str | None = None

    @property
    def judging_format(self) -> str:
        """The format that runs the whole suite."""
        return next(iter(self.planned_bytes))

    @property
    def total_bytes(self) -> int:
        """Of its weights in all formats together, by arithmetic."""
        return sum(self.planned_bytes.values())


@dataclass(frozen=True)
class Field:
    """What a search is about.

    Attributes:
        prepared: a recipe whose rungs are the candidates that are left, and their steps.
        candidates: all, in the order in which they come up.
        notes: what of the ladder is missing, and why.
    """

    prepared: Prepared
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    @property
    def open(self) -> list[Candidate]:
        """The candidates that have to be measured to be known."""
        return [c for c in self.candidates if c.left_out is None]

    def steps_of(self, name: str) -> BuildSteps:
        """The steps of one candidate, and of the reference."""
        steps = self.prepared.steps
        own = tuple(a for a in steps.artifacts if a.rung == name)
        return BuildSteps(steps.reference, steps.reference_quality, own)

    def judging(self, name: str) -> ArtifactSteps:
        """A candidate in the format that runs the whole suite."""
        own = self.steps_of(name).artifacts
        return next((a for a in own if a.judges), own[0])


def find_candidates(path: Path, student: str | None, cache: CachePlace) -> Field:
    """Read the recipe, make the candidates of the ladder and of its own rungs, plan their steps.

    Raises:
        RecipeError: with every mistake in the recipe; its rungs may be empty or absent here.
        UsageError: the recipe has no floor to search under.
        UnavailableError: the student lies on a hub that cannot be reached.
    """
    own = _own_rungs(path)
    loaded = load_recipe(path, student, own or NO_RUNG)
    _refuse_without_floor(loaded.recipe, path)
    _, facts = loaded.fetched()
    layers = facts_of_rung(facts, loaded.recipe.stages).layers
    remedies, notes = _usable(loaded.recipe)
    names = _names(own, remedies)
    rungs = {**own, **{names[r.name]: r.for_layers(layers) for r in remedies}}
    known = load_recipe(path, student, rungs)
    source, facts = known.fetched()
    candidates = _Candidates(known, facts, rungs)
    found = [candidates.of_recipe(name) for name in own]
    found += [candidates.of_ladder(names[r.name], r, names) for r in remedies]
    return _planned(known.recipe, facts, source, found, notes, open_cache(cache))


def in_order(candidate: Candidate) -> tuple[int, int]:
    """The order of a climb: the cheapest remedy first.

    Rounding takes seconds, so its gentlest form is first: what fails there ends most searches.
    Dearer remedies come up with their smallest form first: what passes there spares the larger.
    """
    rank = cost_rank([name for step in candidate.steps for name in step])
    return rank, -candidate.total_bytes if rank <= 0 else candidate.total_bytes


def judged_first(recipe: Recipe, formats: Sequence[str]) -> list[str]:
    """The formats, each once, the one that runs the whole suite before the others."""
    judging = recipe.evaluate.judging(formats) or formats[0]
    return list(dict.fromkeys([judging, *formats]))


def shared_keys(steps: BuildSteps) -> set[str]:
    """The keys of the steps that make and score the reference, which belong to no candidate."""
    ends = [s for s in (steps.reference, steps.reference_quality) if s is not None]
    return {step.key for end in ends for step in end.lineage()}


class _Candidates:
    def __init__(
        self, loaded: LoadedRecipe, facts: DecoderFacts, rungs: Mapping[str, list[StepData]]
    ) -> None:
        self._recipe = loaded.recipe
        self._facts = facts
        self._rungs = rungs
        self._wrong: dict[str, str] = {}
        for finding in check_recipe(loaded.recipe, facts):
            if finding.place[:1] == ("rungs",):
                self._wrong.setdefault(str(finding.place[1]), finding.message)

    def of_recipe(self, name: str) -> Candidate:
        return self._candidate(name, "a rung of the recipe", "recipe", ())

    def of_ladder(self, name: str, remedy: Remedy, names: Mapping[str, str]) -> Candidate:
        gentler = tuple(names[g] for g in remedy.gentler if g in names)
        return self._candidate(name, remedy.what, "ladder", gentler)

    def _candidate(
        self, name: str, what: str, source: Literal["ladder", "recipe"], gentler: tuple[str, ...]
    ) -> Candidate:
        wrong, planned = self._wrong.get(name), {}
        if wrong is None:
            stages = [*self._recipe.stages, *self._recipe.rungs[name]]
            formats = judged_first(self._recipe, self._recipe.formats_of(name))
            planned = {f: artifact_bytes(self._facts, stages, f) for f in formats}
            wrong = self._over_budget(planned)
        return Candidate(name, what, self._rungs[name], source, gentler, planned, left_out=wrong)

    def _over_budget(self, planned: Mapping[str, int]) -> str | None:
        for name, target in self._recipe.all_targets().items():
            limit_mb, size_bytes = target.budget.file_mb, planned[target.format]
            if limit_mb is not None and size_bytes > limit_mb * 1e6:
                size = megabytes(size_bytes)
                return f"over budget: {name} allows {limit_mb:g} MB, its weights take {size} MB"
        return None


def _own_rungs(path: Path) -> dict[str, list[StepData]]:
    """The rungs that a recipe has, as its YAML has them; what is wrong with it is said later."""
    data = read_yaml(path).data
    rungs = data.get("rungs") if isinstance(data, dict) else None
    if rungs is None:
        return {}
    if not isinstance(rungs, dict):
        load_recipe(path)
    return dict(rungs)


def _refuse_without_floor(recipe: Recipe, path: Path) -> None:
    if not recipe.suite or not (recipe.floor or recipe.slices):
        what = "suite" if not recipe.suite else "floor"
        raise UsageError(
            f"there is no {what}, so nothing tells which candidate is good enough",
            where=str(path),
            hint="a search needs `suite` and `floor`; budgets in `targets` narrow it further",
        )


def _usable(recipe: Recipe) -> tuple[list[Remedy], tuple[str, ...]]:
    """The remedies that can be tried at all, and a line for each that cannot."""
    installed = plugin_names("stages")
    usable, notes = [], []
    for remedy in LADDER:
        missing = [name for name in remedy.stages() if name not in installed]
        if missing:
            notes.append(f"{remedy.name}: left out, there is no stage {missing[0]} here")
        elif remedy.reads_text and not (recipe.calibration.file or recipe.calibration.own_text):
            notes.append(f"{remedy.name}: left out, it needs text to learn from: calibration.file")
        else:
            usable.append(remedy)
    return usable, tuple(notes)


def _names(own: Mapping[str, Any], remedies: list[Remedy]) -> dict[str, str]:
    """Remedy -> name of its rung, which no rung of the recipe has."""
    names = {}
    for remedy in remedies:
        name, number = remedy.name, 2
        while name in own:
            name, number = f"{remedy.name}-{number}", number + 1
        names[remedy.name] = name
    return names


def _planned(
    recipe: Recipe,
    facts: DecoderFacts,
    student: Path,
    found: list[Candidate],
    notes: tuple[str, ...],
    cache: Cache,
) -> Field:
    """The candidates in order, with their steps and what those are expected to take."""
    from edgedistill.bench.machine import fingerprint

    left = {c.name for c in found if c.left_out is None}
    recipe = recipe.model_copy(
        update={"rungs": {n: steps for n, steps in recipe.rungs.items() if n in left}}
    )
    prepared = Prepared(recipe, facts, plan_build(recipe, student, machine=fingerprint()))
    found = _without_twins(found, prepared.steps)
    field = Field(prepared, tuple(sorted(found, key=in_order)), notes)
    return _with_seconds(field, cache)


def _without_twins(found: list[Candidate], steps: BuildSteps) -> list[Candidate]:
    """Of candidates that are the same steps under two names, the first.

    The recipe's own come first; they take over what is known of the ladder's.
    """
    keys = {a.rung: a.student.key for a in steps.artifacts}
    first: dict[str, str] = {}
    alias = {c.name: first.setdefault(keys.get(c.name, c.name), c.name) for c in found}
    gentler = {alias[c.name]: c.gentler for c in found}
    kept = []
    for candidate in found:
        if alias[candidate.name] == candidate.name:
            known = tuple(alias[g] for g in gentler[candidate.name])
            kept.append(replace(candidate, gentler=known))
    return kept


def _with_seconds(field: Field, cache: Cache) -> Field:
    prepared = field.prepared
    cases = count_cases(prepared.recipe.suite)
    steps = plan_steps(prepared, plan_artifacts(prepared, cases), cases, cache)
    lacking = {s.key: s.seconds or 0.0 for s in steps if not s.cached}
    shared = shared_keys(prepared.steps)
    timed = []
    for candidate in field.candidates:
        seconds = 0.0
        if candidate.left_out is None:
            judging = field.judging(candidate.name)
            own = {s.key for s in (judging.compare or judging.verify).lineage()} - shared
            seconds = sum(lacking.get(key, 0.0) for key in own)
        timed.append(replace(candidate, planned_seconds=seconds))
    return Field(prepared, tuple(timed), field.notes)
