"""From a YAML file to a recipe, or to the list of everything that is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgedistill.content import map_paths
from edgedistill.decoder import DecoderFacts
from edgedistill.errors import EdgedistillError, RecipeError, UsageError
from edgedistill.intake import from_home, is_remote, read_facts, resolve_student
from edgedistill.plugins import did_you_mean, load_plugin, plugin_names
from edgedistill.recipe import Recipe, StageStep
from edgedistill.recipe_check import check_paths, check_recipe
from edgedistill.recipe_yaml import Finding, Place, YamlDocument, dotted, read_yaml

# What a required key is taken for while the rest of a broken recipe is checked.
STAND_INS: dict[str, Any] = {
    "name": "recipe",
    "student": "",
    "context_tokens": 8,
    "rungs": {"float": []},
    "export": ["gguf"],
}
REPAIRS = 4
# What a stage takes from the recipe where it has such a field and does not state it itself.
SHARED_FIELDS = ("calibration", "chat")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that can be built.

    Attributes:
        recipe: with absolute paths.
        path: of the YAML.
        student: the directory or file that it starts from; None until a hub model is fetched.
        facts: of that student; None likewise.
        tried: whether its rungs are somebody else's, who looks at what is wrong with each.
    """

    recipe: Recipe
    path: Path
    student: Path | None
    facts: DecoderFacts | None
    tried: bool = False

    def fetched(self) -> tuple[Path, DecoderFacts]:
        """Student and facts, after a download where one is needed.

        Raises:
            RecipeError: the recipe does not suit the student, now that it is known.
            UnavailableError: the hub cannot be reached.
        """
        if self.student is not None and self.facts is not None:
            return self.student, self.facts
        student = resolve_student(self.recipe.student, self.path.parent)
        facts = read_facts(student)
        document = read_yaml(self.path)
        problems = [_problem(document, f) for f in _findings(self.recipe, facts, self.tried)]
        if problems:
            raise RecipeError(problems)
        return student, facts


def load_recipe(
    path: Path, student: str | None = None, rungs: Mapping[str, Any] | None = None
) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: of the YAML; paths in it are relative to its directory.
        student: replaces the recipe's own; relative to the working directory.
        rungs: as the YAML would have them, to be tried instead of the recipe's own in all targets.
            What makes one of them impossible is then the caller's to find, by ``check_recipe``.

    Raises:
        RecipeError: with every problem, each with its line, key, value and a hint.
    """
    document = read_yaml(path)
    problems = list(document.problems)
    data = document.data
    if not isinstance(data, dict):
        if not problems:
            problems.append(UsageError("is empty, or not a mapping", where=str(path)))
        raise RecipeError(problems)
    if student is not None:
        data = {**data, "student": student if "://" in student else str(Path(student).absolute())}
    if rungs is not None:
        data = _with_rungs(data, rungs)
    recipe, errors = _validate(data)
    problems += [_invalid(document, error) for error in errors]
    source, facts = None, None
    if recipe is not None:
        recipe = _with_formats(_with_waivers(_absolute(recipe, path.parent), path))
        findings = check_paths(recipe)
        if not findings:
            source, facts, student_problems = _open_student(recipe, document)
            problems += student_problems
            findings = _findings(recipe, facts, rungs is not None)
        problems += [_problem(document, finding) for finding in findings]
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=_line))
    return LoadedRecipe(_with_shared_fields(recipe), path, source, facts, rungs is not None)


def _with_rungs(data: dict[Any, Any], rungs: Mapping[str, Any]) -> dict[Any, Any]:
    """The data with other rungs, which go to every target."""
    data = {**data, "rungs": dict(rungs)}
    targets = data.get("targets")
    if isinstance(targets, dict):
        kept = {
            name: {k: v for k, v in target.items() if k != "rungs"}
            if isinstance(target, dict)
            else target
            for name, target in targets.items()
        }
        data["targets"] = kept
    return data


def _findings(recipe: Recipe, facts: DecoderFacts | None, tried: bool) -> list[Finding]:
    """What is wrong with the recipe; but for its rungs and their sizes, where they are tried."""
    found = check_recipe(recipe, facts)
    if not tried:
        return found
    return [
        finding
        for finding in found
        if finding.place[:1] != ("rungs",) and finding.place[2:] != ("budget", "file_mb")
    ]


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    changed: Recipe = map_paths(recipe, lambda p: base.absolute() / from_home(p))
    return changed


def _with_waivers(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the place of its waivers, which needs no word in it."""
    from edgedistill.evaluate.waivers import waivers_beside

    if recipe.waivers is not None:
        return recipe
    return recipe.model_copy(update={"waivers": waivers_beside(path.absolute())})


def _with_formats(recipe: Recipe) -> Recipe:
    """The recipe with the formats of each rung in the stages that go by their layouts."""

    def formats_in(steps: Iterable[StageStep], formats: Iterable[str]) -> tuple[StageStep, ...]:
        return tuple(_with_fields(step, {"formats": tuple(formats)}) for step in steps)

    everywhere = dict.fromkeys(f for rung in recipe.rungs for f in recipe.formats_of(rung))
    rungs = {n: formats_in(steps, recipe.formats_of(n)) for n, steps in recipe.rungs.items()}
    stages = formats_in(recipe.stages, everywhere)
    return recipe.model_copy(update={"stages": stages, "rungs": rungs})


