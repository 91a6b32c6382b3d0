"""What caches on disk are kept for: the state of source files."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def digest(*places: str) -> str:
    """A digest of these Python files, and of all under these folders."""
    h = hashlib.sha256()
    for f in sorted({f for place in map(Path, places) for f in (place.rglob("*.py") if place.is_dir() else (place,))}):
        h.update(f.name.encode() + f.read_bytes())
    return h.hexdigest()
