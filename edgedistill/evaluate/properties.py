"""What kind of text a request is, by properties that need no model: length, script, format."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

# Characters up to which a length bucket reaches.
LENGTHS = (20, 80, 300, 1200)
ALL_CAPS_LETTERS = 8
ALL_CAPS_SHARE = 0.8
LOOKED_AT_CHARACTERS = 4000  # of a text, but for its length
MIXED_SHARE = 0.2  # of the letters, from which a second script counts
CJK = frozenset({"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"})  # written in one text

_URL = re.compile(r"(?i)\b(?:https?://|www\.)\S+")
_EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf]"
    r"|(?<!\S)[:;=][-'o]?[)(DPp|*3](?!\w)|<3"
)
_LIST_ITEM = re.compile(r"(?m)^[ \t]*(?:[-*•]|\d{1,3}[.)])[ \t]+\S")
_FENCE = re.compile(r"```")
_CODE_SIGNS = (
    re.compile(r"(?m)[{};]\s*$"),
    re.compile(r"\w\([^()\n]*\)\s*[;{:]|\w\.\w+\("),
    re.compile(r"=>|->|==|!=|\+=|&&|\|\|"),
    re.compile(
        r"(?m)^[ \t]*(?:def|class|function|import|from|return|const|let|var|public|#include)\b"
    ),
    re.compile(r"(?i)\bselect\b.{1,200}\bfrom\b.{1,200}[;=*]"),
    re.compile(r"</?[a-z]+[^<>\n]*>"),
)
CODE_SIGNS_NEEDED = 2


def properties_of(text: str, *, turns: int = 1) -> tuple[str, ...]:
    """The properties of a request, sorted.

    Always a ``length=`` (characters) and a ``script=``; besides, where they hold, ``all_caps``,
    ``code``, ``digits``, ``emoji`` (emoticons too), ``list``, ``multi_turn``, ``question`` and
    ``url``.

    Args:
        text: what was said.
        turns: how many messages the user wrote.
    """
    length, text = _length(text), text[:LOOKED_AT_CHARACTERS]
    without_urls = _URL.sub(" ", text)
    holds = {
        "all_caps": _is_all_caps(text),
        "code": _is_code(text),
        "digits": any(c.isdigit() for c in without_urls),
        "emoji": bool(_EMOJI.search(without_urls)),
        "list": len(_LIST_ITEM.findall(text)) > 1,
        "multi_turn": turns > 1,
        "question": any(mark in without_urls for mark in "?？؟"),
        "url": without_urls != text,
    }
    found = [name for name, held in holds.items() if held]
    return tuple(sorted([f"length={length}", f"script={_script(text)}", *found]))


def _length(text: str) -> str:
    count = len(text.strip())
    limits = (0, *LENGTHS)
    for lower, upper in zip(limits, LENGTHS, strict=False):
        if count <= upper:
            return f"{lower + 1}-{upper}" if lower else f"up_to_{upper}"
    return f"over_{LENGTHS[-1]}"


def _script(text: str) -> str:
    """The script of most letters, ``mixed`` where a second one has a fifth of them, or ``none``."""
    counts = Counter(_script_of(c) for c in text if c.isalpha())
    ranked = counts.most_common(2)
    if not ranked:
        return "none"
    if len(ranked) > 1 and ranked[1][1] >= MIXED_SHARE * counts.total():
        return "mixed"
    return ranked[0][0]


@cache
def _script_of(letter: str) -> str:
    """The first word of the letter's name in the Unicode database says its script."""
    first = re.split(r"[ -]", unicodedata.name(letter, "other"))[0]
    return "cjk" if first in CJK else first.lower()


def _is_all_caps(text: str) -> bool:
    cased = [c for c in text if c.isupper() or c.islower()]
    capitals = sum(c.isupper() for c in cased)
    return len(cased) >= ALL_CAPS_LETTERS and capitals >= ALL_CAPS_SHARE * len(cased)


def _is_code(text: str) -> bool:
    signs = sum(bool(sign.search(text)) for sign in _CODE_SIGNS)
    return bool(_FENCE.search(text)) or signs >= CODE_SIGNS_NEEDED
