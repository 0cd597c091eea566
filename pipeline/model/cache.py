"""Where this package keeps what it need not fetch or make twice."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$EVERYMASK_CACHE`, by default `~/.cache/everymask`. It need not exist yet."""
    return Path(os.environ.get("EVERYMASK_CACHE", Path.home() / ".cache" / "everymask"))
