"""The kinds of cases that a suite may hold; docs/suites.md has an example of each."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

ALL_CASES = "all"  # the name under which results report the whole suite
SOFT_LABEL_TOLERANCE = 0.02  # soft labels are commonly written with two or three decimals
GRADERS = ("exact", "regex", "json_fields")

Text = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Message(BaseModel):
    """One turn of the conversation that the case puts before the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Case(BaseModel):
    """What all kinds of cases have.

    Attributes:
        messages: the conversation that is put before the model.
        slices: the groups whose quality is reported and judged on their own.
        weight: how many cases of the traffic this one stands for, up to a common factor.
        value: what doing it right is worth, up to a common factor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    kind: str
    messages: tuple[Message, ...] = ()
    slices: tuple[Text, ...] = ()
    weight: Positive = 1.0
    value: Positive = 1.0

    @model_validator(mode="after")
    def _slices_differ(self) -> Self:
        if len(set(self.slices)) < len(self.slices) or ALL_CASES in self.slices:
            raise ValueError(f"slices = {list(self.slices)} repeats one, or uses {ALL_CASES!r}")
        return self

    @property
    def importance(self) -> float:
        """How much the case counts in every figure: its traffic times its value."""
        return self.weight * self.value

    @property
    def question(self) -> str:
        """What the case is about, for people: the last message."""
        return self.messages[-1].content

    @property
    def expected(self) -> str:
        """The right answer, for people."""
        return ""

    @property
    def stratum(self) -> int:
        """What a sample keeps the shares of, beside the slices."""
        return 0


class ChoiceCase(Case):
    """One question with its choices.

    Attributes:
        answer: index of the right choice.
        soft_label: a share for each choice, summing to 1; None means all of it on ``answer``.
    """

    kind: Literal["choice"]
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    choices: Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]
    soft_label: tuple[NonNegative, ...] | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        count = len(self.choices)
        if self.answer >= count:
            raise ValueError(f"answer = {self.answer} is not the index of one of {count} choices")
        if len(set(self.choices)) < count:
            raise ValueError(f"choices = {list(self.choices)} repeats a choice")
        if self.soft_label is not None:
            total = sum(self.soft_label)
            if len(self.soft_label) != count or abs(total - 1.0) > SOFT_LABEL_TOLERANCE:
                raise ValueError(
                    f"soft_label has {len(self.soft_label)} shares with the sum {total:.4g}, "
                    f"not {count} with the sum 1"
                )
        return self

    @property
    def expected(self) -> str:
        """The right choice."""
        return self.choices[self.answer]

    @property
    def stratum(self) -> int:
        """The index of the right choice."""
        return self.answer


class GenerateCase(Case):
    """One question that is answered in the model's own words, and how the answer is graded.

    Attributes:
        max_tokens: the longest answer.
        stop: texts that end the answer; they are not part of it.
        exact: the right answers; one of them has to be given.
        regex: Python's syntax, searched for in the answer.
        json_fields: what the JSON object in the answer should hold.
    """

    kind: Literal["generate"]
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 64
    stop: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = ()
    exact: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = ()
    regex: Text | None = None
    json_fields: Annotated[dict[str, JsonValue], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_grader(self) -> Self:
        given = [name for name in GRADERS if getattr(self, name)]
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise ValueError(f"one of {', '.join(GRADERS)} grades the answer, not {names}")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"regex = {self.regex!r} is not valid: {error}") from error
        return self

    @property
    def expected(self) -> str:
        """What is graded against: the first right answer, the expression, or the fields."""
        if self.exact:
            return self.exact[0]
        return f"/{self.regex}/" if self.regex else json.dumps(self.json_fields, ensure_ascii=False)


class TextCase(Case):
    """A text that the model should find likely; without messages it stands alone.

    Attributes:
        text: that is predicted, as the answer to the messages if there are any.
    """

    kind: Literal["text"]
    text: Text

    @property
    def question(self) -> str:
        """The text."""
        return self.text

    @property
    def size_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


KINDS: dict[str, type[Case]] = {
    "choice": ChoiceCase,
    "generate": GenerateCase,
    "text": TextCase,
}
