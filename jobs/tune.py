"""Try settings of mask generation on a few images, side by side."""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Final

import numpy as np
from cyclopts import Parameter
from cyclopts.validators import Number
from numpy.typing import NDArray
from tqdm import tqdm

from jobs.command import run_command
from pipeline import sources, storage
from pipeline.amg.selfcheck import checked_model
from pipeline.config import ImagesConfig, ModelConfig
from pipeline.errors import ImageError, NoImages
from pipeline.estimate import MOST_SAMPLED, draw
from pipeline.images import decode_image
from pipeline.model import pick_device
from pipeline.sources import ImageRef
from pipeline.tune import as_markdown, contact_sheet, grid_of, try_settings

_POINTS: Final = (16, 32)
_FLAT: Final = Parameter(name="*")
_log = logging.getLogger("everymask")


def tune(
    *,
    images: str,
    output: str,
    points_per_side: Annotated[tuple[int, ...], Parameter(validator=Number(gte=1))] = _POINTS,
    pred_iou_thresh: tuple[float, ...] = (),
    stability_score_thresh: tuple[float, ...] = (),
    sample: Annotated[int, Parameter(validator=Number(gte=1, lte=MOST_SAMPLED))] = 6,
    model: Annotated[ModelConfig, _FLAT] = ModelConfig(),  # noqa: B008 (frozen)
    reading: Annotated[ImagesConfig, _FLAT] = ImagesConfig(),  # noqa: B008 (frozen)
) -> int:
    """Make the masks of a few images with every combination of settings, to choose by eye and by price.

    Writes contact-sheet.jpg, a row of pictures a setting, and settings.md, a table of masks, coverage, stability,
    seconds and bytes, which is also printed. Runs in this process, without Ray. (jobs.tune_thresholds is another
    thing: it finds the thresholds that fit what people marked, and writes them into a checkpoint.)

    Exit codes: 0 done; 2 settings; 3 an address or weights, or none of the images can be read.

    Args:
        images: As --images of jobs.generate_masks. The same sample is drawn of the same listing.
        output: Folder or prefix that receives the two files.
        points_per_side: Points along a side of the grid; give the flag again for each value to try.
        pred_iou_thresh: As points_per_side; by default the weights' own.
        stability_score_thresh: The same.
        sample: Images to try.
        model: Which model, and how it runs.
        reading: How images are read.
    """
    settings = grid_of(points_per_side, pred_iou_thresh, stability_score_thresh)
    pick_device(model.device)
    drawn = draw(sources.find_images(storage.canonical_uri(images), Counter()))
    read = dict(zip(range(sample), _readable(drawn.sample, reading), strict=False))
    if not read:
        raise NoImages(f"None of {drawn.images} images under {storage.redact(images)} can be read.")
    names = [storage.redact(ref.uri) for ref, _ in read.values()]
    tries = try_settings(checked_model(model), [rgb_HW3 for _, rgb_HW3 in read.values()], settings)
    tried = list(tqdm(tries, total=len(settings), unit="setting", dynamic_ncols=True, disable=None))
    text = as_markdown(tried, names)
    sheet = io.BytesIO()
    contact_sheet(tried).save(sheet, "JPEG", quality=85)
    folder = storage.canonical_uri(output)
    storage.write_atomic(f"{folder}/contact-sheet.jpg", sheet)
    storage.write_atomic(f"{folder}/settings.md", text.encode())
    print(text)
    _log.info("wrote contact-sheet.jpg and settings.md to %s", storage.redact(folder))
    return 0


def _readable(refs: list[ImageRef], reading: ImagesConfig) -> Iterator[tuple[ImageRef, NDArray[np.uint8]]]:
    """Images with their pixels; what cannot be read is told and passed over."""
    for ref in refs:
        try:
            data = sources.fetch(ref, max_bytes=reading.max_bytes)
            yield ref, decode_image(data, max_pixels=reading.max_pixels)
        except ImageError as error:
            _log.warning("passed over: %s: %s", storage.redact(ref.uri), storage.redact(str(error)))


if __name__ == "__main__":
    run_command(tune, "jobs.tune")
