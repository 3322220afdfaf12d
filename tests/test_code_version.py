from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgedistill

SOURCE = Path(edgedistill.__file__).parent
PROGRAM = """
from edgedistill.chat import Chat
from edgedistill.tasks import *
tasks = {
    "rtn": RunStage(stage="quantize_rtn", fields={"bits": 4}),
    "lora": RunStage(stage="merge_lora", fields={"adapter": "x"}),
    "gguf": Export(format="gguf", context_tokens=8),
    "onnx": Export(format="onnx", context_tokens=8),
    "judge": JudgeLogits(texts={}),
    "score": Score(runtime="llama_cpp", suite=(), sample=None, chat=Chat(), context_tokens=8),
}
for name, task in tasks.items():
    print(name, task.code().sha256)
"""


@pytest.fixture
def versions(tmp_path: Path) -> Callable[[str, str, str], set[str]]:
    """Edits a copy of the package and tells which tasks' versions changed."""
    package = tmp_path / "edgedistill"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))

    def read() -> dict[str, str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM]
        ran = subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return dict(line.split() for line in ran.stdout.splitlines())

    def edit(file: str, old: str, new: str) -> set[str]:
        before = read()
        path = package / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        after = read()
        path.write_text(text)
        return {name for name in before if before[name] != after[name]}

    return edit


Versions = Callable[[str, str, str], set[str]]


def test_a_stage_counts_for_itself_alone(versions: Versions) -> None:
    changed = versions("stages/quantize_rtn.py", "ROW_BLOCK_WEIGHTS = ", "ROW_BLOCK_WEIGHTS = 1 + ")
    assert changed == {"rtn"}


def test_what_modules_share_counts_for_all_that_import_it(versions: Versions) -> None:
    changed = versions("quantized.py", "8: 128", "8: 127")
    assert {"rtn", "gguf", "onnx"} <= changed


def test_an_exporter_loaded_by_name_counts_with_what_it_imports(versions: Versions) -> None:
    assert versions("gguf_blocks.py", "import", "X = 1\nimport") == {"gguf"}


def test_a_runtime_loaded_by_name_counts_where_it_scores(versions: Versions) -> None:
    assert versions("runtimes/llama_cpp.py", "import", "X = 1\nimport") == {"score"}


def test_comments_and_docstrings_do_not_count(versions: Versions) -> None:
    old, new = '"""Grids and', '"""Sentences and grids and'
    assert versions("quantized.py", old, new) == set()
    assert versions("quantized.py", "FIXED_ZERO: dict", "# why\nFIXED_ZERO: dict") == set()


def test_a_text_that_is_read_as_data_counts(versions: Versions) -> None:
    name = next((SOURCE / "texts").glob("*.txt"))
    text = name.read_text(encoding="utf-8")[:20]
    assert versions(f"texts/{name.name}", text, text + "!") == {"judge"}


def test_libraries_count_with_their_versions() -> None:
    from edgedistill.tasks import JudgeLogits

    libraries = JudgeLogits(texts={}).code().libraries
    assert {"torch", "transformers", "numpy"} <= set(libraries)
    assert "json" not in libraries
    assert "edgedistill" not in libraries
