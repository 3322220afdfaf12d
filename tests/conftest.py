"""Shared fixtures: tiny real students, built once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_student


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family name of ``tests.tiny`` to the directory of a tiny student."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = write_student(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make
