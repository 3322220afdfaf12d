"""What a recipe cannot mean by its suite, judge, teacher, waivers and traffic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from edgedistill.errors import EdgedistillError
from edgedistill.plugins import did_you_mean
from edgedistill.recipe import Recipe
from edgedistill.recipe_yaml import Finding


def check_evaluation(recipe: Recipe) -> Iterator[Finding]:
    """Everything that is wrong with how artifacts are to be judged.

    Args:
        recipe: its paths absolute.
    """
    yield from _check_suite(recipe)
    yield from _check_beside(recipe)
    yield from _check_judge(recipe)
    yield from _check_stopping(recipe)
    yield from _check_waivers(recipe)
    yield from _check_traffic(recipe)


def _check_suite(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.suite:
        for key in ("floor", "slices", "router", "teacher", "previous"):
            if getattr(recipe, key):
                yield Finding((key,), "there is no suite to judge it on", "give `suite`")
        return
    if not recipe.slices or not all(path.is_file() for path in recipe.suite):
        return
    from edgedistill.evaluate.suite import load_suite

    try:
        known = sorted({name for case in load_suite(recipe.suite) for name in case.slices})
    except EdgedistillError as error:
        yield Finding(("suite",), str(error))
        return
    for name, spec in recipe.slices.items():
        if name not in known:
            what = "sacrificed slice" if spec.sacrificed else "slice"
            message = f"no case of the suite is in the {what} {name!r}"
            yield Finding(("slices", name), message, did_you_mean(name, known, "the suite has"))


def _check_beside(recipe: Recipe) -> Iterator[Finding]:
    """A teacher that answers another suite, a previous release that left no scores."""
    if recipe.suite and all(path.is_file() for path in recipe.suite):
        from edgedistill.evaluate.suite import ChoiceCase, load_suite
        from edgedistill.evaluate.teacher import read_teacher
        from edgedistill.release import find_released

        try:
            choices = [c for c in load_suite(recipe.suite) if isinstance(c, ChoiceCase)]
        except EdgedistillError as error:
            if not recipe.slices:  # else it was said already
                yield Finding(("suite",), str(error))
            return
        if not choices:
            for key in ("router", "teacher", "previous"):
                if getattr(recipe, key):
                    yield Finding((key,), "the suite has no case of the kind 'choice' for it")
            return
        try:
            if recipe.teacher is not None and recipe.teacher.exists():
                read_teacher(recipe.teacher, choices)
        except EdgedistillError as error:
            yield Finding(("teacher",), str(error))
        try:
            if recipe.previous is not None and recipe.previous.exists():
                for rung in recipe.rungs:
                    for name in recipe.formats_of(rung):
                        find_released(recipe.previous, rung, name)
        except EdgedistillError as error:
            yield Finding(("previous",), str(error))


def _check_judge(recipe: Recipe) -> Iterator[Finding]:
    """A judge that no rung is exported to, and samples of formats that never run one."""
    formats = {rung: recipe.formats_of(rung) for rung in recipe.rungs}
    exported = {f for own in formats.values() for f in own}
    judge = recipe.evaluate.judge
    if judge is not None and judge not in exported:
        hint = f"the recipe exports {', '.join(sorted(exported))}"
        yield Finding(("evaluate", "judge"), f"no rung is exported to {judge!r}", hint)
    for name in recipe.evaluate.sample:
        own = [f for f in formats.values() if name in f]
        if own and all(recipe.evaluate.judging(f) == name for f in own):
            yield Finding(
                ("evaluate", "sample", name),
                f"{name} runs the whole suite, so it has no sample",
                "take it out, or name another format in `evaluate: {judge: ...}`",
            )


def _check_stopping(recipe: Recipe) -> Iterator[Finding]:
    """Sampling stops early on what is bounded, which the bits of a text are not."""
    if recipe.evaluate.stop_early and recipe.suite and all(p.is_file() for p in recipe.suite):
        from edgedistill.evaluate.suite import TextCase, load_suite

        with suppress(EdgedistillError):  # said of the suite already
            if any(isinstance(case, TextCase) for case in load_suite(recipe.suite)):
                yield Finding(
                    ("evaluate", "stop_early"),
                    "the suite holds texts, on which sampling cannot stop early",
                    "take it out, or the texts out of the suite",
                )


def _check_waivers(recipe: Recipe) -> Iterator[Finding]:
    from edgedistill.evaluate.waivers import read_waivers

    try:
        read_waivers(recipe.waivers)
    except EdgedistillError as error:
        yield Finding(("waivers",), str(error))


def _check_traffic(recipe: Recipe) -> Iterator[Finding]:
    if recipe.traffic is None or not recipe.traffic.is_file():
        return
    from edgedistill.evaluate.logs import read_logs

    try:
        read_logs(recipe.traffic)
    except EdgedistillError as error:
        yield Finding(("traffic",), str(error))
