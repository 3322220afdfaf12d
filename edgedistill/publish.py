"""Copy artifacts out of the cache to where mobile teams fetch them, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgedistill.disk import disk_error
from edgedistill.manifest import MANIFEST_FILE, Manifest
from edgedistill.readme import README_FILE, readme_of

# Beside what they replace, on the same file system; hidden, and swept by the next build.
NEW, OLD = ".new-", ".old-"


@contextmanager
def exports_lock(directory: Path) -> Iterator[None]:
    """Hold a recipe's exports: two builds at once publish one after the other."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise disk_error(error, directory) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def publish_artifact(files: Path, manifest: Manifest, dst: Path) -> bool:
    """Put an artifact, its manifest and its README into ``dst``.

    Args:
        files: the artifact in the cache; it is copied, so that nobody can write into the cache.
        manifest: names the files.
        dst: replaced as a whole; left alone when it holds exactly this already.

    Returns:
        Whether anything was written.

    Raises:
        StageError: the disk is full or not writable; ``dst`` is then as it was.
    """
    text = manifest.model_dump_json(indent=2) + "\n"
    readme = readme_of(manifest)
    if _holds(dst, manifest, text, readme):
        return False
    try:
        with replaced(dst) as new:
            for file in manifest.files:
                (new / file.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files / file.path, new / file.path)
            (new / README_FILE).write_text(readme, encoding="utf-8")
            (new / MANIFEST_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, dst) from error
    return True


def _holds(dst: Path, manifest: Manifest, text: str, readme: str) -> bool:
    wanted = {f.path: f.size_bytes for f in manifest.files}
    wanted |= {MANIFEST_FILE: len(text.encode()), README_FILE: len(readme.encode())}
    found = {p.relative_to(dst).as_posix(): p.stat().st_size for p in dst.rglob("*") if p.is_file()}
    if found != wanted:
        return False
    return (dst / MANIFEST_FILE).read_text(encoding="utf-8") == text


@contextmanager
def replaced(dst: Path) -> Iterator[Path]:
    """A new directory that takes the place of ``dst`` when the block ends well."""
    new, old = dst.with_name(f"{NEW}{dst.name}"), dst.with_name(f"{OLD}{dst.name}")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if dst.exists():
            dst.rename(old)
        try:
            new.rename(dst)
        except OSError:
            if old.exists():
                old.rename(dst)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def replace_files(src: Path, dst: Path) -> None:
    """Move every file of ``src`` to its place in ``dst``, each whole."""
    for file in sorted(p for p in src.rglob("*") if p.is_file()):
        target = dst / file.relative_to(src)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
