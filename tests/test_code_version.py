from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import edgedistill
from edgedistill import code_version as module
from edgedistill.chat import Chat
from edgedistill.task import Task
from edgedistill.tasks import Export, JudgeLogits, RunStage, Score

SOURCE = Path(edgedistill.__file__).parent
TASKS: dict[str, Task] = {
    "rtn": RunStage(stage="quantize_rtn", fields={"bits": 4}),
    "lora": RunStage(stage="merge_lora", fields={"adapter": "x"}),
    "gguf": Export(format="gguf", context_tokens=8),
    "onnx": Export(format="onnx", context_tokens=8),
    "judge": JudgeLogits(texts={}, chat=Chat()),
    "score": Score(runtime="llama_cpp", suite=(), sample=None, chat=Chat(), context_tokens=8),
}


@pytest.fixture
def versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, str], set[str]]:
    """Edits a copy of the sources and tells which tasks' versions changed."""
    shutil.copytree(SOURCE, tmp_path / "edgedistill", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "_ROOT", tmp_path)

    def read() -> dict[str, str]:
        forget()
        return {name: task.code().sha256 for name, task in TASKS.items()}

    def edit(file: str, old: str, new: str) -> set[str]:
        before = read()
        path = tmp_path / "edgedistill" / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        after = read()
        forget()
        return {name for name in before if before[name] != after[name]}

    return edit


def forget() -> None:
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


END = "from __future__ import annotations\n"
Versions = Callable[[str, str, str], set[str]]


def test_a_stage_counts_for_itself_alone(versions: Versions) -> None:
    changed = versions("stages/quantize_rtn.py", "BLOCK_WEIGHTS = ", "BLOCK_WEIGHTS = 1 + ")
    assert changed == {"rtn"}


def test_what_modules_share_counts_for_all_that_import_it(versions: Versions) -> None:
    changed = versions("quantized.py", "8: 128", "8: 127")
    assert {"rtn", "gguf", "onnx"} <= changed


def test_an_exporter_loaded_by_name_counts_with_what_it_imports(versions: Versions) -> None:
    changed = versions("gguf_blocks.py", END, END + "X = 1\n")
    assert "gguf" in changed
    assert not changed & {"onnx", "rtn", "lora", "judge"}


def test_a_runtime_loaded_by_name_counts_where_it_scores(versions: Versions) -> None:
    assert versions("runtimes/llama_cpp.py", END, END + "X = 1\n") == {"score"}


def test_comments_and_docstrings_do_not_count(versions: Versions) -> None:
    old, new = '"""Grids and', '"""Sentences and grids and'
    assert versions("quantized.py", old, new) == set()
    assert versions("quantized.py", "FIXED_ZERO: dict", "# why\nFIXED_ZERO: dict") == set()


def test_a_text_that_is_read_as_data_counts(versions: Versions) -> None:
    name = next((SOURCE / "texts").glob("*.txt"))
    text = name.read_text(encoding="utf-8")[:20]
    assert versions(f"texts/{name.name}", text, text + "!") == {"judge"}


def test_libraries_count_with_their_versions() -> None:
    libraries = JudgeLogits(texts={}, chat=Chat()).code().libraries
    assert {"torch", "transformers", "numpy"} <= set(libraries)
    assert "json" not in libraries
    assert "edgedistill" not in libraries
