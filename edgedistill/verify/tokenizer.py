"""Does the artifact cut text into the same tokens as the student's own tokenizer?"""

from __future__ import annotations

from pathlib import Path

from edgedistill.results import Check
from edgedistill.session import Session

HARD_STRINGS = (
    "Hello, world!",
    "1234567890 12,345.67 3.14159 2024-02-29T23:59:60Z",
    "7750-A x86_64 IPv6 ::1 0xDEADBEEF 1e-10 50% $1,249.99",
    "   leading and trailing   ",
    "tabs\tand\n\nnewlines\r\nand  double   triple    quadruple     spaces",
    "I'm you're he'll WE'VE they'd o'clock rock'n'roll 'quoted'",
    "def f(x):\n    return {k: v for k, v in x.items() if v != None}\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; } // comment",
    "Größe naïve café Ångström ﬁnancial ½ ² ™",
    "你好，世界！ こんにちは 안녕하세요 สวัสดี",
    "Здравствуйте Γειά σου مرحبا שלום नमस्ते",
    "🙂🎉👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 :-) ;( <3 ¯\\_(ツ)_/¯",
    "zero\u200bwidth \u00a0nbsp \u2028line \ufeffbom e\u0301 combining",
    "https://example.org/a?b=c&d=%20e#f user@example.org @handle #tag",
    "ALLCAPS camelCase snake_case kebab-case SCREAMING_SNAKE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....,,,,;;;;!!!!????----====____####****",
    "x" + " " * 40 + "y" + "\n" * 12 + "z",
)


def check_tokenizer(session: Session, artifact: Path, student: Path) -> Check:
    """Ids of hard strings and of a rendered chat, by the artifact's own tokenizer.

    That is the runtime's where it has one, else the ``tokenizer.json`` beside the weights.
    """
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(student))
    strings = [*HARD_STRINGS, *_special_strings(own.all_special_tokens)]
    if own.chat_template:
        conversation = [{"role": "user", "content": text} for text in HARD_STRINGS[:2]]
        strings += [own.apply_chat_template(conversation[:1], tokenize=False)]
    wrong = []
    for text in strings:
        expected = own(text, add_special_tokens=False).input_ids
        found = _artifact_ids(session, artifact, text)
        if found != expected:
            wrong.append(f"{text!r} -> {found[:12]}, not {expected[:12]}")
    return Check(
        name="tokenizer: ids of hard strings",
        passed=not wrong,
        value=float(len(wrong)),
        limit=0.0,
        detail=wrong[0] if wrong else f"{len(strings)} strings, all equal",
    )


def _special_strings(special: list[str]) -> list[str]:
    return [f"before{token}after {token} end" for token in special]


def _artifact_ids(session: Session, artifact: Path, text: str) -> list[int]:
    ids = session.tokenize(text)
    if ids is not None:
        return ids
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
