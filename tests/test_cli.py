from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import edgedistill
from tests.recipes import MINIMAL, write_recipe

Tiny = Callable[[str], Path]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(edgedistill.__file__).parents[1])}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgedistill", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom edgedistill.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'gguf', 'ray', 'fsspec'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=True, cwd=tmp_path)
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "build" in run("--help", cwd=tmp_path).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3  # CPU seconds: what it costs, however busy the machine is


def test_the_version_goes_to_stdout(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"{edgedistill.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [("bild", "x.yaml"), ("build",), ("build", "x.yaml", "--threads", "4"), ()]
)
def test_a_command_that_is_misspelt_is_a_usage_error(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert "Usage" in ran.stderr + ran.stdout


@pytest.mark.parametrize("command", ["build", "plan", "check", "search"])
def test_a_missing_recipe_is_one_clear_message_and_no_traceback(
    tmp_path: Path, command: str
) -> None:
    ran = run(command, "none.yaml", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ""
    expected = (
        "error: 1 problem in the recipe\n- none.yaml: cannot be read: No such file or directory\n"
    )
    assert ran.stderr == expected
    assert not list(tmp_path.iterdir())


def test_check_says_all_that_is_wrong_at_once(tiny: Tiny, tmp_path: Path) -> None:
    text = MINIMAL.replace("context_tokens", "contxt_tokens").replace("gguf", "ggfu")
    write_recipe(tmp_path, tiny("llama"), text + "suite: nowhere.jsonl\nfloor: {{retention: 2}}\n")
    ran = run("check", "recipe.yaml", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: 5 problems in the recipe\n- recipe.yaml:1: ")
    assert ran.stderr.count("\n- recipe.yaml:") == 5
    assert "Traceback" not in ran.stderr
    write_recipe(tmp_path, tiny("llama"))
    good = run("check", "recipe.yaml", cwd=tmp_path)
    assert (good.returncode, good.stdout) == (0, "")
    assert "tiny is in order" in good.stderr


def test_a_plan_is_text_or_json_on_stdout(tiny: Tiny, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny("llama"))
    text = run("plan", "recipe.yaml", "--cache", "cache", "--only", "int8", cwd=tmp_path)
    assert text.returncode == 0
    assert text.stderr == ""
    assert "int8/gguf: export" in text.stdout
    assert "float/gguf" not in text.stdout
    as_json = run("plan", "recipe.yaml", "--cache", "cache", "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["parameters"] == 143808
    wrong = run("plan", "recipe.yaml", "--only", "int9", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "hint: did you mean 'int8'?" in wrong.stderr


def test_the_schema_is_json(tmp_path: Path) -> None:
    schema = json.loads(run("schema", cwd=tmp_path).stdout)
    assert "context_tokens" in schema["required"]


def test_dequantize_writes_a_student_and_refuses_to_write_over_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    from edgedistill.stages.quantize_rtn import QuantizeRtn

    (tmp_path / "quantized").mkdir()
    QuantizeRtn(bits=8).run(tiny("llama"), tmp_path / "quantized")
    assert run("dequantize", "quantized", "plain", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "plain" / "grids.json").exists()
    again = run("dequantize", "quantized", "plain", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    missing = run("dequantize", "nowhere", "other", cwd=tmp_path)
    assert missing.returncode == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_ends_with_130_and_goes_on_later(
    tiny: Tiny, tmp_path: Path, number: signal.Signals
) -> None:
    write_recipe(tmp_path, tiny("llama"))
    command = [sys.executable, "-m", "edgedistill", "build", "recipe.yaml", "--cache", "cache"]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=stderr)
        scratch, steps = tmp_path / "cache" / "scratch", tmp_path / "cache" / "steps"
        end = time.monotonic() + 120
        # In the middle of the third step.
        while not (steps.exists() and len(list(steps.iterdir())) == 2 and list(scratch.iterdir())):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(timeout=120) == 130
    said = (tmp_path / "stderr").read_text()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not list(scratch.iterdir())
    assert not (tmp_path / "exports").exists()
    plan = run("plan", "recipe.yaml", "--cache", "cache", "--json", cwd=tmp_path)
    assert sum(step["cached"] for step in json.loads(plan.stdout)["steps"]) >= 2
