"""Reports: everything that was found is named in them, and no text in them is obeyed."""

from __future__ import annotations

import json
import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgedistill.errors import StageError
from edgedistill.report import words
from edgedistill.report.build import render_json, write_reports
from edgedistill.report.markdown import cell, render_markdown
from edgedistill.report.page import limitations, render_page
from edgedistill.report.pictures import quality_against_size
from edgedistill.report.svg import Scale, nice_ticks
from edgedistill.report.table import render_table
from edgedistill.results import BuildReport, Check, FloorCheck, Interval
from tests.built_report import HOSTILE, REFERENCE_SCORE, build_report

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, texts and attributes, and complains of what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def change(report: BuildReport, path: str, value: object) -> BuildReport:
    """A copy with the value at a dotted path replaced."""
    data: Any = report.model_dump()
    place = data
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return BuildReport.model_validate(data)


@pytest.fixture(scope="module")
def report() -> BuildReport:
    return build_report()


@pytest.fixture(scope="module")
def page(report: BuildReport) -> Page:
    return Page(render_page(report))


def printed(report: BuildReport, width: int = 80, page: Path | None = None) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_table(report, page))
    return capture.get()


def test_the_page_names_every_artifact_check_slice_and_step(
    report: BuildReport, page: Page
) -> None:
    names = [judgement.reason for judgement in report.judgements]
    names += [step.label for step in report.steps]
    for artifact in report.artifacts:
        names += [artifact.rung, artifact.format, words.megabytes(artifact.size_bytes)]
        names += [artifact.path] if words.ship_targets(report, artifact) else []
        names += [words.standing(report, artifact).reason] if artifact.why_not else []
        assert artifact.verification is not None
        assert artifact.evaluation is not None
        for check in artifact.verification.checks:
            names += [check.name, words.check_limit(check)]
            names += [check.detail] if not check.passed else []
        if artifact.format == "gguf":
            names += [quality.slice for quality in artifact.evaluation.slices[1:]]
            names += [words.floor_check(check) for check in artifact.evaluation.floor]
        if artifact.bench is not None:
            names += [words.number(v, 4) for v in artifact.bench.ttft_model_ms[64].raw]
            names.append(words.percent(artifact.bench.decode_roofline_share, 0))
            names.append(artifact.bench.reason)
    missing = {name for name in names if " ".join(name.split()) not in page.text}
    assert not missing


def test_the_page_is_whole_and_needs_no_network(page: Page) -> None:
    assert page.open == []
    assert "script" not in page.tags
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    urls = [v for k, v in page.attributes if k in ("src", "href") and v and not v.startswith("#")]
    assert urls == []


def test_hostile_text_is_shown_on_the_page_and_not_obeyed(report: BuildReport, page: Page) -> None:
    shown = "</td><script>alert('x')</script> | `{{ 7*7 }}` \\x1b[31m [red]& \\u202egnp.exe # head"
    assert shown in page.text
    html = render_page(report)
    assert "\x1b" not in html
    assert "\u202e" not in html


