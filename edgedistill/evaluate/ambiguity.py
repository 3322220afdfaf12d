"""Requests for which a clarifying question may be the right answer: candidates for a human.

Heuristics, stated with each candidate so that a person can overrule them; those that look at words
know English.  A conversation of several turns is left alone: what is missing may have been said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

VERY_SHORT_WORDS = 2
SHORT_WORDS = 12  # longer requests carry their own context
SECOND_READING_SHARE = 0.25
LEAST_ANSWERS = 4

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_PRONOUNS = frozenset(
    ["it", "them", "they", "that", "this", "these", "those", "one", "he", "she", "him", "her"]
)
# "this" and "her" before a noun point to it; before one of these, or at the end, they stand alone.
_DETERMINERS = frozenset(["this", "that", "these", "those", "one", "her"])
_POLITE = frozenset(
    [
        "please",
        "pls",
        "plz",
        "can",
        "could",
        "would",
        "will",
        "you",
        "u",
        "i",
        "me",
        "my",
        "we",
        "us",
        "need",
        "want",
        "like",
        "to",
        "help",
        "just",
        "now",
        "quickly",
        "asap",
        "hi",
        "hello",
        "hey",
        "thanks",
        "thank",
        "ok",
        "okay",
        "so",
        "and",
        "the",
        "a",
        "an",
        "for",
        "with",
        "do",
        "does",
        "did",
    ]
)
_VERBS = frozenset(
    [
        "add",
        "analyse",
        "analyze",
        "answer",
        "book",
        "calculate",
        "cancel",
        "change",
        "check",
        "close",
        "compare",
        "complete",
        "compute",
        "continue",
        "convert",
        "copy",
        "correct",
        "create",
        "delete",
        "describe",
        "design",
        "do",
        "draft",
        "edit",
        "evaluate",
        "explain",
        "find",
        "fix",
        "format",
        "generate",
        "give",
        "improve",
        "insert",
        "install",
        "list",
        "make",
        "merge",
        "modify",
        "move",
        "open",
        "order",
        "parse",
        "print",
        "proofread",
        "remove",
        "rename",
        "repeat",
        "replace",
        "reply",
        "reset",
        "resend",
        "return",
        "reverse",
        "rewrite",
        "run",
        "save",
        "schedule",
        "search",
        "send",
        "set",
        "shorten",
        "show",
        "simplify",
        "solve",
        "sort",
        "start",
        "stop",
        "suggest",
        "summarise",
        "summarize",
        "tell",
        "test",
        "translate",
        "transfer",
        "try",
        "turn",
        "undo",
        "update",
        "upgrade",
        "verify",
        "write",
    ]
)
_FUNCTION = frozenset(
    [
        "again",
        "am",
        "and",
        "are",
        "as",
        "at",
        "back",
        "be",
        "been",
        "before",
        "but",
        "by",
        "can't",
        "cannot",
        "did",
        "didn't",
        "does",
        "doesn't",
        "don't",
        "down",
        "from",
        "had",
        "happened",
        "has",
        "have",
        "here",
        "how",
        "if",
        "in",
        "into",
        "is",
        "isn't",
        "keep",
        "keeps",
        "later",
        "mean",
        "means",
        "not",
        "off",
        "on",
        "or",
        "out",
        "over",
        "really",
        "right",
        "should",
        "still",
        "stopped",
        "than",
        "then",
        "there",
        "too",
        "up",
        "wasn't",
        "was",
        "were",
        "what",
        "what's",
        "when",
        "where",
        "which",
        "who",
        "whose",
        "why",
        "won't",
        "work",
        "working",
        "works",
        "worked",
        "wrong",
    ]
)
_ABSENT = re.compile(
    r"(?i)\b(?:the following|attached|attachment|see (?:below|above)|(?:text|code|list|table|email|"
    r"message|file|image|picture|document|one|sentence) (?:below|above))\b|:\s*$"
)
_COMPARISON = re.compile(
    r"(?i)^(?:so |and |but |ok |okay )?(?:which|what|who)(?: one| of (?:them|these|those|the two))?"
    r"(?:'s| is| are| would be| was| do you| should i)?\b.{0,30}"
    r"\b(?:best|better|cheaper|cheapest|faster|fastest|prefer|recommend|choose|pick|worse|worst)"
    r"\W*$"
)


def clarify_reasons(text: str, *, turns: int = 1) -> tuple[str, ...]:
    """Why the request may have to be asked back about; empty for most.

    Args:
        text: what the user said.
        turns: how many messages the user wrote.
    """
    if turns > 1:
        return ()
    words = [word.casefold().replace("’", "'") for word in _WORD.findall(text)]
    reasons = []
    if len(words) <= VERY_SHORT_WORDS:
        reasons.append("very short")
    if _lacks_object(words):
        reasons.append("no object")
    if len(words) <= SHORT_WORDS and _lacks_antecedent(words):
        reasons.append("pronoun without antecedent")
    if len(words) <= SHORT_WORDS and _ABSENT.search(text):
        reasons.append("refers to what is not there")
    if _COMPARISON.search(text.strip()):
        reasons.append("compares nothing named")
    return tuple(reasons)


def has_several_readings(answers: Sequence[str]) -> bool:
    """Whether one request was answered in two ways, the second in at least a quarter of the times.

    Args:
        answers: logged for the same request; below four they say nothing.
    """
    ranked = Counter(" ".join(answer.casefold().split()) for answer in answers).most_common(2)
    enough = len(answers) >= LEAST_ANSWERS and len(ranked) > 1
    return enough and ranked[1][1] >= SECOND_READING_SHARE * len(answers)


def _lacks_object(words: Sequence[str]) -> bool:
    """Nothing is said but a verb that wants an object, and politeness."""
    rest = [word for word in words if word not in _POLITE]
    return len(rest) == 1 and rest[0] in _VERBS


def _lacks_antecedent(words: Sequence[str]) -> bool:
    """A pronoun stands where no word of content came before it."""
    known = _PRONOUNS | _POLITE | _VERBS | _FUNCTION
    for place, word in enumerate(words):
        if word not in known:
            return False
        following = words[place + 1] if place + 1 < len(words) else None
        alone = word not in _DETERMINERS or following is None or following in known
        if word in _PRONOUNS and alone:
            # "It is raining in Rome": what comes after may say what is meant.
            return all(later in known for later in words[place + 1 :])
    return False
