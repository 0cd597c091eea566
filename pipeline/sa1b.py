"""SA-1B's annotations: beside each image `sa_1.jpg` a file `sa_1.json`, in a folder or in the same tar.

The dataset of Kirillov et al. 2023, https://arxiv.org/abs/2304.02643. Its masks come from segment-anything's mask
generator, so they have the fields of ours. Area and box are counted anew from each mask, because others write
such files with other conventions.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Final, NamedTuple

from pycocotools import mask as coco
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from pipeline import rle, storage
from pipeline.errors import ImageError, StorageError
from pipeline.rle import Rle
from pipeline.sources import ImageRef
from pipeline.sources.containers import DAMAGE, tar_members
from pipeline.sources.refs import suffix_of
from pipeline.storage import FileInfo
from schemas.masks import Status

ACCOUNT: Final = "export.json"
"""What `jobs.export_masks` writes beside the files of annotations, and is none."""
_TARS_KEPT: Final = 2
_MOST: Final = 2**31 - 1  # of a column, and of an image's pixels in pycocotools


_Side = Annotated[int, Field(gt=0, le=_MOST)]
_Pixels = Annotated[FiniteFloat, Field(ge=-_MOST, le=_MOST)]


class _Segmentation(BaseModel):
    size: tuple[_Side, _Side]
    counts: str


class _Annotation(BaseModel):
    segmentation: _Segmentation
    predicted_iou: FiniteFloat
    stability_score: float
    point_coords: list[tuple[FiniteFloat, FiniteFloat]]
    crop_box: tuple[_Pixels, _Pixels, _Pixels, _Pixels]


class _Image(BaseModel):
    height: _Side
    width: _Side


class _File(BaseModel):
    image: _Image
    annotations: list[_Annotation]


class Annotations(NamedTuple):
    """What a file of annotations says of its image."""

    height: int
    width: int
    masks: list[dict[str, Any]]
    """As `schemas.masks.MASK`."""


def parse(data: bytes) -> Annotations:
    """The masks in a file of annotations.

    Raises:
        ImageError: `TRUNCATED`: it is no JSON, lacks a field, or a mask is not of its image's size.
    """
    try:
        file = _File.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(f"{first['msg']}{f' at {place}' if place else ''}") from error
    size = (file.image.height, file.image.width)
    if size[0] * size[1] > _MOST:
        raise _damaged(f"an image of {size[0]} x {size[1]} pixels")
    return Annotations(*size, [_record(i, annotation, size) for i, annotation in enumerate(file.annotations)])


def _record(number: int, annotation: _Annotation, size: tuple[int, int]) -> dict[str, Any]:
    segmentation: Rle = {"size": list(annotation.segmentation.size), "counts": annotation.segmentation.counts}
    if annotation.segmentation.size != size:
        raise _damaged(f"annotation {number} has an RLE of {segmentation['size']}, its image has {list(size)}")
    if not rle.is_whole(segmentation):
        raise _damaged(f"annotation {number} has an RLE whose runs do not fill its image")
    x, y, width, height = coco.toBbox(segmentation).astype(int).tolist()
    return {
        "segmentation": segmentation,
        "area": rle.area(segmentation),
        "bbox": [x, y, max(width - 1, 0), max(height - 1, 0)],
        "predicted_iou": annotation.predicted_iou,
        "point_coords": [list(point) for point in annotation.point_coords],
        "stability_score": annotation.stability_score,
        "crop_box": [round(value) for value in annotation.crop_box],
    }


def fetch_annotations(ref: ImageRef) -> bytes:
    """The bytes of the file that belongs to an image.

    Raises:
        ImageError: `FETCH_FAILED`: it is not there, or cannot be read.
    """
    try:
        if ref.container is None:
            return storage.read_bytes(f"{ref.uri.rpartition('.')[0]}.json")
        member = ref.uri.removeprefix("tar://").removesuffix(f"::{ref.container}")
        reader = _of_tar(ref.container).get(f"{member.rpartition('.')[0]}.json")
        if reader is None:
            raise ImageError(Status.FETCH_FAILED, f"{storage.redact(ref.uri)} has no JSON beside it in its tar")
        return reader()
    except StorageError as error:
        raise ImageError(Status.FETCH_FAILED, str(error)) from error


def find_annotations(uri: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The address of each file of annotations below another, in a folder or in tars, and what reads it.

    Raises:
        StorageError: the address cannot be listed, or a tar is damaged.
    """
    for file in storage.list_files(uri):
        if suffix_of(file.uri) == ".json":
            if file.uri.rpartition("/")[2] != ACCOUNT:
                yield file.uri, partial(storage.read_bytes, file.uri)
        elif suffix_of(file.uri) == ".tar":
            for member, reader in _of_tar(file.uri).items():
                if member.rpartition("/")[2] != ACCOUNT:
                    yield f"tar://{member}::{file.uri}", reader


@lru_cache(_TARS_KEPT)
def _of_tar(uri: str) -> Mapping[str, Callable[[], bytes]]:
    """What reads each JSON in a tar, by its member's name."""
    file = storage.stat(uri) or FileInfo(uri, None, None)
    try:
        return {
            member.name: partial(storage.read_bytes, uri, member.offset_data, member.size, etag=file.etag)
            for member in tar_members(file)
            if member.isfile() and suffix_of(member.name) == ".json"
        }
    except DAMAGE as error:
        raise StorageError(f"the tar {storage.redact(uri)} is damaged: {error}") from error


def _damaged(what: str) -> ImageError:
    return ImageError(Status.TRUNCATED, f"its JSON is damaged: {what}")