def poisoned(value: Any, key: str = "") -> Any:
    """The data with hostile text in every place that holds text and not a choice."""
    if isinstance(value, dict):
        return {k: poisoned(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    free = isinstance(value, str) and key not in ("verdict", "kind")
    return f"{value} {HOSTILE}" if free else value


def test_no_text_of_a_report_is_obeyed_wherever_it_stands(report: BuildReport) -> None:
    hostile = BuildReport.model_validate(poisoned(report.model_dump()))
    page = Page(render_page(hostile))
    assert "script" not in page.tags
    assert page.open == []
    markdown = render_markdown(hostile)
    assert not re.search(r"<(?!!-- -->)", markdown)
    assert "\n# head" not in markdown
    for text in (render_page(hostile), printed(hostile), markdown):
        assert "\x1b" not in text
        assert "\u202e" not in text
    render_json(hostile)


def test_markdown_keeps_each_row_in_its_table(report: BuildReport) -> None:
    columns = 0
    for line in render_markdown(report).splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (0, cells), line
        columns = cells


def test_markdown_names_what_the_page_names(report: BuildReport) -> None:
    markdown = render_markdown(report)
    for artifact in report.artifacts:
        assert f"Quality of {artifact.rung} in {artifact.format}" in markdown
    assert "prefill = token by token" in markdown
    assert "nothing to ship" in markdown
    assert "unnamed loss" in markdown


@pytest.mark.parametrize("text", ["a|b", "`x`", "<b>", "# head", "*x*", "[a](b)", "a\nb", "@you"])
def test_a_cell_escapes_markup(text: str) -> None:
    assert cell(text) != text
    assert "\n" not in cell(text)


def test_the_table_ends_with_what_to_ship_and_where_to_read_on(report: BuildReport) -> None:
    lines = printed(report, page=Path("exports/x/report.html")).rstrip().splitlines()
    assert lines[-1] == "report: exports/x/report.html"
    assert any("gguf: ship int8" in line for line in lines[-8:])
    assert any("coreml: no rung to ship" in line for line in lines[-8:])


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_is_whole_on_a_terminal(report: BuildReport, width: int) -> None:
    text = printed(report, width)
    assert "…" not in text
    for artifact in report.artifacts:
        standing = words.standing(report, artifact)
        pattern = rf"^{artifact.rung}\s+{artifact.format}\s+{words.megabytes(artifact.size_bytes)}"
        row = re.search(rf"{pattern}.*{re.escape(standing.label)}", text, re.MULTILINE)
        assert row, (artifact.rung, artifact.format)
        assert artifact.why_not is None or standing.reason in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= width


def test_what_was_not_measured_is_said_and_not_drawn_as_a_number(report: BuildReport) -> None:
    row = next(line for line in printed(report).splitlines() if "coreml" in line)
    assert row.count("–") == 2
    said = " ".join(limitations(report))
    assert "the device is unproven" in said
    assert "The speed of float/coreml, int8/coreml and int4/coreml was not measured." in said
    assert "int8/coreml answered a sample of 240 of the suite's 5,200 cases." in said


def test_a_step_that_failed_is_said_where_a_reader_looks(report: BuildReport) -> None:
    steps = [
        step.model_copy(update={"error": "it ran out of luck" if not i else None})
        for i, step in enumerate(report.steps)
    ]
    broken = report.model_copy(update={"steps": steps, "artifacts": [], "judgements": []})
    assert limitations(broken)[0].startswith(f"Whatever stands behind the step {steps[0].label}")
    whole = report.model_copy(update={"steps": [s for s in report.steps if not s.error]})
    assert not any("Whatever" in sentence for sentence in limitations(whole))
    top = render_page(broken).partition('id="ladder"')[0]
    assert "No target was judged" in top
    assert f"{steps[0].label}: it ran out of luck" in top


def test_the_peak_of_every_step_is_shown_and_the_largest_beside_what_is_allowed(
    report: BuildReport, page: Page
) -> None:
    shown, markdown = page.text, render_markdown(report)
    assert report.peak_own_bytes == 1_890_000_000
    for text in (shown, markdown):
        assert "at most 1.89 GB of memory of 3.0 GB allowed" in text
    for step in report.steps:
        counted, mapped = step.peak_own_bytes / 1e9, step.peak_rss_bytes / 1e9
        assert re.search(
            rf"{re.escape(cell(step.label))}.* {counted:.2f} \| +{mapped:.2f} \|", markdown
        )
        assert f"{counted:.2f} GB" in shown


def test_a_rejected_run_is_marked_everywhere(report: BuildReport, page: Page) -> None:
    assert re.search(r"int4\s+onnx.*112\*\s+122\*", printed(report))
    assert "112 (rejected)" in render_markdown(report)
    assert "int4/onnx is rejected: the machine was busy" in page.text


def test_a_rejected_speed_is_marked_where_it_is_said_what_to_ship(report: BuildReport) -> None:
    """Once in the ladder's row, and beside both figures of what ships."""
    shipped = {(j.rung, j.format) for j in report.judgements}

    def rejected(one: Any) -> Any:
        if (one.rung, one.format) not in shipped or one.bench is None:
            return one
        return one.model_copy(update={"bench": one.bench.model_copy(update={"accepted": False})})

    def times_said(report: BuildReport) -> int:
        return Page(render_page(report)).text.count("busy machine")

    worse = report.model_copy(update={"artifacts": [rejected(one) for one in report.artifacts]})
    pairs = zip(report.artifacts, worse.artifacts, strict=True)
    changed = sum(one is not other for one, other in pairs)
    assert changed > 0
    assert times_said(worse) - times_said(report) >= 3 * changed


def test_a_build_without_a_suite_and_without_results_is_reported_too(report: BuildReport) -> None:
    bare = [
        artifact.model_copy(
            update={"verification": None, "evaluation": None, "bench": None, "shippable": False}
        )
        for artifact in report.artifacts
    ]
    for artifacts in (bare, []):
        empty = report.model_copy(
            update={"artifacts": artifacts, "reference": None, "judgements": [], "exit_code": 1}
        )
        page = Page(render_page(empty))
        assert page.open == []
        assert "quality is unjudged" in page.text
        assert "A step failed." in printed(empty)
        assert "A step failed." in render_markdown(empty)
        assert quality_against_size(empty) is None


def test_report_json_reads_back_as_the_same_report(report: BuildReport, tmp_path: Path) -> None:
    write_reports(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert BuildReport.model_validate_json((tmp_path / "report.json").read_bytes()) == report


def test_figures_that_are_not_finite_survive_in_valid_json(
    report: BuildReport, tmp_path: Path
) -> None:
    place = "artifacts.0.verification.against_reference.0.kl_mean"
    broken = change(report, place, math.nan)
    broken = change(broken, "artifacts.0.evaluation.slices.0.retention", math.inf)
    write_reports(broken, tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    verification = BuildReport.model_validate_json(text).artifacts[0].verification
    assert verification is not None
    assert math.isnan(verification.against_reference[0].kl_mean)
    page = Page((tmp_path / "report.html").read_text())
    coordinates = [v for k, v in page.attributes if k in ("x1", "x2", "y1", "y2", "cx", "cy", "x")]
    assert coordinates
    assert all(value is not None and math.isfinite(float(value)) for value in coordinates)


def test_a_report_that_does_not_read_back_is_refused(report: BuildReport, tmp_path: Path) -> None:
    wrong = report.model_copy(update={"seconds": "soon"})
    with pytest.raises(StageError, match="seconds"):
        write_reports(wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_half_written(report: BuildReport, tmp_path: Path) -> None:
    write_reports(report, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()  # a rename onto a directory fails
    with pytest.raises(OSError, match=r"report\.md"):
        write_reports(report.model_copy(update={"recipe": "other"}), tmp_path)
    assert stat.S_ISDIR((tmp_path / "report.md").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_the_floor_line_lies_where_the_axis_says(report: BuildReport) -> None:
    svg = quality_against_size(report)
    assert svg is not None
    floors = [float(y) for y in re.findall(r'y1="([\d.]+)"[^>]*class="floor"', svg)]
    ticks = re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*class="tick">([\d.]+)%</text>', svg)
    points = sorted((float(y) - 4, float(label) / 100) for y, label in ticks)
    (top, high), (bottom, low) = points[0], points[-1]
    values = [high + (y - top) / (bottom - top) * (low - high) for y in floors]
    assert sorted(values) == pytest.approx([0.54 / REFERENCE_SCORE, 0.98], abs=5e-4)


def test_marks_are_filled_only_when_they_may_ship(report: BuildReport) -> None:
    svg = quality_against_size(report)
    assert svg is not None
    shippable = sum(artifact.shippable for artifact in report.artifacts)
    assert len(re.findall(r'class="mark filled', svg)) == shippable
    assert len(re.findall(r'class="mark hollow', svg)) == len(report.artifacts) - shippable


def test_scales_and_ticks() -> None:
    assert nice_ticks(0.0, 580.0, 6) == [0, 100, 200, 300, 400, 500, 600]
    scale = Scale(1e-4, 1.0, 0.0, 400.0, logarithmic=True)
    assert scale(1e-2) == pytest.approx(200.0)
    assert scale(1e-9) == 0.0
    assert scale(math.nan) == 400.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (100.0, "100"),
        (0.00708, "0.00708"),
        (2.14e-6, "2.1e-6"),
        (1234.5, "1,234"),
        (3e9, "3e9"),
        (-0.5, "-0.5"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "limit", "passed", "text"),
    [
        (0.001, 0.01, True, "≤ 0.01"),
        (0.02, 0.01, False, "≤ 0.01"),
        (0.99, 0.98, True, "≥ 0.98"),
        (0.97, 0.98, False, "≥ 0.98"),
        (0.0, 0.0, True, "limit 0"),
        (None, None, True, ""),
    ],
)
def test_the_side_of_a_limit(
    value: float | None, limit: float | None, passed: bool, text: str
) -> None:
    check = Check(name="x", passed=passed, value=value, limit=limit)
    assert words.check_limit(check) == text


@pytest.mark.parametrize(
    ("clause", "limit", "value", "text"),
    [
        ("score", 0.54, 0.5712, "score ≥ 54.0%: 57.1% (56.1–58.1%)"),
        ("max_broken", 0.03, 0.5712, "broken ≤ 3.0%: 57.1% (56.1–58.1%)"),
        (
            "max_log_score_loss",
            0.02,
            0.5712,
            "log-score loss ≤ 0.02 nats: +0.571 (+0.561 to +0.581)",
        ),
        ("unnamed loss", 0.02, 0.05, "unnamed loss: score −5.0 points, tolerated −2.0"),
        ("protected", 0.0, 0.01, "protected: score −1.0 points"),
        ("retention", 0.98, None, "retention ≥ 98.0%: no case in the sample"),
    ],
)
def test_a_clause_reads_as_a_sentence(
    clause: str, limit: float, value: float | None, text: str
) -> None:
    interval = None if value is None else Interval(low=value - 0.01, high=value + 0.01)
    check = FloorCheck(
        clause=clause, slice="all", limit=limit, value=value, interval=interval, verdict="pass"
    )
    assert words.floor_check(check) == text
