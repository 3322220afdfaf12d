"""The quality floor and the capability spec, as a recipe states them."""

from __future__ import annotations

from contextlib import suppress
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Words = Annotated[str, Field(min_length=1, max_length=500, pattern=r"\S")]


def _iso_date(text: str) -> str:
    found: str | None = None
    with suppress(ValueError):
        found = date.fromisoformat(text).isoformat()
    if found != text:
        raise ValueError("is not a date such as 2026-01-31")
    return text


IsoDate = Annotated[str, AfterValidator(_iso_date)]


class Clauses(BaseModel):
    """What quality has to reach; a clause that is not given is not held.

    Attributes:
        score: least weighted share of right answers.
        retention: least score / reference score.
        max_log_score_loss: largest rise of the log-score over the reference's, in nats a case.
        max_broken: largest share of the reference's right answers that may be lost.
        max_bits_per_byte_loss: largest rise of the texts' bits per byte over the reference's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Share | None = None
    retention: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    max_log_score_loss: Annotated[float, Field(ge=0.0)] | None = None
    max_broken: Share | None = None
    max_bits_per_byte_loss: Annotated[float, Field(ge=0.0)] | None = None

    def limits(self) -> dict[str, float]:
        """Clause -> limit of those that are given, but for that of texts."""
        names = ("score", "retention", "max_log_score_loss", "max_broken")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def all_limits(self) -> dict[str, float]:
        """Clause -> limit of all that are given."""
        found = self.limits()
        if self.max_bits_per_byte_loss is not None:
            found["max_bits_per_byte_loss"] = self.max_bits_per_byte_loss
        return found


class Floor(Clauses):
    """The floor on all cases of the suite."""

    when_underpowered: Literal["fail", "pass"] = "fail"


class Sacrifice(BaseModel):
    """Why a slice was given up, by whom and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    because: Words
    by: Words
    on: IsoDate

    def __str__(self) -> str:
        """In one line, for reports."""
        return f"given up by {self.by} on {self.on}: {self.because}"


def _kind_of_sacrifice(value: Any) -> str:
    return "reason" if isinstance(value, str) else "record"


# A reason alone is short; an owner and a date make it a decision that can be asked about.
Sacrificed = Annotated[
    Annotated[Words, Tag("reason")] | Annotated[Sacrifice, Tag("record")],
    Discriminator(_kind_of_sacrifice),
]


class SliceSpec(Clauses):
    """One row of the capability spec: a slice with its own floor, or protected, or sacrificed."""

    protected: bool = False
    sacrificed: Sacrificed | None = None

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.protected and self.sacrificed:
            raise ValueError("a slice is protected or sacrificed, not both")
        return self

    @property
    def sacrifice(self) -> str | None:
        """Why the slice was given up, in one line; None when it was not."""
        if self.sacrificed is None or isinstance(self.sacrificed, Sacrifice):
            return str(self.sacrificed) if self.sacrificed else None
        return f"given up: {self.sacrificed}"
