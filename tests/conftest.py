"""Shared fixtures: tiny real students, built once a session."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_student


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family name of ``tests.tiny`` to the directory of a tiny student."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = write_student(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


# Their tests are short, but many: each runs a model in a real runtime, or a process of its own.
SLOW_MODULES = {
    f"test_{name}.py"
    for name in (
        *("bench", "code_version", "core_ml", "coreml", "decoder", "evaluate_command"),
        *("evaluate_compare", "evaluate_coverage", "evaluate_kinds", "evaluate_mixed"),
        *("evaluate_sequential", "evaluate_statistics", "evaluate_together", "evaluate_waivers"),
        *("evaluate_calibration", "evaluate_router", "evaluate_power", "evaluate_judge"),
        *(
            "evaluate_score",
            "gguf",
            "gguf_intake",
            "gguf_sentencepiece",
            "llama_cpp",
            "merge_lora",
            "mil_interpreter",
        ),
        *("mil_ops", "onnx", "onnx_facts", "onnx_runtime"),
        *("pipeline", "quantize_rtn", "ray", "sentiment_data"),
        *("suite_draft", "suite_traffic", "torch_reference"),
        *("verify", "verify_cache", "verify_command", "verify_golden", "verify_lint"),
        *("verify_positions", "verify_rounding", "verify_text"),
    )
}


# Minutes each, and one worker takes a whole module: begun last, they would keep the other waiting.
LONGEST_MODULES = ("test_demo.py", "test_verify_command.py", "test_no_false_alarm.py")


def pytest_configure() -> None:
    """Let children be interrupted, also where a shell runs the tests in the background.

    Such a shell has SIGINT ignored, and a program that ignores it passes that on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow modules as slow; begin with the longest modules."""
    for item in items:
        if item.path.name in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONGEST_MODULES)
