from __future__ import annotations

import resource
from pathlib import Path

import pytest

from edgedistill.chat import Chat
from edgedistill.content import sha256_file
from edgedistill.errors import StageError
from edgedistill.manifest import Manifest, ManifestFile
from edgedistill.publish import exports_lock, publish_artifact, replace_files


def artifact(files: Path, **texts: str) -> Manifest:
    found = []
    for name, text in texts.items():
        path = files / "inner" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        size_bytes = path.stat().st_size
        found.append(
            ManifestFile(path=f"inner/{name}", size_bytes=size_bytes, sha256=sha256_file(path))
        )
    return Manifest(
        recipe="r",
        rung="int4",
        format="gguf",
        runtime="llama_cpp",
        edgedistill="0",
        license=None,
        student="s",
        context_tokens=64,
        chat=Chat(),
        parameters=10,
        size_bytes=10,
        weight_bytes=10,
        bits_per_weight=8.0,
        shippable=True,
        why_not=None,
        files=found,
        lineage=[],
        libraries={"llama_cpp": "1.2"},
        verification=None,
        quality=None,
        budget=[],
        bench=None,
    )


def names(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_an_artifact_is_copied_with_manifest_and_readme(tmp_path: Path) -> None:
    cached, dst = tmp_path / "cached", tmp_path / "r" / "int4" / "gguf"
    manifest = artifact(cached, a="one", b="two")
    assert publish_artifact(cached, manifest, dst)
    assert names(dst) == ["README.md", "inner/a", "inner/b", "manifest.json"]
    assert not (cached / "inner" / "a").samefile(dst / "inner" / "a")
    assert Manifest.model_validate_json((dst / "manifest.json").read_bytes()) == manifest
    readme = (dst / "README.md").read_text()
    assert "model.gguf" in readme
    assert "n_ctx=64" in readme
    assert sorted(p.name for p in dst.parent.iterdir()) == ["gguf"]


def test_an_unchanged_artifact_is_left_alone_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    cached, dst = tmp_path / "cached", tmp_path / "gguf"
    manifest = artifact(cached, a="one")
    publish_artifact(cached, manifest, dst)
    inode = (dst / "inner" / "a").stat().st_ino
    assert not publish_artifact(cached, manifest, dst)
    assert (dst / "inner" / "a").stat().st_ino == inode
    for damage in ("truncated", "extra", "missing"):
        if damage == "truncated":
            (dst / "inner" / "a").write_text("o")
        elif damage == "extra":
            (dst / "old.bin").write_text("left over")
        else:
            (dst / "README.md").unlink()
        assert publish_artifact(cached, manifest, dst), damage
        assert names(dst) == ["README.md", "inner/a", "manifest.json"]
        assert (dst / "inner" / "a").read_text() == "one"


def test_a_new_artifact_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    dst = tmp_path / "gguf"
    publish_artifact(tmp_path / "1", artifact(tmp_path / "1", a="one", b="two"), dst)
    publish_artifact(tmp_path / "2", artifact(tmp_path / "2", c="three"), dst)
    assert names(dst) == ["README.md", "inner/c", "manifest.json"]


def test_a_full_disk_leaves_the_old_artifact_as_it_was(tmp_path: Path) -> None:
    dst = tmp_path / "gguf"
    publish_artifact(tmp_path / "1", artifact(tmp_path / "1", a="one"), dst)
    large = artifact(tmp_path / "2", a="x" * 2_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(StageError, match="the disk is full"):
            publish_artifact(tmp_path / "2", large, dst)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (dst / "inner" / "a").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "gguf"]


def test_report_files_are_replaced_one_by_one(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for directory, text in ((new, "new"), (old, "old")):
        (directory / "pictures").mkdir(parents=True)
        (directory / "pictures" / "a.svg").write_text(text)
    (old / "artifact").write_text("stays")
    replace_files(new, old)
    assert names(old) == ["artifact", "pictures/a.svg"]
    assert (old / "pictures" / "a.svg").read_text() == "new"


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match="refused"), exports_lock(tmp_path / "file" / "r"):
        pass
