"""The quality floor and the capability spec, as a recipe states them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


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


class Floor(Clauses):
    """The floor on all cases of the suite."""

    when_underpowered: Literal["fail", "pass"] = "fail"


class SliceSpec(Clauses):
    """One row of the capability spec: a slice with its own floor, or protected, or sacrificed."""

    protected: bool = False
    sacrificed: str | None = None

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.protected and self.sacrificed:
            raise ValueError("a slice is protected or sacrificed, not both")
        return self
