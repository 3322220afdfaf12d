"""Names of people, where the words around them say that they are names.

There is no dictionary of names: a name is what follows an introduction (*my name is*), a greeting
(*Dear*), a title (*Mrs*), or stands alone under a closing line (*Best regards,*).  English, German,
French, Spanish and Italian formulas are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_WORD = r"[^\W\d_][^\W\d_'’-]*(?:['’-][^\W\d_]+)*\.?"
_INTRODUCTION = re.compile(
    r"(?i)\b(?:my (?:full )?name is|my name['’]s|i am called|i['’]m called|"
    r"ich hei(?:ß|ss)e|mein name ist|je m['’]appelle|"
    r"mon nom est|me llamo|mi nombre es|mi chiamo|il mio nome è)\s+"
)
_GREETING = re.compile(
    r"(?i)\b(?:dear|hello|hi|hey|good (?:morning|afternoon|evening)|hallo|liebe[rs]?|"
    r"sehr geehrte[rs]?|guten (?:tag|morgen|abend)|bonjour|ch[eè]re?|hola|estimad[oa]|ciao|"
    r"caro|cara|the name is|(?:first|last|full|sur)? ?name:)[ ,]+"
)
_TITLE = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Mlle|Señor|Señora|Sra|Signora?)\b\.?[ ]+"
)
_CLOSING = re.compile(
    r"(?im)^[ \t]*(?:(?:best|kind|warm|many)? ?(?:regards|wishes)|sincerely(?: yours)?|"
    r"yours(?: sincerely| truly| faithfully)?|cheers|thanks|thank you|best|love|"
    r"(?:viele|liebe|beste|mit freundlichen) grü(?:ß|ss)en?|cordialement|saludos|"
    r"un saludo|cordiali saluti)[,.!]*[ \t]*\n\s*"
)
_WORDS = re.compile(rf"{_WORD}(?: {_WORD}){{0,2}}")
# Capitalized words that follow a greeting and name nobody.
_NOBODY = frozenset(
    [
        "a",
        "again",
        "all",
        "an",
        "and",
        "are",
        "as",
        "assistant",
        "bank",
        "best",
        "bot",
        "can",
        "chatbot",
        "chatgpt",
        "colleague",
        "colleagues",
        "could",
        "customer",
        "customers",
        "damen",
        "day",
        "do",
        "does",
        "everybody",
        "everyone",
        "folks",
        "friend",
        "friends",
        "god",
        "good",
        "google",
        "guest",
        "guys",
        "have",
        "help",
        "hey",
        "hi",
        "hello",
        "how",
        "i",
        "if",
        "in",
        "is",
        "it",
        "ladies",
        "lord",
        "madam",
        "manager",
        "me",
        "my",
        "no",
        "not",
        "of",
        "ok",
        "on",
        "or",
        "our",
        "please",
        "santa",
        "service",
        "siri",
        "sir",
        "sirs",
        "so",
        "support",
        "sure",
        "team",
        "thank",
        "thanks",
        "that",
        "the",
        "their",
        "there",
        "they",
        "this",
        "to",
        "today",
        "und",
        "user",
        "valued",
        "we",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "world",
        "would",
        "yes",
        "you",
        "your",
        "alexa",
        "mr",
        "mrs",
        "ms",
        "miss",
        "dr",
        "herr",
        "herren",
        "frau",
        "monsieur",
        "madame",
        "señor",
        "señora",
        "todos",
        "tous",
        "zusammen",
    ]
)


def find_names(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of what is said to be a name; stretches may overlap."""
    for match in _INTRODUCTION.finditer(text):
        # In a chat people write their own names small.
        yield from _name_at(text, match.end(), small=True)
    for pattern in (_GREETING, _TITLE):
        for match in pattern.finditer(text):
            yield from _name_at(text, match.end())
    for match in _CLOSING.finditer(text):
        for start, end in _name_at(text, match.end()):
            if text[end : end + 1] in ("", "\n", "\r"):
                yield start, end


def _name_at(text: str, start: int, *, small: bool = False) -> Iterator[tuple[int, int]]:
    """The capitalized words at ``start``, up to three; the first may be small."""
    found = _WORDS.match(text, start)
    if not found:
        return
    end = start
    for number, word in enumerate(found.group().split(" ")):
        bare = word.rstrip(".")
        capital = bare[0].isupper() or (small and number == 0)
        if not capital or bare.casefold() in _NOBODY or (len(bare) < 2 and not number):
            break
        # A dot ends an initial inside a name; after a word it ends the sentence.
        end += (number > 0) + (len(word) if len(bare) == 1 else len(bare))
        if len(bare) > 1 and word.endswith("."):
            break
    if end > start:
        yield start, end
