"""The exception tree and the exit codes.

Every message says what is wrong, with which value, where (file and key), and how to mend it.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status means; the worst of several wins."""

    OK = 0
    STAGE_FAILED = 1
    USAGE = 2
    FLOOR_NOT_MET = 3
    BUDGET_NOT_MET = 4
    VERIFICATION_FAILED = 5
    UNDERPOWERED = 6
    UNAVAILABLE = 7
    INTERRUPTED = 130


class EdgedistillError(Exception):
    """Base of all errors that a user may see.

    Args:
        message: what is wrong, with the offending value.
        where: the place, as ``file`` or ``file:line`` or ``file: key``.
        hint: one sentence that mends it.
    """

    exit_code: ExitCode = ExitCode.STAGE_FAILED

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """The message as a user reads it, place first, hint last."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class UsageError(EdgedistillError):
    """A command line that cannot be carried out."""

    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    """A recipe that cannot be built; ``problems`` holds every mistake that was found."""

    def __init__(self, problems: list[UsageError]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{count} in the recipe\n" + "\n".join(f"- {p}" for p in problems))
        self.problems = problems


class InputError(UsageError):
    """A student, adapter, suite or artifact that is missing, damaged or of the wrong kind."""


class StageError(EdgedistillError):
    """A step that failed at its work."""


class UnavailableError(EdgedistillError):
    """A device, a runtime or the network is not there; trying again may help."""

    exit_code = ExitCode.UNAVAILABLE
