"""What a recipe that is well-formed still cannot mean; all of it is known before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edgedistill.decoder import DecoderFacts
from edgedistill.estimate import artifact_bytes
from edgedistill.exporter import Exporter
from edgedistill.kv_cache import kv_cache_problems
from edgedistill.plugins import did_you_mean, load_plugin, plugin_names
from edgedistill.quantized import Grid
from edgedistill.recipe import Recipe, StageStep
from edgedistill.recipe_evaluation import check_evaluation
from edgedistill.recipe_yaml import Finding, Place

# Adapters make the reference, so they belong to what all rungs share.
REFERENCE_STAGES = ("merge_lora",)


def check_recipe(recipe: Recipe, facts: DecoderFacts | None) -> list[Finding]:
    """Everything that is wrong with the recipe.

    Args:
        recipe: its paths absolute.
        facts: of the student; None when they are not known yet, which leaves out what needs them.
    """
    findings = [*_check_files(recipe), *_check_names(recipe)]
    findings += [*check_evaluation(recipe), *_check_calibration(recipe)]
    findings += [Finding(*problem) for problem in kv_cache_problems(recipe, facts)]
    if facts is not None:
        findings += [*_check_context(recipe, facts), *_check_stages(recipe, facts)]
        findings += _check_formats(recipe, facts)
        findings += [*_check_grids(recipe, facts), *_check_budgets(recipe, facts)]
    return findings


def check_paths(recipe: Recipe) -> list[Finding]:
    """Paths that the operating system does not even look at; nothing else can be checked then."""
    findings = []
    for place, path in _paths(recipe, ()):
        try:
            path.exists()
        except OSError as error:  # a name that is too long, a directory that may not be read
            findings.append(Finding(place, f"cannot be a path: {error.strerror}"))
    return findings


def _check_files(recipe: Recipe) -> Iterator[Finding]:
    for place, path in _paths(recipe, ()):
        if place != ("waivers",) and not path.exists():
            yield Finding(place, f"there is no such file or directory: {path}")


def _paths(value: Any, place: Place) -> Iterator[tuple[Place, Path]]:
    """Every path in the recipe, with its place as the YAML has it."""
    if isinstance(value, Path):
        yield place, value
    elif isinstance(value, StageStep):
        yield from _paths(value.config, (*place, value.name))
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name), (*place, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*place, key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _paths(item, (*place, index))


def _check_names(recipe: Recipe) -> Iterator[Finding]:
    from edgedistill.release import EVALUATION

    rungs = list(recipe.rungs)
    for name, target in recipe.targets.items():
        for index, rung in enumerate(target.rungs or ()):
            if rung not in rungs:
                yield Finding(
                    ("targets", name, "rungs", index),
                    f"there is no rung {rung!r}",
                    did_you_mean(rung, rungs, "rungs"),
                )
    for index, name in enumerate(recipe.export or ()):
        if name in (recipe.export or ())[:index]:
            yield Finding(("export", index), f"{name!r} is given twice")
    if EVALUATION in recipe.rungs:
        taken = "this directory of the exports holds the scores of all rungs"
        yield Finding(("rungs", EVALUATION), taken, "give the rung another name")
    for rung, steps in recipe.rungs.items():
        for index, step in enumerate(steps):
            if step.name in REFERENCE_STAGES:
                yield Finding(
                    ("rungs", rung, index, step.name),
                    "rungs are compared with the student after its adapters, so none is in a rung",
                    "move it to `stages`",
                )


def _check_calibration(recipe: Recipe) -> Iterator[Finding]:
    """Stages that read a text of the domain, and neither they nor the recipe name one."""
    parts: list[tuple[Place, Sequence[StageStep]]] = [(("stages",), recipe.stages)]
    parts += [(("rungs", name), steps) for name, steps in recipe.rungs.items()]
    for place, steps in parts:
        for index, step in enumerate(steps):
            own = "calibration" in step.config.model_fields_set
            stated = getattr(step.config if own else recipe, "calibration", recipe.calibration)
            if step.config.needs_text and stated.file is None:
                yield Finding(
                    (*place, index, step.name),
                    "there is no text of the domain",
                    "give `calibration: {file: ...}`",
                )


def _check_context(recipe: Recipe, facts: DecoderFacts) -> Iterator[Finding]:
    if recipe.context_tokens > facts.max_context_tokens:
        yield Finding(
            ("context_tokens",),
            f"{recipe.context_tokens} is more than the student's {facts.max_context_tokens}",
            f"the most that it can hold is {facts.max_context_tokens}",
        )
        return
    for name in dict.fromkeys(_format_places(recipe).values()):
        most, words = load_plugin("exporters", name)().context_limit(facts)
        if recipe.context_tokens > most:
            yield Finding(
                ("context_tokens",),
                f"{recipe.context_tokens} is more than {words}",
                f"the most that {name} can hold of this student is {most}",
            )


def _format_places(recipe: Recipe) -> dict[Place, str]:
    places: dict[Place, str] = {("export", i): name for i, name in enumerate(recipe.export or ())}
    return places | {
        ("targets", n, "format"): target.format for n, target in recipe.targets.items()
    }


def _check_formats(recipe: Recipe, facts: DecoderFacts) -> Iterator[Finding]:
    """Formats that cannot carry what the student computes, or what the rungs make of it."""
    able = [n for n in plugin_names("exporters") if not _format_problems(n, facts)]
    hint = f"export it to {' or '.join(able)}" if able else None
    for place, name in _format_places(recipe).items():
        for problem in _format_problems(name, facts):
            yield Finding(place, problem, hint)
    for rung, steps in recipe.rungs.items():
        after = facts
        for step in [*recipe.stages, *steps]:
            after = step.config.facts_after(after)
        for name in recipe.formats_of(rung):
            new = set(_format_problems(name, after)) - set(_format_problems(name, facts))
            for problem in sorted(new):
                yield Finding(("rungs", rung), f"what its stages make has {problem}")


def _format_problems(name: str, facts: DecoderFacts) -> list[str]:
    found: list[str] = load_plugin("exporters", name)().problems(facts)
    return found


def _check_stages(recipe: Recipe, facts: DecoderFacts) -> Iterator[Finding]:
    yield from _along(recipe.stages, ("stages",), facts, [])
    for rung, steps in recipe.rungs.items():
        yield from _along(steps, ("rungs", rung), facts, recipe.stages)


def _along(
    steps: Sequence[StageStep], place: Place, facts: DecoderFacts, before: Sequence[StageStep]
) -> Iterator[Finding]:
    """Hold each step against what arrives there.

    Args:
        steps: that are checked.
        place: of their list.
        facts: of the recipe's student.
        before: steps that come first.
    """
    grids: set[Grid] = set()
    for index, step in enumerate([*before, *steps]):
        if index >= len(before):
            here = (*place, index - len(before), step.name)
            yield from _stage_problems(step, here, facts, grids)
        grids = _possible_grids(step, facts) or grids
        facts = step.config.facts_after(facts)


def _possible_grids(step: StageStep, facts: DecoderFacts) -> set[Grid]:
    """Those that a step may put the blocks' matrices on; of a mixture, all that it chooses from."""
    found: set[Grid] = set()
    for name in facts.linears(0).values():  # blocks are alike
        expected = step.config.expected_grids(name, facts)
        found |= set(expected if len(expected) == 1 else step.config.grids(facts))
    return found