def _with_shared_fields(recipe: Recipe) -> Recipe:
    """The recipe with its calibration and chat in the stages that take them.

    They are fields of the stage then, so they are part of its key, and of no other stage's.
    """

    def shared(steps: Iterable[StageStep]) -> tuple[StageStep, ...]:
        return tuple(_with_shared(step, recipe) for step in steps)

    rungs = {name: shared(steps) for name, steps in recipe.rungs.items()}
    return recipe.model_copy(update={"stages": shared(recipe.stages), "rungs": rungs})


def _with_shared(step: StageStep, recipe: Recipe) -> StageStep:
    stated = [name for name in SHARED_FIELDS if name in recipe.model_fields_set]
    return _with_fields(step, {name: getattr(recipe, name) for name in stated})


def _with_fields(step: StageStep, values: Mapping[str, Any]) -> StageStep:
    """The step with those of the values that its stage takes and does not state itself."""
    missing = type(step.config).model_fields.keys() - step.config.model_fields_set
    fields = {name: value for name, value in values.items() if name in missing}
    return step.model_copy(update={"config": step.config.model_copy(update=fields)})


def _open_student(
    recipe: Recipe, document: YamlDocument
) -> tuple[Path | None, DecoderFacts | None, list[UsageError]]:
    if is_remote(recipe.student) or not recipe.student:
        return None, None, []
    try:
        source = resolve_student(recipe.student, document.path.parent)
        return source, read_facts(source), []
    except OSError as error:
        problem = Finding(("student",), f"cannot be a path: {error.strerror}")
        return None, None, [_problem(document, problem)]
    except EdgedistillError as error:
        return None, None, [_problem(document, Finding(("student",), str(error)))]


def _validate(data: dict[Any, Any]) -> tuple[Recipe | None, list[ErrorDetails]]:
    """The recipe, and all errors of the first look.

    A recipe with errors is repaired (wrong parts are dropped) so that the rest can be checked too;
    None when even that does not help.
    """
    errors: list[ErrorDetails] = []
    data = copy.deepcopy(data)
    for _ in range(REPAIRS):
        try:
            return Recipe.model_validate(data), errors
        except ValidationError as error:
            found = error.errors(include_url=False)
            errors = errors or found
            for item in reversed(found):
                _drop(data, item)
    return None, errors


def _drop(data: dict[Any, Any], error: ErrorDetails) -> None:
    place = _place(data, error["loc"])
    if not place:  # the recipe as a whole: neither or both of export and targets
        data.pop("targets", None)
        data["export"] = STAND_INS["export"]
        return
    if "stages" in place[:1] or (place[0] == "rungs" and len(place) > 2):
        place = place[: 2 if place[0] == "stages" else 3]  # the whole stage
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    if place[-1] in STAND_INS and len(place) == 1:
        parent[place[-1]] = STAND_INS[str(place[-1])]
    elif place[0] == "rungs" and len(place) == 2:
        parent[place[-1]] = []
    elif place[-1] in _keys(parent):
        del parent[place[-1]]
    else:  # missing: drop what lacks it
        _drop(data, {**error, "loc": place[:-1]})


def _place(data: Any, location: tuple[int | str, ...]) -> Place:
    """Where pydantic's location lies in the YAML, which also names a stage's key."""
    place: list[int | str] = []
    node = data
    for key in location:
        in_list = bool(place) and isinstance(place[-1], int)
        if in_list and isinstance(node, dict) and key not in node and len(node) == 1:
            stage = next(iter(node))
            place.append(stage)
            node = node[stage]
        if key in _keys(node):
            node = node[key]
        elif key != location[-1] or not isinstance(node, dict | None):
            continue  # a member of a union, or the only element of a list given as a scalar
        else:
            node = None
        place.append(key)
    return tuple(place)


def _keys(node: Any) -> Collection[Any]:
    if isinstance(node, dict):
        return node
    return range(len(node)) if isinstance(node, list) else ()


def _invalid(document: YamlDocument, error: ErrorDetails) -> UsageError:
    place = _place(document.data, error["loc"])
    context = error.get("ctx", {})
    hint = context.get("hint")
    if error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "extra_forbidden":
        known = _known_keys(place)
        message, hint = "is not a key here", did_you_mean(str(place[-1]), known, "keys")
    else:
        message = error["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if error["type"] != "edgedistill" and place and not isinstance(error["input"], dict):
            message += f", not {error['input']!r}"
    return _problem(document, Finding(place, message, hint))


def _known_keys(place: Place) -> list[str]:
    """The keys that the mapping around an unknown key may have."""
    model: type[BaseModel] | None = Recipe
    for key in place[:-1]:
        if model is StageStep:
            names = plugin_names("stages")
            model = load_plugin("stages", str(key)) if key in names else model
        elif model is not None and key in model.model_fields:
            model = _model_in(model.model_fields[str(key)].annotation) or model
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as ``dict[str, tuple[Model, ...]]`` leads to."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)


def _problem(document: YamlDocument, finding: Finding) -> UsageError:
    key = dotted(finding.place)
    text = f"{key}: {finding.message}" if key else finding.message
    return UsageError(text, where=document.where(finding.place), hint=finding.hint)


def _line(problem: UsageError) -> int:
    number = (problem.where or "").rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
