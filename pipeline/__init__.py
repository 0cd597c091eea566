"""Everything that turns images into masks."""

from typing import Final

__version__: Final = "0.2.0"
