"""A peer without learning: the graph-based segmentation of Felzenszwalb and Huttenlocher.

https://doi.org/10.1023/B:VISI.0000022288.19776.77, as scikit-image computes it, at several scales.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline import rle
from pipeline.evaluation.prompting import Answers
from pipeline.rle import Rle
from pipeline.training import bsds

SCALES: Final = (1600, 800, 400, 200, 100, 50)
"""From the coarsest to the finest."""
# Of three scales, these had the best one-click IoU on every eighth photograph of BSDS500's train split,
# and of the scales alone 400; with segments of at least 200 pixels all were better than with 50.
CLICK_SCALES: Final = (100, 400, 800)
CHOSEN_SCALE: Final = 400
_SIGMA: Final = 0.8
_MIN_SIZE: Final = 200

Partitions = dict[int, NDArray[np.int64]]


def partitions(rgb_HW3: NDArray[np.uint8]) -> Partitions:
    """The picture divided at each scale: label maps H x W."""
    from skimage.segmentation import felzenszwalb  # noqa: PLC0415 (comes with an extra)

    return {scale: felzenszwalb(rgb_HW3, scale, _SIGMA, _MIN_SIZE) for scale in SCALES}


def answer_clicks(divided: Partitions, points_N2: NDArray[np.float64]) -> Answers:
    """The segments under each click at three scales; the middle one counts as the one it holds for the best."""
    x, y = points_N2.astype(int).T
    masks_3NHW = np.stack([divided[scale] == divided[scale][y, x][:, None, None] for scale in CLICK_SCALES])
    chosen = np.array([float(scale == CHOSEN_SCALE) for scale in CLICK_SCALES])
    return Answers(masks_3NHW.transpose(1, 0, 2, 3), np.tile(chosen, (len(points_N2), 1)))


def proposals(divided: Partitions) -> list[Rle]:
    """The segments of all scales, each once: coarser scales first, in a scale larger segments first."""
    encoded = (rle.encode(mask) for scale in SCALES for mask in bsds.segments(divided[scale]))
    return list({mask["counts"]: mask for mask in encoded}.values())
