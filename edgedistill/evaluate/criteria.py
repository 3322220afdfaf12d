"""What a file is held to: the floor, the capability spec and the conversation, of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedistill.chat import Chat
from edgedistill.errors import UsageError
from edgedistill.evaluate.waivers import waivers_beside
from edgedistill.floor import Floor, SliceSpec
from edgedistill.recipe import RouterSettings
from edgedistill.recipe_yaml import YamlDocument, dotted, read_yaml


class Criteria(BaseModel):
    """The keys of a recipe that an evaluation needs; its other keys are not looked at.

    Attributes:
        chat: None where nothing is said, which leaves it to the artifact's manifest.
        context_tokens: likewise.
        router: fits a confidence for the app, if it is asked for.
        waivers: where the losses lie that somebody consented to; None without a recipe.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    floor: Floor | None = None
    slices: dict[str, SliceSpec] = {}
    chat: Chat | None = None
    context_tokens: Annotated[int, Field(ge=8)] | None = None
    router: RouterSettings | None = None
    waivers: Path | None = None


def read_criteria(source: str | None) -> Criteria:
    """The criteria of a recipe, or a floor that is written out.

    Args:
        source: the path of a YAML or JSON file with the keys of a recipe, or a floor as JSON, such
            as ``{"retention": 0.97}``; None gives no floor.

    Raises:
        UsageError: it is neither, with every mistake in it.
    """
    if source is None:
        return Criteria()
    if source.lstrip().startswith("{"):
        return _validate({"floor": _parse(source)}, None)
    document = read_yaml(Path(source))
    if document.problems:
        raise _all(document.problems)
    if not isinstance(document.data, dict):
        raise UsageError("holds no keys of a recipe", where=source)
    found, path = _validate(document.data, document), Path(source)
    stated = path.parent / found.waivers.expanduser() if found.waivers else waivers_beside(path)
    return found.model_copy(update={"waivers": stated})


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"the floor is not JSON ({error})", hint="""write it as '{"retention": 0.97}'"""
        ) from error


def _validate(data: dict[Any, Any], document: YamlDocument | None) -> Criteria:
    try:
        return Criteria.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            message = item["msg"].removeprefix("Value error, ")
            text = f"{dotted(item['loc'])}: {message}, not {item['input']!r}"
            where = document.where(item["loc"]) if document else None
            problems.append(UsageError(text, where=where))
        raise _all(problems) from error


def _all(problems: list[UsageError]) -> UsageError:
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join(f"- {problem}" for problem in problems)
    return UsageError(f"{len(problems)} problems in the floor\n{lines}")
