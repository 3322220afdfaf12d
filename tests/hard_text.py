"""Text that tokenizers get wrong: seeded, of characters that are assigned since Unicode 14."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

ALPHABETS = (
    "0123456789",
    "abcxyzABC   ",
    "  \t\n\r\n\u00a0\u3000\u2009\u200b",
    "你好世界日本語カタカナ한국어",
    "🙂🎉👩‍👩‍👧🇫🇷👍🏽",
    "éüñßøǺ̈́ćż",
    ".,;:!?'\"()[]{}<>|@#$%^&*-_=+\\/~`",
    "½²①Ⅷ٣५৪",
    "αβγЖДאבגعربيไทย",
)
PIECES = (
    "don't", "I'VE", "x'd ", "  'm", "'LL", "def f(x):\n    return x[0]\n", "3.14159e-10",
    "1,234,567", "https://a.b/c?d=e&f", "<|im_", "im_end|>", "\n\n\n", "      ", "...", "—",
)  # fmt: skip


def hard_strings(count: int, seed: int, special: tuple[str, ...] = ()) -> Iterator[str]:
    """``count`` strings of up to some 200 characters, with special tokens among them."""
    source = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(source, special) for _ in range(source.randint(1, 30)))


def _piece(source: random.Random, special: tuple[str, ...]) -> str:
    choice = source.random()
    if choice < 0.55:
        alphabet = source.choice(ALPHABETS)
        return "".join(source.choices(alphabet, k=source.randint(1, 6)))
    if choice < 0.8:
        return source.choice(PIECES)
    if choice < 0.9 and special:
        return source.choice(special)
    return _any_character(source)


def _any_character(source: random.Random) -> str:
    while True:
        character = chr(source.choice((source.randint(32, 0x2FFF), source.randint(32, 0x1FFFF))))
        # Not assigned, private, surrogate and control characters differ between Unicode versions,
        # or have bytes that a vocabulary cannot spell.
        if unicodedata.category(character) not in ("Cn", "Co", "Cs", "Cc"):
            return character
