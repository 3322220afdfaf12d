"""What all results are made of: frozen documents, and figures with an interval."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """Base of all results: frozen, no unknown fields.

    A number that is not finite (the KL of a broken artifact) is the string "NaN" or "Infinity" in
    JSON, which has no other word for it, and is read back as a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Interval(Document):
    """A confidence interval, 95% unless said otherwise."""

    low: float
    high: float


class Estimate(Document):
    """A measured figure and its interval."""

    value: float
    interval: Interval
