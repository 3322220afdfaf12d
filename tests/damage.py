"""Damage to bytes and to JSON: what a broken copy, a careless script or an ill will does."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

KINDS = ("flip", "cut", "remove", "insert", "repeat", "number", "zero")
# What lengths, counts and offsets get wrong.
NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
# Nested so deeply that a parser that calls itself for each level runs out of stack.
DEEP = "@deep@"
DEEP_TEXT = "[" * 60_000 + "]" * 60_000
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**400,
    2**63,
    1e308,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    "../../x",
    "/etc/passwd",
    "~nobody-here/x",
    "x" * 5000,
    [],
    {},
    [[]],
    {"": None},
    [1, "x", None],
    DEEP,
)


@dataclass(frozen=True)
class Blow:
    """One thing that is done to bytes; ``place`` is a share of their length."""

    kind: str
    place: float
    value: int


def damage(whole: bytes, blows: Sequence[Blow]) -> bytes:
    """The bytes after some blows, one after the other."""
    data = bytearray(whole)
    for blow in blows:
        place, value = int(blow.place * len(data)), blow.value
        size = 1 + value % 16
        if blow.kind == "flip" and place < len(data):
            data[place] ^= 1 + value % 255
        elif blow.kind == "cut":
            del data[place:]
        elif blow.kind == "remove":
            del data[place : place + size]
        elif blow.kind == "insert":
            data[place:place] = bytes([value % 256]) * size
        elif blow.kind == "repeat":
            data[place:place] = data[max(0, place - 8 * size) : place]
        elif blow.kind == "number":
            number = struct.pack("<Q", NUMBERS[value % len(NUMBERS)] % 2**64)
            data[place : place + 8] = number[: 4 if value % 2 else 8]
        elif blow.kind == "zero":
            data[place : place + size] = bytes(size)
    return bytes(data)


def damaged_bytes(whole: bytes, until: float = 1.0) -> st.SearchStrategy[bytes]:
    """Bytes with one to four blows, all in the first part of them, up to the share ``until``."""
    blow = st.builds(
        Blow,
        st.sampled_from(KINDS),
        st.floats(0.0, until, exclude_max=True),
        st.integers(0, 2**16 - 1),
    )
    return st.lists(blow, min_size=1, max_size=4).map(lambda blows: damage(whole, blows))


def damaged_json(value: Any) -> st.SearchStrategy[str]:
    """JSON text in which one to three values are junk, gone, or have another key."""
    change = st.tuples(
        st.integers(0, 2**32 - 1),
        st.sampled_from(("junk", "junk", "drop", "rename")),
        st.integers(0, len(JUNK) - 1),
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _changed(value, changes))


def damaged_value(value: Any, changes: Sequence[tuple[int, str, int]]) -> Any:
    """A copy of JSON data after some changes, each at a place that its number picks."""
    changed = copy.deepcopy(value)
    for number, kind, choice in changes:
        junk = copy.deepcopy(JUNK[choice])
        places = list(_places(changed))
        if not places:
            return junk
        parent, key = places[number % len(places)]
        if kind == "drop":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[f"{key}_"] = parent.pop(key)
        else:
            parent[key] = junk
    return changed


def _changed(value: Any, changes: Sequence[tuple[int, str, int]]) -> str:
    return json.dumps(damaged_value(value, changes)).replace(f'"{DEEP}"', DEEP_TEXT)


def _places(value: Any) -> Any:
    """(container, key) of everything in it; long lists count with their beginning alone."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 20))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
