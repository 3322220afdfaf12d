"""One finding of lint, in words."""

from __future__ import annotations

from edgedistill.results import Check


def lint_check(words: str, passed: bool, expected: object, found: object, more: str = "") -> Check:
    """The check ``lint: <words>``, whose detail says what was found, and what was expected.

    Args:
        words: what is checked.
        passed: whether it is right.
        expected: shown where it reads otherwise than ``found``.
        found: None where the artifact does not state it.
        more: shown behind.
    """
    shown = f"{found}" if found is not None else "not stated"
    detail = shown if passed and str(expected) == shown else f"{shown}, expected {expected}"
    return Check(
        name=f"lint: {words}", passed=passed, detail=f"{detail}; {more}" if more else detail
    )


def near(found: float, expected: float, tolerance: float) -> bool:
    """Whether a number is another but for a relative error."""
    return abs(found - expected) <= tolerance * abs(expected)
