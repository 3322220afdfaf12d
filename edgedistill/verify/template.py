"""Does the artifact's own chat template render what the student's renders?"""

from __future__ import annotations

from edgedistill.results import Check
from edgedistill.text_program import DirectoryText, TextProgram
from edgedistill.verify.conversations import matrix_of

SHOWN_CHARACTERS = 40


def check_template(student: DirectoryText, artifact: TextProgram) -> Check:
    """The same text of every conversation; what one refuses the other refuses."""
    if not (student.has_template() and artifact.has_template()):
        return _check_absence(student.has_template(), artifact.has_template())
    matrix = matrix_of(student)
    refused, wrong = 0, []
    for conversation in matrix:
        expected, found = conversation.render_by(student), conversation.render_by(artifact)
        refused += expected is None
        if expected != found:
            problem = _difference(expected, found, artifact.name)
            wrong.append(f"{conversation.name}: {problem}")
    passed = f"{len(matrix)} conversations, all equal by {artifact.name}"
    if refused:
        passed += f", {refused} of them refused by the template"
    return _check(len(wrong), wrong[0] if wrong else passed)


def _check_absence(student: bool, artifact: bool) -> Check:
    if not student and not artifact:
        return _check(0, "there is no chat template")
    return _check(1, f"{'only' if artifact else 'not'} the artifact has a chat template")


def _check(wrong: int, detail: str) -> Check:
    return Check(
        name="template: conversations",
        passed=wrong == 0,
        value=float(wrong),
        limit=0.0,
        detail=detail,
    )


def _difference(expected: str | None, found: str | None, program: str) -> str:
    if expected is None or found is None:
        return f"{program if found is None else 'only the student'} refuses it"
    pairs = enumerate(zip(found, expected, strict=False))
    shorter = min(len(found), len(expected))
    at = next((i for i, (one, other) in pairs if one != other), shorter)
    shown = slice(at, at + SHOWN_CHARACTERS)
    return f"from character {at} on {found[shown]!r}, not {expected[shown]!r}"
