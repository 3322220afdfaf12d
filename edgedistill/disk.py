"""What the operating system says of a disk, in words that help."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from edgedistill.errors import StageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that lose the errno on the way keep its text.
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


def disk_error(error: OSError, path: Path) -> StageError:
    """The error of a read or write that failed, with the place and what to do."""
    if error.errno in FULL:
        return full_disk(path)
    return StageError(
        f"the operating system refused: {error.strerror or error}",
        where=str(error.filename or path),
        hint="check that the directory exists and may be written to",
    )


def full_disk(path: Path) -> StageError:
    """The disk that ``path`` lies on is full; nothing half-written is kept."""
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    free_mb = shutil.disk_usage(existing).free / 1e6
    return StageError(
        f"the disk is full, or a limit on file sizes is reached ({free_mb:.0f} MB are free)",
        where=str(path),
        hint="free some space, or point --cache and --exports at another disk; "
        "finished steps are kept and the build goes on from there",
    )
