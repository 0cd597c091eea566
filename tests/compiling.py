"""Whether C++ can be compiled here, and what it is compiled for."""

import pytest

from pipeline.model import native


def _there() -> bool:
    try:
        native._compiler()
    except OSError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _there(), reason="no C++ compiler on this machine")
needs_matrix_unit = pytest.mark.skipif(
    not _there() or not native._library().knows_bfloat16(), reason="no matrix unit for bfloat16 (AMX) in this CPU"
)
