from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedistill.errors import InputError
from edgedistill.evaluate import logs
from edgedistill.evaluate.logs import Turn, read_logs
from tests.sentiment_logs import write_log

PLAIN = {"prompt": "Where is my parcel?"}
USER = {"role": "user", "content": "Where is my parcel?"}


def read_one(path: Path, row: Any) -> logs.Request:
    (request,) = read_logs(write_log(path / "log.jsonl", [row])).requests
    return request


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"input": "Where is my parcel?"},
        {"messages": [USER]},
        {"messages": [{"role": "Human", "content": "Where is my parcel?"}]},
        {"messages": [USER | {"content": [{"type": "text", "text": "Where is my parcel?"}]}]},
        {"messages": [USER, {"role": "assistant", "content": "On its way."}]},
    ],
)
def test_requests_are_read_by_their_common_names(tmp_path: Path, row: dict[str, Any]) -> None:
    request = read_one(tmp_path, row)
    assert request.turns == (Turn("user", "Where is my parcel?"),)
    assert request.answer == ("On its way." if "assistant" in json.dumps(row) else None)


def test_a_conversation_keeps_its_turns_and_its_system_prompt_is_not_its_text(
    tmp_path: Path,
) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "bot", "content": "Yes?"},
        USER,
    ]
    request = read_one(tmp_path, {"messages": turns, "response": "On its way."})
    assert [turn.role for turn in request.turns] == ["system", "user", "assistant", "user"]
    assert request.text == "Hello\nYes?\nWhere is my parcel?"
    assert request.answer == "On its way."


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1_760_000_000, 1_760_000_000.0),
        (1_760_000_000_500, 1_760_000_000.5),
        ("2025-10-09T08:53:20Z", 1_760_000_000.0),
        ("2025-10-09T10:53:20+02:00", 1_760_000_000.0),
        ("2025-10-09 08:53:20", 1_760_000_000.0),
        ("yesterday", None),
        (-5, None),
        (10**400, None),
        (True, None),
        ([], None),
    ],
)
def test_times_are_read_as_seconds_and_bad_ones_are_left_out(
    tmp_path: Path, value: Any, seconds: float | None
) -> None:
    assert read_one(tmp_path, PLAIN | {"timestamp": value}).time_s == seconds


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (["b", "a", "a"], ("a", "b")),
        ("refund", ("refund",)),
        ({"intent": "refund", "nested": {"x": 1}, "v": 2}, ("intent=refund", "v=2")),
        ([None, {"x": 1}, "x" * 65, " "], ()),
        (None, ()),
    ],
)
def test_tags_come_in_three_shapes(tmp_path: Path, value: Any, tags: tuple[str, ...]) -> None:
    assert read_one(tmp_path, PLAIN | {"tags": value}).tags == tags


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "is not JSON in UTF-8"),
        ("[" * 100_000, "is not JSON in UTF-8"),
        ("[1]", "is list, not a JSON object"),
        ({"foo": 1}, "holds neither messages nor a prompt"),
        ({"messages": 3}, "messages = 3 is not a list"),
        ({"messages": ["hi"]}, "messages.0 = hi is not a message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role = tool is not known"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content is not a text"),
        ({"messages": []}, "the user says nothing"),
        ({"prompt": "  "}, "the user says nothing"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named_and_the_others_are_read(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = write_log(tmp_path / "log.jsonl", [PLAIN, "", row, PLAIN])
    read = read_logs(path)
    assert [request.line for request in read.requests] == [1, 4]
    (problem,) = read.problems
    assert str(problem).startswith(f"{path}:3: ")
    assert message in str(problem)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.jsonl", [PLAIN, *["nonsense"] * 12])
    with pytest.raises(InputError, match="12 lines cannot be understood, 1 can") as caught:
        read_logs(path)
    assert caught.value.message.count("is not JSON") == 10
    assert "and 2 more" in caught.value.message
    with pytest.raises(InputError, match="holds no request"):
        read_logs(write_log(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(InputError, match="cannot be read"):
        read_logs(tmp_path / "nowhere.jsonl")


def test_a_line_without_end_is_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LINE_BYTES", 100)
    path = write_log(tmp_path / "log.jsonl", [PLAIN, {"prompt": "x" * 1000}, PLAIN])
    read = read_logs(path)
    assert [request.line for request in read.requests] == [1, 3]
    assert "is longer than 100 bytes" in str(read.problems[0])


def test_a_byte_order_mark_and_lone_surrogates_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a \\ud83d b"}\n')
    (request,) = read_logs(path).requests
    assert request.text.encode("utf-8") == b"a ? b"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "tags", "time", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=4),
    junk=st.binary(max_size=30),
)
def test_whatever_is_in_a_file_it_is_read_or_refused(
    tmp_path: Path, rows: list[str], junk: bytes
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([*(r.encode("utf-8", "replace") for r in rows), junk]))
    try:
        read = read_logs(path)
    except InputError:
        return
    for request in read.requests:
        assert request.turns[-1].role == "user"
        request.text.encode("utf-8")
