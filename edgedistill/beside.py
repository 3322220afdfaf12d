"""What an evaluation is asked for beside the reference and the floor."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Beside(BaseModel):
    """A router, a teacher's answers, the previous release: each where the recipe names it.

    Attributes:
        router_accuracy: what the artifact's own answers have to reach; None wants no router.
        teacher: a file of recorded answers.
        previous: a directory with the previous release's scores, which people know as
            ``previous_name``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    router_accuracy: float | None = None
    teacher: Path | None = None
    previous: Path | None = None
    previous_name: str = "previous release"
