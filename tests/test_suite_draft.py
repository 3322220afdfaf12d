from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedistill
from edgedistill.errors import InputError, StageError, UsageError
from edgedistill.evaluate.draft import DraftSummary, closed_answers, describe, draft_suite
from edgedistill.evaluate.log_sample import CLARIFY, LEAST_CASES, SEVERAL_READINGS, sample_requests
from edgedistill.evaluate.logs import read_logs
from edgedistill.evaluate.suite import load_suite
from tests.sentiment_logs import CHOICES, log_rows, write_log

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(edgedistill.__file__).parents[1])}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 real texts, 700 of them said again, and what people type besides."""
    rows = log_rows(1500, repeats=700)
    extra = [
        {"prompt": f"My mail is user{i}@mail.example, parcel {i} is late"} for i in range(8)
    ] + [{"prompt": text} for text in ("fix it", "refund", "translate", "help", "cancel that")]
    return write_log(tmp_path_factory.mktemp("log") / "log.jsonl", ["{broken", *rows, *extra])


@pytest.fixture(scope="module")
def drafted(log: Path) -> tuple[DraftSummary, list[dict[str, Any]]]:
    out = log.with_name("draft.jsonl")
    return draft_suite(log, out, cases=300), read(out)


def test_a_draft_holds_distinct_requests_and_weights_that_add_up_to_the_log(
    drafted: tuple[DraftSummary, list[dict[str, Any]]],
) -> None:
    summary, lines = drafted
    assert (summary.requests, summary.skipped, summary.cases) == (2213, 1, 300)
    assert summary.exact_duplicates >= 700
    assert summary.distinct + summary.exact_duplicates + summary.near_duplicates == 2213
    assert len(lines) == len({line["id"] for line in lines}) == 300
    texts = {line["messages"][-1]["content"].casefold() for line in lines}
    assert len(texts) == 300
    assert sum(line["weight"] for line in lines) == pytest.approx(2213, rel=1e-4)
    assert sum(stratum.requests for stratum in summary.strata) == 2213
    assert sum(stratum.cases for stratum in summary.strata) == 300


def test_every_kind_of_request_has_its_minimum_and_tails_more_than_their_share(
    drafted: tuple[DraftSummary, list[dict[str, Any]]],
) -> None:
    summary, _ = drafted
    assert len(summary.strata) > 6
    least = min(LEAST_CASES, 300 // len(summary.strata))
    for stratum in summary.strata:
        assert stratum.cases >= min(least, stratum.distinct)
        assert stratum.weight == stratum.requests / stratum.cases
    tail = min(summary.strata, key=lambda stratum: stratum.requests)
    assert tail.cases / summary.cases > 2 * tail.requests / summary.requests


def test_the_weighted_shares_are_the_logs_on_average(log: Path) -> None:
    """Over seeds the weighted share of each answer is that of all lines, which a plain one is not
    free to be."""
    requests = read_logs(log).requests[:600]
    answers = [request.answer or "none" for request in requests]
    truth = {name: answers.count(name) / len(answers) for name in set(answers)}
    found: dict[str, list[float]] = {name: [] for name in truth}
    for seed in range(16):
        weights: dict[str, float] = defaultdict(float)
        for case in sample_requests(requests, 150, seed=seed).chosen:
            weights[case.request.answer or "none"] += case.weight
        for name in truth:
            found[name].append(weights[name] / len(answers))
    for name, share in truth.items():
        error = np.std(found[name]) / np.sqrt(16)
        assert abs(np.mean(found[name]) - share) < 4 * error + 1e-12, name


def test_a_closed_set_of_answers_becomes_choices(
    drafted: tuple[DraftSummary, list[dict[str, Any]]], log: Path
) -> None:
    summary, lines = drafted
    assert summary.choices == sorted(CHOICES)
    by_line = {f"log.jsonl:{request.line}": request for request in read_logs(log).requests}
    for line in lines:
        request = by_line[line["draft"]["source"]]
        assert line["kind"] == "choice"
        assert line["messages"][-1]["content"] == request.turns[-1].content
        if request.answer is None:
            assert "answer" not in line
        else:
            assert line["choices"][line["answer"]] == request.answer


def test_free_answers_are_no_choices() -> None:
    assert closed_answers(["yes", "no"] * 20) == ["no", "yes"]
    assert closed_answers([f"answer {i}" for i in range(100)]) is None
    assert closed_answers(["yes"] * 50) is None
    assert closed_answers(["yes", "no"] * 20 + ["it depends on what you mean"]) == ["no", "yes"]
    assert closed_answers(["yes", "no"] * 4) is None


def test_open_requests_are_marked_for_a_human(
    drafted: tuple[DraftSummary, list[dict[str, Any]]],
) -> None:
    summary, lines = drafted
    marked = {line["messages"][0]["content"]: line for line in lines if CLARIFY in line["slices"]}
    assert len(marked) >= 5
    assert "pronoun without antecedent" in summary.clarify
    for line in marked.values():
        assert line["draft"]["clarify"]


def test_a_request_that_is_answered_in_two_ways_is_open(tmp_path: Path) -> None:
    rows = [{"prompt": "book me a table for two", "answer": a} for a in ["when?", "done"] * 3]
    read_log = read_logs(write_log(tmp_path / "log.jsonl", rows))
    (case,) = sample_requests(read_log.requests, 5, seed=0).chosen
    assert case.clarify == (SEVERAL_READINGS,)
    assert (case.seen, case.weight) == (6, 6.0)


def test_personal_data_is_flagged_and_redacted_on_demand(log: Path, tmp_path: Path) -> None:
    plain = draft_suite(log, tmp_path / "plain.jsonl", cases=2000)
    redacted = draft_suite(log, tmp_path / "redacted.jsonl", cases=2000, redact=True)
    assert plain.personal_data == redacted.personal_data
    assert plain.personal_data["email"] == 8
    assert "@mail.example" in (tmp_path / "plain.jsonl").read_text(encoding="utf-8")
    assert "@mail.example" not in (tmp_path / "redacted.jsonl").read_text(encoding="utf-8")
    for line in read(tmp_path / "redacted.jsonl"):
        if "email" in line["draft"].get("personal_data", ()):
            assert line["messages"][0]["content"].startswith("My mail is [EMAIL_1], parcel ")
            assert line["draft"]["redacted"] is True
    assert "left in; --redact replaces it" in "\n".join(describe(plain))


def test_tags_that_name_users_make_no_slices(tmp_path: Path) -> None:
    rows = [
        row | {"tags": {"user": i // 6, "session": i, "plan": "free" if i % 3 else "paid"}}
        for i, row in enumerate(log_rows(360))
    ]
    summary = draft_suite(write_log(tmp_path / "log.jsonl", rows), tmp_path / "d", cases=300)
    assert summary.ignored_tags == ["session", "user"]
    slices = {name for line in read(tmp_path / "d") for name in line["slices"]}
    assert {"plan=free", "plan=paid"} <= slices
    assert not any(name.startswith(("user=", "session=")) for name in slices)


def test_the_loader_refuses_a_draft_until_a_person_has_completed_it(
    log: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft.jsonl"
    draft_suite(log, out, cases=200)
    with pytest.raises(InputError, match="is a draft that nobody has checked") as caught:
        load_suite([out])
    assert "remove the key" in str(caught.value)
    lines = [line for line in read(out) if "answer" in line]
    for line in lines:
        del line["draft"]
    cases = load_suite([write_log(tmp_path / "suite.jsonl", lines)])
    assert len(cases) > 150
    assert {"question", "script=latin"} <= {name for case in cases for name in case.slices}


def test_the_same_log_gives_the_same_bytes_and_nothing_is_overwritten(
    log: Path, tmp_path: Path
) -> None:
    one, two, other = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "3.jsonl"))
    draft_suite(log, one, cases=150, seed=4)
    draft_suite(log, two, cases=150, seed=4)
    draft_suite(log, other, cases=150, seed=5)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        draft_suite(log, one, cases=150)
    with pytest.raises(StageError):
        draft_suite(log, tmp_path / "nowhere" / "x.jsonl", cases=150)
    with pytest.raises(UsageError, match="fewer than the"):
        draft_suite(log, tmp_path / "few.jsonl", cases=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl", "3.jsonl"]


def test_the_command_talks_on_stderr_and_gives_json_on_stdout(log: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgedistill", "suite", "from-logs", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    told = run(str(log), "--out", "a.jsonl", "--cases", "100")
    assert (told.returncode, told.stdout) == (0, "")
    assert "kind of request" in told.stderr
    assert "100 drafts in a.jsonl" in told.stderr
    as_json = run(str(log), "--out", "b.jsonl", "--cases", "100", "--json")
    assert DraftSummary.model_validate_json(as_json.stdout).cases == 100
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    again = run(str(log), "--out", "a.jsonl")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: a.jsonl: exists already")
    missing = run("nowhere.jsonl", "--out", "c.jsonl")
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
