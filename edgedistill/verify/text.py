"""Does an app that runs the artifact read and write the same text as the student?"""

from __future__ import annotations

from pathlib import Path

from edgedistill.results import Check
from edgedistill.session import Session
from edgedistill.text_program import DirectoryText
from edgedistill.verify.special_tokens import check_bos, check_ends
from edgedistill.verify.template import check_template
from edgedistill.verify.tokenizer import check_tokenizer


def check_text(session: Session, artifact: Path, student: Path) -> list[Check]:
    """Tokenizer, chat template, and the tokens that begin and end a text.

    Args:
        session: of the artifact.
        artifact: its directory.
        student: the directory whose tokenizer, template and configs are held to be right.

    Raises:
        InputError: one of them has no tokenizer that can be opened.
    """
    own, shipped = DirectoryText(student), session.text_program(artifact)
    checks = (check_tokenizer, check_template, check_bos, check_ends)
    return [check(own, shipped) for check in checks]
