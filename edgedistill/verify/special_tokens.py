"""Does a prompt begin, and an answer end, with the tokens that the student was trained with?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgedistill.results import Check
from edgedistill.text_program import DirectoryText, TextProgram
from edgedistill.verify.conversations import PLAIN

TEXTS = ("Hello, world!", "1 + 1 = 2", " leading", "")
Additions = tuple[tuple[int, ...], tuple[int, ...]]


def check_bos(student: DirectoryText, artifact: TextProgram) -> Check:
    """What the runtime's own program puts around a text and around a conversation.

    Around a text that is what the student's tokenizer puts there, mostly one BOS or none; around a
    rendered conversation it is nothing, because the template has written what belongs there.
    """
    wrong = [*_around_texts(student, artifact), *_around_conversations(student, artifact)]
    return Check(
        name="tokens: bos",
        passed=not wrong,
        value=float(len(wrong)),
        limit=0.0,
        detail=wrong[0] if wrong else f"not doubled and not lost by {artifact.name}",
    )


def check_ends(student: DirectoryText, artifact: TextProgram) -> Check:
    """The artifact states no other end tokens than the student, and stops at all of the student's.

    The student's are those of its generation config (else its config) and its tokenizer's EOS.
    """
    expected, stated, known = student.stated_ends(), artifact.stated_ends(), artifact.ends()
    lost, strange = sorted(expected - known), sorted(stated - expected)
    by_name = sorted(known - expected - stated)
    said = [f"does not stop at {lost}"] if lost else []
    said += [f"states {strange}, which the student does not"] if strange else []
    detail = f"{artifact.name} {' and '.join(said)}" if said else f"stops at {sorted(expected)}"
    if by_name:
        detail += f"; {artifact.name} knows {by_name} by name as well"
    return Check(
        name="tokens: eos",
        passed=not said,
        value=float(len(lost) + len(strange)),
        limit=0.0,
        detail=detail,
    )


def _around_texts(student: DirectoryText, artifact: TextProgram) -> Iterator[str]:
    for text in TEXTS:
        expected = _additions(student.ids_with_additions(text), student.ids(text))
        found = _additions(artifact.ids_with_additions(text), artifact.ids(text))
        if found != expected:
            yield f"{text!r}: {artifact.name} puts {_words(found)}, the student {_words(expected)}"


def _around_conversations(student: DirectoryText, artifact: TextProgram) -> Iterator[str]:
    if not student.has_template():
        return
    for conversation in PLAIN:
        prompt = conversation.render_by(student)
        if prompt is None:
            continue
        found = _additions(artifact.ids_of_prompt(prompt), artifact.ids(prompt))
        if found != ((), ()):
            yield (
                f"{conversation.name}: {artifact.name} puts {_words(found)} a prompt that its "
                f"template begins with {prompt[:20]!r}"
            )


def _additions(whole: Sequence[int], inner: Sequence[int]) -> Additions | None:
    """The ids before and behind; None where the inner ones are not in the whole."""
    for start in range(len(whole) - len(inner) + 1):
        stop = start + len(inner)
        if list(whole[start:stop]) == list(inner):
            return tuple(whole[:start]), tuple(whole[stop:])
    return None


def _words(additions: Additions | None) -> str:
    if additions is None:
        return "other tokens in"
    before, after = additions
    return f"{list(before)} before and {list(after)} behind"
