from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from edgedistill.errors import UsageError
from edgedistill.exporter import Exporter
from edgedistill.plugins import Kind, load_plugin, plugin_module, plugin_names
from edgedistill.session import Runtime
from edgedistill.stage import Stage

BASES = {"stages": Stage, "exporters": Exporter, "runtimes": Runtime}
ALL = [(kind, name) for kind in get_args(Kind) for name in plugin_names(kind)]


def test_the_file_name_is_the_name() -> None:
    assert {"merge_lora", "quantize_rtn"} <= set(plugin_names("stages"))
    assert {"gguf", "onnx", "coreml"} <= set(plugin_names("exporters"))
    assert {"llama_cpp", "onnx_runtime", "core_ml"} <= set(plugin_names("runtimes"))


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_listed_plugin_holds_one_class_of_its_kind(kind: Kind, name: str) -> None:
    assert issubclass(load_plugin(kind, name), BASES[kind])


def test_every_format_names_a_runtime_that_exists() -> None:
    runtimes = {load_plugin("exporters", name).runtime for name in plugin_names("exporters")}
    assert runtimes <= set(plugin_names("runtimes"))


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("stages", "quantize_rtm", "did you mean 'quantize_rtn'?"),
        ("exporters", "ggfu", "did you mean 'gguf'?"),
        ("exporters", "tflite", "known: coreml, gguf, onnx"),
        ("exporters", "../errors", None),
        ("exporters", "__init__", None),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(kind: Kind, name: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        plugin_module(kind, name)
    assert repr(name) in caught.value.message
    if hint:
        assert caught.value.hint == hint


def test_listing_and_loading_import_no_heavy_library() -> None:
    program = (
        "import sys\n"
        "from edgedistill.plugins import load_plugin, plugin_names\n"
        "for kind in ('stages', 'exporters', 'runtimes'):\n"
        "    for name in plugin_names(kind): load_plugin(kind, name)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'coremltools', 'llama_cpp'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
