"""Tokenizer, template, BOS and EOS of every format's own text program, held to the student's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.results import Check
from edgedistill.student import Student
from edgedistill.text_program import DirectoryText
from edgedistill.verify.conversations import matrix_of
from edgedistill.verify.strings import HARD_STRINGS
from edgedistill.verify.text import check_text

FORMATS = plugin_names("exporters")
CONTEXT = 256
TOOLS = (
    "{%- if tools %}<|im_start|>system\n"
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "Functions:\n{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{%- elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'system' and not loop.first %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{ \'\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{ '<|im_start|>tool\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for message in messages %}"
    "{% set content = '<|unused_0|>' + message['role'] + '<|unused_1|>\n\n'"
    " + message['content'] | trim + '<|unused_2|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|unused_0|>assistant<|unused_1|>\n\n' }}{% endif %}"
)
TEMPLATES = {"tools": TOOLS, "strict": STRICT, "headers": HEADERS}


def template(student: Path, text: str | None) -> None:
    if text is None:
        (student / "chat_template.jinja").unlink()
    else:
        (student / "chat_template.jinja").write_text(text)


def config(student: Path, file: str, **changes: Any) -> None:
    path = student / file
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stated | changes))


def add_bos(student: Path) -> None:
    """The post-processor puts BOS before every text, as Llama 3's does."""
    path = student / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    path.write_text(json.dumps(tokenizer))


def other_merges(student: Path) -> None:
    """Without the most used merge, its words are cut elsewhere."""
    path = student / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["merges"][5]
    path.write_text(json.dumps(tokenizer))


@pytest.fixture
def student(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama"), tmp_path / "student")


def checked(exported: Path, against: Path, root: Path, format_name: str) -> dict[str, Check]:
    """The checks of text of one student's artifact, held to another student."""
    artifact = root / f"artifact-{format_name}"
    artifact.mkdir()
    exporter = load_plugin("exporters", format_name)()
    exporter.export(Student(exported), artifact, context_tokens=CONTEXT)
    runtime = load_plugin("runtimes", exporter.runtime)()
    with runtime.open(artifact, context_tokens=CONTEXT, threads=1) as session:
        return {check.name: check for check in check_text(session, artifact, against)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


NAMES = ["tokenizer: ids", "template: conversations", "tokens: bos", "tokens: eos"]


@pytest.mark.parametrize("format_name", FORMATS)
# A tokenizer that adds BOS goes with a template that writes it, or with none; "tools" writes none.
@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [
        *((name, False) for name in ("own", *TEMPLATES, "none")),
        *((name, True) for name in ("own", *TEMPLATES, "none") if name != "tools"),
    ],
)
def test_good_artifacts_raise_no_alarm(
    name: str, adds_bos: bool, format_name: str, student: Path, tmp_path: Path
) -> None:
    if name != "own":
        template(student, TEMPLATES.get(name))
    if adds_bos:
        add_bos(student)
    checks = checked(student, student, tmp_path, format_name)
    assert list(checks) == NAMES
    assert failed(checks) == set(), checks


def stale_template(faulty: Path) -> None:
    template(faulty, "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")


def untrimmed_template(faulty: Path) -> None:
    text = (faulty / "chat_template.jinja").read_text()
    template(faulty, text.replace("message['content']", "(message['content'] | trim)"))


def no_template(faulty: Path) -> None:
    template(faulty, None)


def other_end(faulty: Path) -> None:
    config(faulty, "generation_config.json", eos_token_id=7)
    config(faulty, "config.json", eos_token_id=7)


def one_end_more(faulty: Path) -> None:
    config(faulty, "generation_config.json", eos_token_id=[2, 9])


FAULTS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "another template": (stale_template, {"template: conversations"}),
    "a template that trims": (untrimmed_template, {"template: conversations"}),
    "no template": (no_template, {"template: conversations"}),
    "BOS added": (add_bos, {"tokens: bos"}),
    "another EOS": (other_end, {"tokens: eos"}),
    "an EOS too many": (one_end_more, {"tokens: eos"}),
    "a merge lost": (other_merges, {"tokenizer: ids"}),
}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught_by_its_own_check(
    fault: str, format_name: str, student: Path, tmp_path: Path
) -> None:
    plant, caught_by = FAULTS[fault]
    faulty = shutil.copytree(student, tmp_path / "faulty")
    plant(faulty)
    checks = checked(faulty, student, tmp_path, format_name)
    assert failed(checks) == caught_by, checks
    (name,) = caught_by
    assert checks[name].detail
    assert (checks[name].value or 0.0) >= 1.0


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_end_that_was_lost_is_named(format_name: str, student: Path, tmp_path: Path) -> None:
    config(student, "generation_config.json", eos_token_id=[2, 300])
    faulty = shutil.copytree(student, tmp_path / "faulty")
    config(faulty, "generation_config.json", eos_token_id=[2])
    ends = checked(faulty, student, tmp_path, format_name)["tokens: eos"]
    assert not ends.passed
    assert "300" in ends.detail


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_bos_that_was_lost_is_named(format_name: str, student: Path, tmp_path: Path) -> None:
    faulty = shutil.copytree(student, tmp_path / "faulty")
    add_bos(student)
    assert failed(checked(faulty, student, tmp_path, format_name)) == {"tokens: bos"}


def test_the_matrix_has_over_sixty_lines_and_no_line_twice(student: Path) -> None:
    matrix = matrix_of(DirectoryText(student))
    assert len(HARD_STRINGS) == len(set(HARD_STRINGS)) >= 35
    assert len({c.name for c in matrix}) == len(matrix) >= 60
    texts = [(repr(c.messages), repr(c.tools), c.answering) for c in matrix]
    assert len(set(texts)) == len(texts)


def test_tools_are_asked_for_where_the_template_knows_them(student: Path) -> None:
    without = matrix_of(DirectoryText(student))
    assert not any(c.tools for c in without)
    template(student, TOOLS)
    own = DirectoryText(student)
    with_tools = [c for c in matrix_of(own) if c.tools]
    assert len(with_tools) >= 5
    rendered = [c.render_by(own) or "" for c in with_tools]
    assert all("clock" in text or "Zürich" in text for text in rendered)


def test_a_template_that_refuses_is_told_from_one_that_renders(student: Path) -> None:
    template(student, STRICT)
    own = DirectoryText(student)
    refused = {c.name for c in matrix_of(own) if c.render_by(own) is None}
    assert {"assistant first", "two users", "system"} <= refused
    assert "eight turns" not in refused
