"""Where the cache of steps is: a directory, or a URL with a directory of this machine before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgedistill.cache import Cache

# A directory, or the URL of a cache that machines share.
CachePlace = Path | str


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/edgedistill``, which is ``~/.cache/edgedistill`` for most."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "edgedistill"


def find_place(option: str | None) -> CachePlace:
    """What ``--cache`` means: nothing, a directory or a URL (anything with ``://`` in it)."""
    if option is not None and "://" in option:
        return option
    return (Path(option) if option is not None else default_cache()).absolute()


def open_cache(place: CachePlace) -> Cache:
    """The cache at a place; a URL's has this machine's default directory in front.

    Raises:
        UsageError: no file system answers to such a URL.
        UnavailableError: the package that does is not installed.
    """
    from edgedistill.cache import Cache

    if isinstance(place, Path):
        return Cache(place)
    from edgedistill.shared_cache import SharedCache

    return SharedCache(default_cache().absolute(), place)
