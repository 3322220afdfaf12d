"""Personal data in texts: found by pattern and, where a kind has one, by checksum.

A net, not a proof: it finds what has a form (addresses, numbers) and names where people introduce
or greet each other.  It prefers to flag too much, because a person looks at what it flags.

Sources: ISO 13616 (IBAN, with the lengths of its registry), ISO/IEC 7064 MOD 97-10, ISO/IEC 7812-1
(Luhn), ITU-T E.164 (at most 15 digits).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NamedTuple

from edgedistill.evaluate.personal_names import find_names

KINDS = ("email", "iban", "card", "ip", "phone", "name")  # the first wins where two overlap

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w@])")
_IBAN_START = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}")
_CARD = re.compile(
    r"(?<!\d)(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{5})(?!\d)"
)
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[4-8]|30|6(?:011|2|4[4-9]|5)")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_VERSION = re.compile(r"(?i)(?:\bv|version|release)\W{0,2}$")
_PHONES = (
    re.compile(  # international
        r"(?<![\w+])\+[1-9](?:[ ./-]{0,2}\d){0,3}(?:[ ./-]?\(\d{1,4}\))?"
        r"(?:[ ./-]{0,2}\d){6,13}(?!\w)"
    ),
    re.compile(  # with a trunk or 00 prefix
        r"(?<![\w.,+/-])(?:\(0\d{1,4}\)|0\d)(?:[ ./-]{0,2}\d){7,13}(?!\w)"
    ),
    re.compile(  # North American
        r"(?<![\w.-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?!\w)"
    ),
    re.compile(  # any digits that are said to be one
        r"(?i)\b(?:tele)?(?:phone|fon|fono|tel|mobile|cell|whatsapp|call me|text me|handy|"
        r"téléphone|teléfono)\b[\W_]{0,3}(?:(?:number|no|nr|is|at|on|ist|es|est)\b[\W_]{0,3}){0,2}"
        r"(?P<value>\d(?:[ ./-]{0,2}\d){6,14})(?!\w)"
    ),
)
_NOT_A_PHONE = re.compile(r"\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b|0[.,]\d+$")  # a date, a decimal

IBAN_LENGTHS = {
    country: int(length)
    for length, countries in {
        "15": "NO", "16": "BE", "18": "DK FO FI GL NL", "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK", "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST", "26": "IS TR",
        "27": "FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB PL", "29": "BR EG PS QA UA",
        "30": "JO KW MU", "31": "MT SC",
    }.items()
    for country in countries.split()
}  # fmt: skip


class Finding(NamedTuple):
    """A stretch of text, from ``start`` up to ``end``, that looks like personal data."""

    kind: str
    start: int
    end: int


def find_personal_data(text: str) -> list[Finding]:
    """What looks like personal data, in order; no two findings overlap."""
    taken: list[Finding] = []  # by start
    for finding in sorted(_candidates(text), key=lambda f: (KINDS.index(f.kind), f.start - f.end)):
        place = bisect_left(taken, finding.start, key=lambda f: f.start)
        after_previous = place == 0 or taken[place - 1].end <= finding.start
        before_next = place == len(taken) or finding.end <= taken[place].start
        if after_previous and before_next:
            taken.insert(place, finding)
    return taken


class Redactor:
    """Replaces personal data by typed placeholders: the same value by the same one, ``[EMAIL_1]``.

    One redactor serves one conversation, so that who is who can still be told within it and cannot
    be joined across conversations.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, int]] = {}

    def redact(self, text: str) -> str:
        """The text with every finding replaced."""
        parts, end = [], 0
        for finding in find_personal_data(text):
            known = self._numbers.setdefault(finding.kind, {})
            value = re.sub(r"[\s()./-]", "", text[finding.start : finding.end]).casefold()
            number = known.setdefault(value, len(known) + 1)
            parts += [text[end : finding.start], f"[{finding.kind.upper()}_{number}]"]
            end = finding.end
        return "".join([*parts, text[end:]])


def is_iban(text: str) -> bool:
    """Whether country, length and check digits (MOD 97-10) are an IBAN's; blanks do not count."""
    compact = re.sub(r"[ -]", "", text).upper()
    if not re.fullmatch(r"[A-Z]{2}\d\d[A-Z0-9]+", compact):
        return False
    if len(compact) != IBAN_LENGTHS.get(compact[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card_number(text: str) -> bool:
    """Whether an issuer's prefix, the length and the Luhn check digit are a payment card's."""
    digits = re.sub(r"[ -]", "", text)
    if not re.fullmatch(r"[0-9]{13,19}", digits) or not _ISSUER.match(digits):
        return False
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _candidates(text: str) -> Iterator[Finding]:
    for match in _EMAIL.finditer(text):
        yield Finding("email", *match.span())
    yield from _ibans(text)
    for match in _CARD.finditer(text):
        if is_card_number(match.group()):
            yield Finding("card", *match.span())
    yield from _addresses(text)
    yield from _phones(text)
    for start, end in find_names(text):
        yield Finding("name", start, end)


def _ibans(text: str) -> Iterator[Finding]:
    for match in _IBAN_START.finditer(text):
        length = IBAN_LENGTHS.get(match.group()[:2].upper())
        end = _end_of(text, match.start(), length) if length else None
        if end is not None and is_iban(text[match.start() : end]):
            yield Finding("iban", match.start(), end)


def _end_of(text: str, start: int, count: int) -> int | None:
    """Where ``count`` letters and digits end, single blanks or hyphens between them allowed."""
    position = start
    for number in range(count):
        if number and text[position : position + 1] in (" ", "-"):
            position += 1
        if not (
            text[position : position + 1].isascii() and text[position : position + 1].isalnum()
        ):
            return None
        position += 1
    return None if text[position : position + 1].isalnum() else position


def _addresses(text: str) -> Iterator[Finding]:
    """IPv4 and IPv6; loopback and unspecified addresses are nobody's, versions are none."""
    for match in _IPV4.finditer(text):
        try:
            address = IPv4Address(match.group())
        except AddressValueError:
            continue
        before = text[max(0, match.start() - 10) : match.start()]
        if not (address.is_loopback or address.is_unspecified or _VERSION.search(before)):
            yield Finding("ip", *match.span())
    for match in _IPV6.finditer(text):
        groups = [group for group in match.group().split(":") if group]
        try:
            IPv6Address(match.group())
        except AddressValueError:
            continue
        if len(groups) > 2 and re.search(r"\d", match.group()):
            yield Finding("ip", *match.span())


def _phones(text: str) -> Iterator[Finding]:
    for pattern in _PHONES:
        group = "value" if "value" in pattern.groupindex else 0
        for match in pattern.finditer(text):
            if not _NOT_A_PHONE.match(match.group(group)):
                yield Finding("phone", *match.span(group))
