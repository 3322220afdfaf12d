from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.evaluate.personal_data import (
    IBAN_LENGTHS,
    Redactor,
    find_personal_data,
    is_card_number,
    is_iban,
)
from tests.sentiment_logs import real_cases

# Examples that the registry of ISO 13616 and the payment networks publish for tests.
IBANS = [
    "DE89370400440532013000",
    "GB29NWBK60161331926819",
    "FR1420041010050500013M02606",
    "NL91ABNA0417164300",
    "ES9121000418450200051332",
    "NO9386011117947",
    "MT84MALT011000012345MTLCAST001S",
    "CH9300762011623852957",
]
CARDS = [
    "4111111111111111",
    "5555555555554444",
    "2223003122003222",
    "378282246310005",
    "6011111111111117",
    "3530111333300000",
    "30569309025904",
]


def kinds(text: str) -> list[tuple[str, str]]:
    return [(f.kind, text[f.start : f.end]) for f in find_personal_data(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail jane.doe+x@mail.example.co.uk.", [("email", "jane.doe+x@mail.example.co.uk")]),
        ("IBAN DE89 3704 0044 0532 0130 00 please", [("iban", "DE89 3704 0044 0532 0130 00")]),
        ("from gb29nwbk60161331926819, ok", [("iban", "gb29nwbk60161331926819")]),
        ("card 4111 1111 1111 1111 12/27", [("card", "4111 1111 1111 1111")]),
        ("amex 3782-822463-10005!", [("card", "3782-822463-10005")]),
        ("my ip is 203.0.113.7.", [("ip", "203.0.113.7")]),
        ("host 2001:db8:85a3::8a2e:370:7334 is down", [("ip", "2001:db8:85a3::8a2e:370:7334")]),
        ("call +49 (0)170 123-4567 now", [("phone", "+49 (0)170 123-4567")]),
        ("ring 0170 1234567", [("phone", "0170 1234567")]),
        (
            "(555) 234-5678 or 555-234-5679",
            [("phone", "(555) 234-5678"), ("phone", "555-234-5679")],
        ),
        ("my phone number is 1234567", [("phone", "1234567")]),
        ("Hi Maria, how are you", [("name", "Maria")]),
        ("Dear Dr. Smith-Jones,", [("name", "Smith-Jones")]),
        ("my name is john and I", [("name", "john")]),
        ("My name is John F. Kennedy. I", [("name", "John F. Kennedy")]),
        ("Ich heiße Jürgen Müller.", [("name", "Jürgen Müller")]),
        ("It broke.\n\nBest regards,\nAnna Schmidt", [("name", "Anna Schmidt")]),
        ("Mrs O'Neill called", [("name", "O'Neill")]),
    ],
)
def test_each_kind_is_found_where_it_stands(text: str, expected: list[tuple[str, str]]) -> None:
    assert kinds(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "@anonymous said so at 12:30:45",
        "on 2024-05-01 and 01.02.2024 and 1/2/2024 at 10:15",
        "version 1.2.3.4 and v10.0.0.1 and 999.1.1.1 and 127.0.0.1",
        "std::vector and a::b and ::",
        "it costs 1234567 dollars, 0.123456789 percent, 1000000000 bytes",
        "order 4111111111111112 and 1234567890123456",  # Luhn fails; no issuer
        "DE88370400440532013000 and XX89370400440532013000 and DE8937040044053201300",
        "Dear Sir or Madam, hello world, hi there, Hello Support, Hi I need help",
        "Thanks,\nI will wait for your reply",
        "ms 500, dr strange",
    ],
)
def test_what_only_resembles_it_is_left_alone(text: str) -> None:
    assert kinds(text) == []


@pytest.mark.parametrize("iban", IBANS)
def test_ibans_pass_and_every_change_of_one_character_is_seen(iban: str) -> None:
    assert is_iban(iban)
    assert is_iban(" ".join(re.findall(".{1,4}", iban)))
    for place in range(2, len(iban)):
        for other in "0123456789":
            if iban[place].isdigit() and other != iban[place]:
                assert not is_iban(iban[:place] + other + iban[place + 1 :])
    assert not is_iban(iban + "0")


def test_check_digits_are_those_of_iso_7064() -> None:
    """The standard computes them as 98 minus the remainder, here by hand on a decimal string."""
    rng = random.Random(0)
    for country, length in IBAN_LENGTHS.items():
        account = "".join(rng.choice("0123456789ABCXYZ") for _ in range(length - 4))
        digits = "".join(
            c if c.isdigit() else str(ord(c) - ord("A") + 10) for c in account + country + "00"
        )
        remainder = 0
        for digit in digits:
            remainder = (remainder * 10 + int(digit)) % 97
        assert is_iban(f"{country}{98 - remainder:02d}{account}")


@pytest.mark.parametrize("card", CARDS)
def test_cards_pass_and_every_change_of_one_digit_is_seen(card: str) -> None:
    assert is_card_number(card)
    for place in range(4, len(card)):
        for other in set("0123456789") - {card[place]}:
            assert not is_card_number(card[:place] + other + card[place + 1 :])


def test_the_same_value_gets_the_same_placeholder_within_a_conversation() -> None:
    redactor = Redactor()
    first = redactor.redact("I am a@b.example, or c@d.example; my name is Ann Lee.")
    second = redactor.redact("Write to A@B.example, call +49 170 1234567")
    assert first == "I am [EMAIL_1], or [EMAIL_2]; my name is [NAME_1]."
    assert second == "Write to [EMAIL_1], call [PHONE_1]"


PIECES = st.sampled_from(
    [*IBANS, *CARDS, "a.b@c.example", "203.0.113.7", "+49 170 1234567", "Hi Maria", "Dear", "\n"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=12), max_size=6).map(" ".join))
def test_findings_are_in_order_apart_and_gone_after_redaction(text: str) -> None:
    found = find_personal_data(text)
    assert all(f.start < f.end for f in found)
    assert all(a.end <= b.start for a, b in pairwise(found))
    redacted = Redactor().redact(text)
    assert not [f for f in find_personal_data(redacted) if f.kind in ("email", "iban", "card")]


def test_generated_personal_data_in_real_texts_is_found_and_little_else() -> None:
    rng = random.Random(1)
    plants = {
        "email": lambda: f"{rng.choice(['li', 'jo.ann'])}{rng.randrange(99)}@mail.example",
        "iban": lambda: rng.choice(IBANS),
        "card": lambda: rng.choice(CARDS),
        "ip": lambda: f"203.0.113.{rng.randrange(256)}",
        "phone": lambda: f"+49 170 {rng.randrange(10**6, 10**7)}",
    }
    false_alarms = 0
    texts = [case["messages"][0]["content"] for case in real_cases(1000)]
    for text in texts:
        before = kinds(text)
        false_alarms += len(before)
        kind = rng.choice(sorted(plants))
        value = plants[kind]()
        words = text.split(" ")
        words.insert(rng.randrange(len(words) + 1), f"({value})")
        assert (kind, value) in kinds(" ".join(words)), json.dumps(text)
    # Reviews and tweets greet and name people; nothing else in them may look like personal data.
    assert false_alarms <= 0.03 * len(texts)
