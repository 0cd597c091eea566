"""Synthetic scenes side by side, each above its instance masks: docs/scenes.jpg.

python benchmarks/contact_sheet.py docs/scenes.jpg
"""

import sys
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import rle
from pipeline.overlay import overlay
from pipeline.training.scenes import scene

_COLUMNS: Final = 8
_ROWS: Final = 3
_SIZE: Final = 160


def main() -> None:
    """Write the sheet to the file that the command names."""
    strips = []
    for row in range(_ROWS):
        made = [scene(row * _COLUMNS + column, _SIZE) for column in range(_COLUMNS)]
        drawn = [
            overlay(
                one.rgb_HW3,
                [{"segmentation": rle.encode(mask), "area": int(mask.sum())} for mask in one.masks_NHW],
            )
            for one in made
        ]
        strips += [np.hstack([one.rgb_HW3 for one in made]), np.hstack(drawn)]
    Image.fromarray(np.vstack(strips)).save(sys.argv[1], quality=85)


if __name__ == "__main__":
    main()
