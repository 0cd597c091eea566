"""Everything that turns images into masks."""

from typing import Final

__version__: Final = "0.1.0"
