"""Whether C++ can be compiled here."""

import pytest

from pipeline.model import native


def _there() -> bool:
    try:
        native._compiler()
    except OSError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _there(), reason="no C++ compiler on this machine")