def _stage_problems(
    step: StageStep, place: Place, facts: DecoderFacts, grids: set[Grid]
) -> Iterator[Finding]:
    if not grids and not all(path.exists() for _, path in _paths(step, ())):
        return  # that is said already, and the stage may want to read them
    problems = step.config.problems(facts, bool(grids))
    for problem in problems or step.config.problems_on(grids):
        yield Finding(place, problem)


def _check_grids(recipe: Recipe, facts: DecoderFacts) -> Iterator[Finding]:
    everywhere = dict.fromkeys(f for rung in recipe.rungs for f in recipe.formats_of(rung))
    yield from _unheld(recipe.stages, ("stages",), list(everywhere), facts)
    for rung, steps in recipe.rungs.items():
        yield from _unheld(steps, ("rungs", rung), recipe.formats_of(rung), facts)


def _unheld(
    steps: Sequence[StageStep], place: Place, formats: Sequence[str], facts: DecoderFacts
) -> Iterator[Finding]:
    exporters = {name: load_plugin("exporters", name)() for name in formats}
    for index, step in enumerate(steps):
        for grid in step.config.grids(facts):
            unable = [name for name, exporter in exporters.items() if not exporter.holds(grid)]
            if unable:
                yield Finding(
                    (*place, index, step.name),
                    f"{grid} cannot be stored exactly in {' or '.join(unable)}",
                    "choose another grid, or give this rung targets that hold it",
                )
        for name, exporter in exporters.items():
            yield from _unlike(step, (*place, index, step.name), name, exporter, facts)


def _unlike(
    step: StageStep, place: Place, name: str, exporter: Exporter, facts: DecoderFacts
) -> Iterator[Finding]:
    """Matrices of the first block that the step puts on several grids, and the format on one."""
    first = set(facts.linears(0).values())
    for together in exporter.alike(facts):
        expected = [step.config.expected_grids(matrix, facts) for matrix in together]
        if set(together) <= first and any(grids != expected[0] for grids in expected):
            shorts = " and ".join(str(facts.short_name(matrix)) for matrix in together)
            yield Finding(
                place,
                f"{shorts} are one tensor in {name}, so they have one grid",
                "give them the same, or this rung other targets",
            )


def _check_budgets(recipe: Recipe, facts: DecoderFacts) -> Iterator[Finding]:
    """A file budget that not even the weights alone fit into, in any of the target's rungs."""
    for name, target in recipe.targets.items():
        limit = target.budget.file_mb
        rungs = [r for r in recipe.rungs if target.rungs is None or r in target.rungs]
        if limit is None or not rungs:
            continue
        sizes = {
            rung: artifact_bytes(facts, [*recipe.stages, *recipe.rungs[rung]], target.format) / 1e6
            for rung in rungs
        }
        smallest = min(sizes, key=lambda rung: sizes[rung])
        if sizes[smallest] > limit:
            yield Finding(
                ("targets", name, "budget", "file_mb"),
                f"{limit:g} MB, but the weights of the smallest rung, {smallest}, "
                f"take {sizes[smallest]:.3g} MB",
                "fewer bits, fewer layers, or a larger budget",
            )
