"""Is an artifact's directory what its manifest says, file by file?"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from edgedistill.content import sha256_file
from edgedistill.errors import EdgedistillError, InputError
from edgedistill.manifest import MANIFEST_FILE, Manifest, ManifestFile
from edgedistill.plugins import load_plugin
from edgedistill.progress import track
from edgedistill.readme import README_FILE
from edgedistill.results import Check

# The two that a publish adds; the manifest cannot name its own hash.
NOT_LISTED = frozenset({MANIFEST_FILE, README_FILE})
WHEN_BUILT = "manifest: verified when built"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        InputError: there is none, or it is damaged or of another version.
    """
    path = directory / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=str(path),
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"is not a manifest: {place + ': ' if place else ''}{first['msg']}"
            + (f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""),
            where=str(path),
            hint="the file is damaged, or of another version of edgedistill",
        ) from error


def has_manifest(path: Path) -> bool:
    """Whether a directory, or the one that a file lies in, has a manifest of any kind."""
    return ((path if path.is_dir() else path.parent) / MANIFEST_FILE).exists()


def check_files(directory: Path, manifest: Manifest) -> list[Check]:
    """Presence, size and sha256 of every file, no strangers, and figures that agree.

    Args:
        directory: of the artifact; nothing outside is read, whatever the manifest names.
        manifest: that was found in it.
    """
    wrong: dict[str, list[str]] = {"listed": [], "size": [], "sha256": []}
    for file in track(manifest.files, label="hashing"):
        kind, problem = _problem(directory, file)
        if problem:
            wrong[kind].append(problem)
    if not manifest.files:
        wrong["listed"].append("the manifest lists no file")
    count = f"{len(manifest.files)} files"
    checks = [
        _check("files: all there", wrong["listed"], count),
        _check("files: size", wrong["size"], f"{manifest.size_bytes:,} bytes"),
        _check("files: sha256", wrong["sha256"], count),
        _check("files: no strangers", _strangers(directory, manifest), "none"),
        _check("manifest: agrees with itself", _contradictions(manifest), "its figures agree"),
    ]
    if manifest.verification is not None:
        failed = [c.name for c in manifest.verification.checks if not c.passed]
        checks.append(_check(WHEN_BUILT, failed, "every check passed"))
    return checks


def _problem(directory: Path, file: ManifestFile) -> tuple[str, str | None]:
    """(which check fails, why); the path is held before the file is touched."""
    shown, parts = repr(file.path), PurePosixPath(file.path).parts
    if not parts or ".." in parts or file.path.startswith("/") or "\0" in file.path:
        return "listed", f"{shown} is no path inside the artifact"
    path = directory / file.path
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        size_bytes = path.stat().st_size if inside and path.is_file() else None
    except OSError as error:
        return "listed", f"{shown} cannot be read: {error.strerror}"
    if not inside:
        return "listed", f"{shown} leads outside the artifact"
    if size_bytes is None:
        return "listed", f"{shown} is missing"
    if size_bytes != file.size_bytes:
        return "size", f"{shown} has {size_bytes:,} bytes, not {file.size_bytes:,}"
    try:
        found = sha256_file(path)
    except InputError as error:
        return "sha256", f"{shown} {error.message}"
    if found != file.sha256:
        return "sha256", f"{shown} is {found[:16]}…, not {file.sha256[:16]}…"
    return "sha256", None


def _strangers(directory: Path, manifest: Manifest) -> list[str]:
    known = {PurePosixPath(f.path).as_posix() for f in manifest.files} | NOT_LISTED
    found = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())
    return [f"{name!r} is not in the manifest" for name in sorted(set(found) - known)]


def _contradictions(manifest: Manifest) -> list[str]:
    found = []
    total = sum(file.size_bytes for file in manifest.files)
    if total != manifest.size_bytes:
        found.append(f"size_bytes is {manifest.size_bytes:,}, its files have {total:,}")
    if len({file.path for file in manifest.files}) != len(manifest.files):
        found.append("lists a file twice")
    if manifest.shippable != (manifest.why_not is None):
        found.append("shippable and why_not contradict each other")
    if manifest.shippable and not (manifest.verification and manifest.verification.passed):
        found.append("is marked shippable without a verification that passed")
    try:
        runtime = load_plugin("exporters", manifest.format).runtime
    except EdgedistillError as error:
        found.append(f"format {manifest.format!r}: {error.message}")
    else:
        if runtime != manifest.runtime:
            found.append(f"runtime is {manifest.runtime!r}, {manifest.format} runs in {runtime}")
    if manifest.context_tokens <= 0:
        found.append(f"context_tokens is {manifest.context_tokens}")
    return found


def _check(name: str, wrong: list[str], fine: str) -> Check:
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Check(
        name=name,
        passed=not wrong,
        value=float(len(wrong)),
        limit=0.0,
        detail=wrong[0] + more if wrong else fine,
    )
