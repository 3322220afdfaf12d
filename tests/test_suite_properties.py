from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.evaluate.ambiguity import clarify_reasons, has_several_readings
from edgedistill.evaluate.properties import properties_of
from tests.sentiment_logs import real_cases


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is it?", {"length=up_to_20", "script=latin", "question"}),
        ("Где моя посылка", {"length=up_to_20", "script=cyrillic"}),
        ("私の荷物はどこですか", {"length=up_to_20", "script=cjk"}),
        ("أين طردي؟", {"length=up_to_20", "script=arabic", "question"}),
        ("посылка parcel", {"length=up_to_20", "script=mixed"}),
        ("12 + 30", {"length=up_to_20", "script=none", "digits"}),
        ("so good :) really", {"length=up_to_20", "script=latin", "emoji"}),
        ("so good 🙂", {"length=up_to_20", "script=latin", "emoji"}),
        ("see http://a.example/1?x=2", {"length=21-80", "script=latin", "url"}),
        ("THIS IS BROKEN", {"length=up_to_20", "script=latin", "all_caps"}),
        ("- milk\n- eggs", {"length=up_to_20", "script=latin", "list"}),
        ("def f(x):\n    return x\n", {"length=21-80", "script=latin", "code"}),
        ("```\nhello\n```", {"length=up_to_20", "script=latin", "code"}),
        ("if (a == b) { go(); }", {"length=21-80", "script=latin", "code"}),
        ("a" * 1201, {"length=over_1200", "script=latin"}),
        ("I (really) love it; so much!", {"length=21-80", "script=latin"}),
    ],
)
def test_a_text_has_the_properties_that_anybody_can_see(text: str, expected: set[str]) -> None:
    assert set(properties_of(text)) == expected


def test_several_turns_are_a_property() -> None:
    assert "multi_turn" in properties_of("Hello\nWhere is it", turns=2)


@given(st.text(max_size=60))
def test_every_text_has_one_length_and_one_script(text: str) -> None:
    found = properties_of(text)
    assert sum(name.startswith("length=") for name in found) == 1
    assert sum(name.startswith("script=") for name in found) == 1
    assert list(found) == sorted(set(found))


def test_film_reviews_are_not_taken_for_code() -> None:
    texts = [case["messages"][0]["content"] for case in real_cases(2000)]
    code = [text for text in texts if "code" in properties_of(text)]
    assert len(code) <= 4, code


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("refund", "very short"),
        ("Can you translate?", "no object"),
        ("please summarize for me", "no object"),
        ("fix it", "pronoun without antecedent"),
        ("Why does it not work?", "pronoun without antecedent"),
        ("can you do that for me", "pronoun without antecedent"),
        ("Translate the following:", "refers to what is not there"),
        ("please check the attached file", "refers to what is not there"),
        ("Which one is better?", "compares nothing named"),
        ("which is the cheapest", "compares nothing named"),
    ],
)
def test_requests_that_leave_something_open_are_candidates(text: str, reason: str) -> None:
    assert reason in clarify_reasons(text)


@pytest.mark.parametrize(
    "text",
    [
        "Where is my parcel?",
        "My printer is broken, can you fix it?",
        "Translate this sentence into French: good morning",
        "Cancel order 4711 please",
        "What is the capital of France?",
        "It is raining in Rome",
        "Which is better for photos, the Pixel or the iPhone, and why should I care about it?",
        "Summarize the plot of Hamlet in two lines",
    ],
)
def test_requests_that_say_what_they_want_are_not(text: str) -> None:
    assert clarify_reasons(text) == ()


def test_a_conversation_may_have_said_it_before() -> None:
    assert clarify_reasons("fix it", turns=2) == ()


def test_two_answers_to_one_request_are_two_readings_and_a_slip_is_none() -> None:
    assert has_several_readings(["a", "a ", "A", "b"])
    assert not has_several_readings(["a", "a", "a", "a", "b"])
    assert not has_several_readings(["a", "b"])
