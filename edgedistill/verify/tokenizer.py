"""Does the artifact cut text into the same tokens as the student's own tokenizer?"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from edgedistill.results import Check
from edgedistill.text_program import DirectoryText, TextProgram
from edgedistill.verify.conversations import matrix_of
from edgedistill.verify.strings import HARD_STRINGS, special_strings

SHOWN_IDS = 8


def check_tokenizer(student: DirectoryText, artifact: TextProgram) -> Check:
    """Ids of hard strings, of special tokens within text, and of the student's rendered prompts.

    Only one difference is let pass, and told: a runtime that does not bring decomposed text (e and
    an accent as two characters) into composed form, where the student's tokenizer does.  What a
    keyboard writes is composed.
    """
    count, wrong, decomposed = 0, [], 0
    for text in _texts(student):
        count += 1
        expected, found = student.ids(text), artifact.ids(text)
        if found == expected:
            continue
        composed = unicodedata.normalize("NFC", text)
        if student.normalizes and artifact.ids(composed) == expected:
            decomposed += 1
        else:
            wrong.append(f"{text!r}: {_difference(found, expected)}")
    passed = f"{count} strings and prompts, all equal by {artifact.name}"
    if decomposed:
        passed += f" but for {decomposed} in decomposed form, which it does not compose"
    return Check(
        name="tokenizer: ids",
        passed=not wrong,
        value=float(len(wrong)),
        limit=0.0,
        detail=wrong[0] if wrong else passed,
    )


def _texts(student: DirectoryText) -> Iterator[str]:
    yield from HARD_STRINGS
    yield from special_strings(student.special_strings)
    if student.has_template():
        prompts = (c.render_by(student) for c in matrix_of(student))
        yield from (prompt for prompt in prompts if prompt is not None)


def _difference(found: Sequence[int], expected: Sequence[int]) -> str:
    """Where two lists of ids part, and how they go on."""
    pairs = enumerate(zip(found, expected, strict=False))
    shorter = min(len(found), len(expected))
    at = next((i for i, (one, other) in pairs if one != other), shorter)
    shown = slice(at, at + SHOWN_IDS)
    return f"from id {at} on {list(found[shown])}, not {list(expected[shown])}"
