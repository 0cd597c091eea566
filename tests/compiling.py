"""Whether C++ can be compiled here, and what it is compiled for."""

import os

import pytest

from pipeline.model import native


def _there() -> bool:
    try:
        native._compiler()
    except OSError:
        return False
    return True


def _has_matrix_unit() -> bool:
    """As the compiler says, so that kernels that miss it fail their tests."""
    macros = native._run([*native._compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    return "__AMX_BF16__" in macros


needs_compiler = pytest.mark.skipif(not _there(), reason="no C++ compiler on this machine")
needs_matrix_unit = pytest.mark.skipif(
    not _there() or not _has_matrix_unit(), reason="no matrix unit for bfloat16 (AMX) that the compiler knows of"
)
