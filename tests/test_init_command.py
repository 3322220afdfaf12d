"""`edgedistill init` as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.recipe_load import load_recipe
from tests.test_cli import ENVIRONMENT, run

Tiny = Callable[[str], Path]
WORDS_OF_A_REPORT = {
    "schema_version",
    "figures",
    "student",
    "context_tokens",
    "devices",
    "rows",
    "left_out",
    "refused_formats",
    "warnings",
    "recipe",
}
OF_A_STUDENT = {
    *("source", "kind", "name", "family", "parameters", "layers", "hidden_size", "ffn_size"),
    *("heads", "kv_heads", "head_dim", "vocab_size", "tied_embeddings", "max_context_tokens"),
    *("weights", "quantized", "stored_bytes", "tokenizer", "chat_template", "adapters"),
}
OF_A_ROW = {
    *("rung", "format", "weight_bytes", "bits_per_weight", "kv_cache_bits", "kv_cache_bytes"),
    *("peak_ram_bytes", "on"),
}
OF_A_DEVICE = {"name", "memory", "ram_gb", "app_ram_mb", "bandwidth_gb_per_s", "formats"}
ON_A_DEVICE = {"fits", "spare_bytes", "most_tok_per_s", "most_tok_per_s_full"}


def test_a_table_goes_to_stdout_and_a_recipe_to_its_place(tiny: Tiny, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "my model"))
    ran = run("init", "my model", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == (
        "wrote recipes/my-model.yaml; next: edgedistill plan recipes/my-model.yaml\n"
    )
    assert "my model: llama, 0.1M parameters, F32 (0.6 MB), float" in ran.stdout
    assert "nothing was measured" in ran.stdout
    assert "raspberry-pi-5" in ran.stdout
    loaded = load_recipe(tmp_path / "recipes/my-model.yaml")
    assert loaded.recipe.name == "my-model"
    assert loaded.student is not None
    assert loaded.student.samefile(student)
    assert run("check", "recipes/my-model.yaml", cwd=tmp_path).returncode == 0
    plan = run("plan", "recipes/my-model.yaml", "--cache", "cache", cwd=tmp_path)
    assert plan.returncode == 0
    assert [p.name for p in (tmp_path / "recipes").iterdir()] == ["my-model.yaml"]


def test_a_recipe_is_replaced_by_force_alone(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ("init", str(tiny("llama")), "--out", "mine.yaml")
    (tmp_path / "mine.yaml").write_text("precious")
    refused = run(*arguments, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "mine.yaml: exists already" in refused.stderr
    assert "--force" in refused.stderr
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    assert run(*arguments, "--force", cwd=tmp_path).returncode == 0
    assert load_recipe(tmp_path / "mine.yaml").recipe.name == "mine"
    assert run(*arguments[:-1], ".", "--force", cwd=tmp_path).returncode == 2


def test_json_has_the_same_in_words_that_stay(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ("--json", "--device", "pixel-6a", "--context", "128")
    ran = run("init", str(tiny("qwen3_sliding")), *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    assert set(said) == WORDS_OF_A_REPORT
    assert set(said["student"]) == OF_A_STUDENT
    assert {frozenset(row) for row in said["rows"]} == {frozenset(OF_A_ROW)}
    assert {frozenset(device) for device in said["devices"]} == {frozenset(OF_A_DEVICE)}
    assert {frozenset(fit) for row in said["rows"] for fit in row["on"].values()} == {
        frozenset(ON_A_DEVICE)
    }
    assert said["schema_version"] == 1
    assert said["figures"] == "arithmetic, nothing was measured"
    assert said["context_tokens"] == 128
    assert [device["name"] for device in said["devices"]] == ["pixel-6a"]
    assert [row["format"] for row in said["rows"]] == ["onnx"] * 4  # the phone runs no Core ML
    assert set(said["refused_formats"]) == {"gguf"}
    assert said["recipe"] == f"recipes/{tiny('qwen3_sliding').name}.yaml"
    assert load_recipe(tmp_path / said["recipe"]).recipe.context_tokens == 128


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nowhere",), 2, "nowhere: there is no such student"),
        (("s3://bucket/name",), 2, "is of no known kind"),
        (("STUDENT", "--device", "iphone-15pro"), 2, "did you mean 'iphone-15-pro'?"),
        (("STUDENT", "--context", "512"), 2, "this model has room for 8 to 256 tokens"),
        (("STUDENT", "--context", "0"), 2, "this model has room for 8 to 256 tokens"),
        (("STUDENT", "--suite", "none.jsonl"), 2, "none.jsonl"),
        (("STUDENT", "--calibration", "none.jsonl"), 2, "none.jsonl: there is no such file"),
        (("hf://only-a-name",), 2, "is not hf://org/name@REVISION"),
    ],
)
def test_what_cannot_be_is_one_message_and_no_recipe(
    tiny: Tiny, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = (str(tiny("llama")) if a == "STUDENT" else a for a in arguments)
    ran = run("init", *given, cwd=tmp_path)
    assert ran.returncode == code
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_family_that_nobody_knows_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny("llama"), tmp_path / "student"))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    ran = run("init", "student", cwd=tmp_path)
    assert ran.returncode == 2
    assert "model_type 'mamba' is not a family that edgedistill knows" in ran.stderr
    assert "known families: llama" in ran.stderr


def test_a_quantized_student_is_described_and_refused(tiny: Tiny, tmp_path: Path) -> None:
    from edgedistill.stages.quantize_rtn import QuantizeRtn

    (tmp_path / "quantized").mkdir()
    QuantizeRtn(bits=8).run(tiny("llama"), tmp_path / "quantized")
    ran = run("init", "quantized", cwd=tmp_path)
    assert ran.returncode == 2
    assert "int8 group 32 (fixed zero)" in ran.stdout
    assert ", quantized" in ran.stdout
    assert "quantized already" in ran.stderr
    assert "edgedistill dequantize" in ran.stderr
    assert not (tmp_path / "recipes").exists()


def test_a_gguf_is_described_from_its_header(tiny: Tiny, tmp_path: Path) -> None:
    from edgedistill.exporters.gguf import Gguf
    from edgedistill.stages.quantize_rtn import QuantizeRtn
    from edgedistill.student import Student

    for name in ("quantized", "files"):
        (tmp_path / name).mkdir()
    QuantizeRtn(bits=8).run(tiny("qwen2"), tmp_path / "quantized")
    student = Student(tmp_path / "quantized")
    Gguf().export(student, tmp_path / "files", context_tokens=256)
    ran = run("init", "files/model.gguf", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)["student"]
    assert (said["kind"], said["weights"], said["quantized"]) == ("gguf", "Q8_0", True)
    assert (said["family"], said["parameters"]) == ("qwen2", student.facts.parameters)
    assert said["chat_template"]
    assert said["tokenizer"].startswith("gpt2 ")
    assert "what that lost is lost" in (tmp_path / "recipes/model.yaml").read_text()
    assert load_recipe(tmp_path / "recipes/model.yaml").student == tmp_path / (
        "recipes/../files/model.gguf"
    )


def test_nothing_of_torch_is_needed(tiny: Tiny, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom edgedistill.cli import app\n"
        f"try: app(['init', {str(tiny('llama'))!r}, '--device', 'laptop'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'coremltools', 'onnx', 'llama_cpp'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=True, cwd=tmp_path)
