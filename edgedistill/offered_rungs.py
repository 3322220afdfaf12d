"""The rungs that `edgedistill init` offers, from the safest to the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgedistill.decoder import DecoderFacts
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.recipe import Recipe, StageStep
from edgedistill.recipe_check import check_recipe
from edgedistill.search.ladder import StepData

_ON_8, _ON_4 = {"bits": 8}, {"bits": 4, "zero": "fixed"}
_ON_2 = {"bits": 2, "linears": {"v": _ON_8, "o": _ON_8}, "embeddings": _ON_4}


@dataclass(frozen=True)
class OfferedRung:
    """A variant of the student.

    Attributes:
        name: of the rung.
        what: it is, a line of comment each.
        data: its steps as the YAML of a recipe has them.
        steps: the same, read; ``formats`` filled in where a stage goes by them.
        reads_text: whether it trains, for which the built-in texts are too short.
    """

    name: str
    what: tuple[str, ...]
    data: tuple[StepData, ...]
    steps: tuple[StageStep, ...] = ()
    reads_text: bool = False


RUNGS = (
    OfferedRung(
        "int8",
        ("8 bits by rounding: what nothing should be lost by.",),
        ({"quantize_rtn": _ON_8},),
    ),
    OfferedRung(
        "int4",
        ("4 bits by GPTQ, embedding and head too; kernels are fastest with `zero: fixed`.",),
        ({"quantize_gptq": {**_ON_4, "embeddings": _ON_4}},),
    ),
    OfferedRung(
        "mixed",
        (
            "2 to 8 bits to whom they help most. Where matrices of the blocks get 8, and there is",
            "text of the app, `- recover: {}` behind it makes up for some of what that loses.",
        ),
        ({"quantize_mixed": {"bits_per_weight": 3.5}},),
    ),
    OfferedRung(
        "int2",
        (
            "2 bits, with the small v and o on 8, which learn to make up for the others.",
            "Small students lose too much here; the suite tells.",
        ),
        (
            {
                "quantize_gptq": {
                    "bits": 2,
                    "linears": {"v": _ON_8, "o": _ON_8},
                    "embeddings": _ON_4,
                }
            },
            {"recover": {}},
        ),
        reads_text=True,
    ),
)


def able_formats(facts: DecoderFacts) -> tuple[list[str], dict[str, str]]:
    """The formats that carry such a decoder, and of the others why not."""
    able, refused = [], {}
    for name in ("gguf", *(n for n in plugin_names("exporters") if n != "gguf")):
        problems = load_plugin("exporters", name)().problems(facts)
        if problems:
            refused[name] = "; ".join(problems)
        else:
            able.append(name)
    return able, refused


def offer_rungs(
    facts: DecoderFacts, formats: Sequence[str], context_tokens: int
) -> tuple[list[OfferedRung], dict[str, str]]:
    """The rungs that such a student can have in all formats, and of the others why not.

    Args:
        facts: of the student.
        formats: that rungs are exported to.
        context_tokens: of the recipe.
    """
    offered, left_out = [], {}
    for rung in RUNGS:
        steps = tuple(_step(data, formats) for data in rung.data)
        recipe = Recipe(
            name="init",
            student="init",
            context_tokens=context_tokens,
            rungs={rung.name: steps},
            export=tuple(formats),
        )
        found = [f.message for f in check_recipe(recipe, facts) if f.place[:1] == ("rungs",)]
        if found:
            left_out[rung.name] = "; ".join(dict.fromkeys(found))
        else:
            offered.append(replace(rung, steps=steps))
    return offered, left_out


def _step(data: StepData, formats: Sequence[str]) -> StageStep:
    step = StageStep.model_validate(data)
    if "formats" not in type(step.config).model_fields:
        return step
    config = step.config.model_copy(update={"formats": tuple(formats)})
    return step.model_copy(update={"config": config})
