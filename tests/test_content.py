from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edgedistill.content import ContentHashes, map_paths, sha256_file
from edgedistill.errors import InputError
from edgedistill.recipe import Recipe


def test_a_file_is_hashed_as_sha256sum_does(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        sha256_file(tmp_path / "none")


def test_a_directory_is_its_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "x").write_text("1")
        (tmp_path / name / "y").write_text("2")
    (tmp_path / "b" / ".hidden").write_text("3")
    assert ContentHashes().of(tmp_path / "a") == ContentHashes().of(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert ContentHashes().of(tmp_path / "a") != ContentHashes().of(tmp_path / "b")


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path, hashes = tmp_path / "file", ContentHashes()
    path.write_text("1")
    first = hashes.of(path)
    path.unlink()
    assert hashes.of(path) == first


def test_paths_are_changed_wherever_they_hide() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "n",
            "student": "s",
            "context_tokens": 8,
            "rungs": {"a": []},
            "stages": [{"merge_lora": {"adapter": "adapter"}}],
            "export": ["gguf"],
            "suite": ["one", "two"],
            "texts": {"t": "three"},
        }
    )
    changed = map_paths(recipe, lambda path: Path("/base") / path)
    assert changed.suite == (Path("/base/one"), Path("/base/two"))
    assert changed.texts == {"t": Path("/base/three")}
    assert changed.stages[0].config.adapter == Path("/base/adapter")
    assert changed.student == "s"
