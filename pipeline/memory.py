"""Memory that runs out, on a device or on the host."""

import re
from typing import Final

# PyTorch's class, by its name because this is imported where torch is not. Only CUDA's caching allocator raises
# it; the CPU's, MPS and cuBLAS raise RuntimeErrors.
_CLASS: Final = "OutOfMemoryError"
_SAID: Final = re.compile(r"out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that less at once, or another image, may fit."""
    if isinstance(error, MemoryError) or type(error).__name__ == _CLASS:
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
