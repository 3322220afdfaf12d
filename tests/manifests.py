"""A manifest for an artifact that no build published."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from edgedistill.chat import Chat
from edgedistill.manifest import MANIFEST_FILE, Manifest, ManifestFile
from edgedistill.plugins import load_plugin
from edgedistill.results import GoldenVector

CONTEXT = 256


def write_manifest(artifact: Path, format_name: str, golden: Sequence[GoldenVector]) -> None:
    """The manifest of what lies there now."""
    (artifact / MANIFEST_FILE).unlink(missing_ok=True)
    files = [
        ManifestFile(
            path=path.relative_to(artifact).as_posix(),
            size_bytes=path.stat().st_size,
            sha256=sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(artifact.rglob("*"))
        if path.is_file()
    ]
    manifest = Manifest(
        recipe="planted",
        rung="float",
        format=format_name,
        runtime=load_plugin("exporters", format_name).runtime,
        edgedistill="0",
        license=None,
        student="peaked",
        context_tokens=CONTEXT,
        chat=Chat(),
        parameters=1,
        size_bytes=sum(file.size_bytes for file in files),
        weight_bytes=1,
        bits_per_weight=8.0,
        shippable=False,
        why_not="it is a test",
        files=files,
        lineage=[],
        libraries={},
        verification=None,
        quality=None,
        budget=[],
        bench=None,
        golden=tuple(golden),
    )
    (artifact / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2))
