"""Memory that runs out, on a device or on the host."""

import re
from typing import Final

# RuntimeErrors, all of them: CUDA's caching allocator, the CPU's, MPS and cuBLAS.
_SAID: Final = re.compile(r"out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that less at once, or another image, may fit."""
    said = isinstance(error, RuntimeError) and _SAID.search(str(error))
    return isinstance(error, MemoryError) or bool(said)
