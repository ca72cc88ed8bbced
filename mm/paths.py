"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for rasterised data, vectors and search indexes: ``MM_CACHE``, or ``mm`` in the user's cache folder."""
    chosen = os.environ.get("MM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm"
