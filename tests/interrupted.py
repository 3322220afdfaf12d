"""A training that is interrupted, as Ctrl-C does it, and the steps that are taken afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from edgedistill.distill import Distillation


class Interruption:
    """Raises ``KeyboardInterrupt`` in the place of a step of any training, until it is lifted.

    Attributes:
        taken: steps since the start, or since it was lifted.

    Args:
        monkeypatch: of the test.
        after: how many steps are taken first.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
        self.taken = 0
        self._after: int | None = after
        plain = Distillation._step

        def step(training: Distillation, *args: Any) -> None:
            if self.taken == self._after:
                raise KeyboardInterrupt
            self.taken += 1
            plain(training, *args)

        monkeypatch.setattr(Distillation, "_step", step)

    def lift(self) -> None:
        """Let everything run, and count anew."""
        self.taken, self._after = 0, None
