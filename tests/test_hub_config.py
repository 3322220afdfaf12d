"""Models of the hub, from a server of our own that speaks as much of it as is asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.hub_config import hub_name
from edgedistill.recipe_load import load_recipe
from tests.test_cli import ENVIRONMENT

Tiny = Callable[[str], Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Iterator[str]:
    """The address of a hub: a tiny student, one that is its config alone, one of no files."""
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    bare.mkdir()
    empty.mkdir()
    shutil.copy(tiny("llama") / "config.json", bare)
    models = {"/some-org/tiny-llama": tiny("llama"), "/some-org/bare": bare}
    models["/some-org/empty"] = empty

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            prefix, _, file = self.path.partition("/resolve/")
            path = models.get(prefix, empty) / file.partition("/")[2]
            here = path.is_file()
            body = path.read_bytes() if here else b""
            self.send_response(200 if here else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("Content-Length", str(len(body)))
            if not here:
                kind = "EntryNotFound" if prefix in models else "RepoNotFound"
                self.send_header("X-Error-Code", kind)
            self.end_headers()
            return body

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_init(cwd: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgedistill", "init", source, "--json"]
    own = {"HF_HOME": str(cwd / "hub"), "NO_PROXY": "127.0.0.1", **environment}
    everything = {k: v for k, v in (ENVIRONMENT | own).items() if k != "HF_HUB_OFFLINE" or k in own}
    return subprocess.run(
        command, cwd=cwd, env=everything, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("source", ["some-org/tiny-llama", "hf://some-org/tiny-llama@main"])
def test_a_model_of_the_hub_is_described_and_its_commit_written_down(
    hub: str, tmp_path: Path, source: str
) -> None:
    ran = run_init(tmp_path, source, HF_ENDPOINT=hub)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)["student"]
    assert (said["kind"], said["family"], said["stored_bytes"]) == ("hub", "llama", None)
    assert (said["parameters"], said["chat_template"]) == (143808, True)
    assert said["source"] == f"hf://some-org/tiny-llama@{COMMIT}"
    recipe = load_recipe(tmp_path / "recipes/tiny-llama.yaml").recipe
    assert recipe.student == said["source"]
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_files_that_a_model_lacks_are_said_to_be_missing(hub: str, tmp_path: Path) -> None:
    ran = run_init(tmp_path, "some-org/bare", HF_ENDPOINT=hub)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert (said["student"]["tokenizer"], said["student"]["chat_template"]) == (None, False)
    assert said["warnings"] == ["there is no tokenizer_config.json: is there a tokenizer?"]
    ran = run_init(tmp_path, "some-org/empty", HF_ENDPOINT=hub)
    assert ran.returncode == 2
    assert "hf://some-org/empty: has no config.json" in ran.stderr


@pytest.mark.parametrize("source", ["some-org/other", "hf://some-org/other@main"])
def test_a_model_that_the_hub_does_not_have_is_unavailable(
    hub: str, tmp_path: Path, source: str
) -> None:
    ran = run_init(tmp_path, source, HF_ENDPOINT=hub)
    assert ran.returncode == 7
    assert ran.stdout == ""
    assert "the hub cannot give it" in ran.stderr
    assert "hint: check name, revision and network" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_a_network_it_is_unavailable(tmp_path: Path) -> None:
    ran = run_init(tmp_path, "some-org/tiny-llama", HF_HUB_OFFLINE="1")
    assert ran.returncode == 7
    assert "hint: check name, revision and network" in ran.stderr


def test_a_directory_of_that_name_is_a_directory(tmp_path: Path) -> None:
    assert hub_name("org/name", tmp_path) == ("org/name", None)
    assert hub_name("org/name@v1", tmp_path) == ("org/name", "v1")
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub_name("org/name", tmp_path) is None
    assert hub_name("hf://org/name", tmp_path) == ("org/name", None)
    for path in ("name", "a/b/c", "./org/other", "org/other.gguf", "/org/other", "pkg://a/b.gguf"):
        assert hub_name(path, tmp_path) is None
    with pytest.raises(UsageError, match="is not hf://org/name@REVISION"):
        hub_name("hf://name", tmp_path)
