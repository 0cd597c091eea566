"""The pictures that models are measured on."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ImagesConfig
from pipeline.errors import ImageError, NoImages, TrainingDataError
from pipeline.images import decode_image
from pipeline.sources import ImageRef, fetch, find_images
from pipeline.storage import redact
from pipeline.training import bsds, scenes

# Smaller segments are strokes and specks more often than things.
SMALLEST_SEGMENT = 0.01
"""Segments of less than this share of the picture are not asked for."""


@dataclass(frozen=True)
class Picture:
    """A picture and the segments that a model should find in it."""

    name: str
    rgb_HW3: NDArray[np.uint8]
    people: tuple[NDArray[np.bool_], ...] = ()
    """What each person marked: bool N x H x W. Exact masks count as one person's."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures that are read when they are asked for, always in the same order."""

    name: str
    has_masks: bool
    readers: Sequence[Callable[[], Picture]]

    def __len__(self) -> int:
        return len(self.readers)

    def __iter__(self) -> Iterator[Picture]:
        return (read() for read in self.readers)


def bsds_pictures(folder: Path, split: bsds.Split, limit: int | None = None) -> PictureSet:
    """BSDS500: its first `limit` photographs by name, each marked by several people.

    Raises:
        TrainingDataError: there are none, or one without its segmentations.
    """
    paths = bsds.photographs(folder, split)[:limit]
    for path in paths:
        if not (folder / "groundTruth" / split / f"{path.stem}.mat").is_file():
            raise TrainingDataError(f"{folder} has no segmentations groundTruth/{split}/{path.stem}.mat.")
    return PictureSet(f"BSDS500 {split}", True, [partial(_of_bsds, path) for path in paths])


def scene_pictures(count: int, size: int = 512) -> PictureSet:
    """The first `count` synthetic scenes that no model was trained on, with their exact masks."""
    readers = [partial(_of_scene, index, size) for index in range(count)]
    return PictureSet("held-out synthetic scenes", True, readers)


def folder_pictures(address: str, limit: int | None = None) -> PictureSet:
    """The first `limit` pictures by address of what `pipeline.sources.find_images` finds; nobody marked them.

    Raises:
        StorageError: the address cannot be listed.
        SettingsError: it is of a kind that cannot be read.
        NoImages: there is no picture.
    """
    refs = sorted(find_images(address, Counter()), key=lambda ref: ref.uri)[:limit]
    if not refs:
        raise NoImages(f"There is no picture under {redact(address)}.")
    return PictureSet(redact(address), False, [partial(_of_ref, ref) for ref in refs])


def _of_bsds(path: Path) -> Picture:
    photograph = bsds.read_photograph(path)
    people = tuple(bsds.segments(label_map, SMALLEST_SEGMENT) for label_map in photograph.label_maps_HW)
    return Picture(photograph.name, photograph.rgb_HW3, people)


def _of_scene(index: int, size: int) -> Picture:
    scene = scenes.scene(index, size, scenes.HELD_OUT_SEED)
    large = scene.masks_NHW.mean(axis=(1, 2)) >= SMALLEST_SEGMENT
    return Picture(f"scene {index}", scene.rgb_HW3, (scene.masks_NHW[large],))


def _of_ref(ref: ImageRef) -> Picture:
    limits = ImagesConfig()
    try:
        data = fetch(ref, max_bytes=limits.max_bytes)
        return Picture(ref.uri, decode_image(data, max_pixels=limits.max_pixels))
    except ImageError as error:
        raise TrainingDataError(f"{redact(ref.uri)} cannot be read: {error}.") from error
