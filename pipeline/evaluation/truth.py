"""What is true of images: from COCO's JSON, SA-1B, BSDS500 or another masks dataset."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import scipy.io
from pycocotools import mask as coco

from pipeline import rle, sa1b, storage
from pipeline.errors import ImageError, TrainingDataError
from pipeline.evaluation.pictures import SMALLEST_SEGMENT
from pipeline.reading.stored import ShardReader, StoredMasks, stored_masks
from pipeline.rle import Rle
from pipeline.sa1b import stem_of
from pipeline.sources.refs import suffix_of
from pipeline.training import bsds
from schemas.masks import PROCESSED

_WHAT_IS_TRUTH: Final = "COCO's JSON, a folder or tar of SA-1B, a folder of BSDS500's .mat, or a masks dataset"


class Segment(NamedTuple):
    """A mask that should be found."""

    rle: Rle
    area: float
    """In pixels, as it was annotated."""


@dataclass(frozen=True)
class Marked:
    """The segments of one image."""

    size: tuple[int, int]
    """Height and width in pixels."""
    people: tuple[tuple[Segment, ...], ...]
    """What each person marked, one after another; what is no person's counts as one's."""


@dataclass(frozen=True)
class Truth:
    """Images whose segments are known. They are read when they are asked for."""

    kind: str
    images: Mapping[str, Callable[[], Marked]]
    """By the image's URI, or by its file's name without suffix."""
    by_uri: bool

    def key_of(self, uri: str) -> str:
        """Under what key the image of a URI would stand."""
        return uri if self.by_uri else stem_of(uri)


def open_truth(uri: str, measured: StoredMasks, uris: Iterable[str]) -> Truth:
    """Find out what kind of truth an address holds, and list its images.

    Args:
        uri: COCO's JSON, a folder or tar of SA-1B, a folder of BSDS500's `.mat` files, or a masks dataset.
        measured: What is measured against it, which may not be the same dataset.
        uris: Of the images that are measured. Those of a masks dataset are matched by URI, if one is in both, all
            others by their files' names.

    Raises:
        StorageError: the address cannot be read.
        TrainingDataError: there is no truth, or it is damaged.
        OutputConflict: `run.json` of a dataset is damaged.
    """
    uri = storage.canonical_uri(uri)
    if storage.exists(f"{uri}/run.json"):
        if uri == measured.output:
            raise TrainingDataError(f"{storage.redact(uri)} is what is to be measured; give another as --truth.")
        return _of_dataset(stored_masks(uri), set(uris))
    files = list(storage.list_files(uri))
    if len(files) == 1 and files[0].uri == uri and suffix_of(uri) == ".json":
        return Truth("COCO JSON", _of_coco(uri), by_uri=False)
    mats = {stem_of(file.uri): partial(_of_mat, file.uri) for file in files if suffix_of(file.uri) == ".mat"}
    if mats:
        return Truth("BSDS500", mats, by_uri=False)
    annotations = sa1b.find_annotations(uri)
    if not annotations:
        raise TrainingDataError(f"{storage.redact(uri)} holds no truth: it must be {_WHAT_IS_TRUTH}.")
    return Truth(
        "SA-1B", {name: partial(_of_sa1b, name, read) for name, read in annotations.items()}, by_uri=False
    )


# COCO


def _of_coco(uri: str) -> dict[str, Callable[[], Marked]]:
    try:
        document = json.loads(storage.read_bytes(uri))
        images: dict[int, dict[str, Any]] = {image["id"]: image for image in document["images"]}
        names = {number: stem_of(image.get("file_name") or image["coco_url"]) for number, image in images.items()}
        annotations: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in document["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        sizes = {number: (int(image["height"]), int(image["width"])) for number, image in images.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingDataError(f"{storage.redact(uri)} is not COCO's JSON of instances: {error!r}") from error
    if len(set(names.values())) < len(names):
        raise TrainingDataError(f"{storage.redact(uri)} names two images alike; they are told apart by name.")
    return {
        name: partial(_of_coco_image, f"{storage.redact(uri)}, {name}", sizes[number], annotations[number])
        for number, name in names.items()
    }


def _of_coco_image(name: str, size: tuple[int, int], annotations: list[dict[str, Any]]) -> Marked:
    """Crowds are left out: COCO's protocol does not ask for them."""
    try:
        segments = [_of_annotation(one, size) for one in annotations if not one.get("iscrowd")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingDataError(f"{name}: an annotation is damaged: {error!r}") from error
    return Marked(size, (tuple(segments),))


def _of_annotation(annotation: dict[str, Any], size: tuple[int, int]) -> Segment:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):  # polygons
        encoded = coco.merge(coco.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        encoded = coco.frPyObjects(segmentation, *size)
    else:
        encoded = segmentation
    found: Rle = {"size": list(encoded["size"]), "counts": _as_text(encoded["counts"])}
    if tuple(found["size"]) != size:
        raise ValueError(f"RLE of {found['size']}, its image has {list(size)}")
    if not rle.is_whole(found):
        raise ValueError("RLE whose runs do not fill its image")
    area = annotation.get("area")
    return Segment(found, float(rle.area(found) if area is None else area))


def _as_text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


# SA-1B, BSDS500, another dataset


def _of_sa1b(name: str, read: Callable[[], bytes]) -> Marked:
    try:
        annotated = sa1b.parse(read())
    except ImageError as error:
        raise TrainingDataError(f"{name}: {error}") from error
    return Marked((annotated.height, annotated.width), (_segments(annotated.masks),))


def _segments(masks: list[dict[str, Any]]) -> tuple[Segment, ...]:
    return tuple(Segment(mask["segmentation"], mask["area"]) for mask in masks)


def _of_mat(uri: str) -> Marked:
    try:
        label_maps = bsds.label_maps(io.BytesIO(storage.read_bytes(uri)))
        people = [bsds.segments(label_map_HW, SMALLEST_SEGMENT) for label_map_HW in label_maps]
        encoded = [tuple(_segment(rle.encode(mask_HW)) for mask_HW in masks_NHW) for masks_NHW in people]
        return Marked((label_maps[0].shape[0], label_maps[0].shape[1]), tuple(encoded))
    # NotImplementedError is scipy's for files of MATLAB 7.3, which it does not read.
    except (ValueError, LookupError, TypeError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise TrainingDataError(f"{storage.redact(uri)} is no segmentation of BSDS500: {error!r}") from error


def _segment(encoded: Rle) -> Segment:
    return Segment(encoded, rle.area(encoded))


def _of_dataset(stored: StoredMasks, uris: set[str]) -> Truth:
    reader = ShardReader(stored)
    places = {
        row.ref.uri: (shard, place)
        for shard in stored.shards
        for place, row in enumerate(reader.shard(shard).listed)
    }
    by_uri = not uris.isdisjoint(places)
    images = {
        uri if by_uri else stem_of(uri): partial(_of_row, reader, shard, place)
        for uri, (shard, place) in places.items()
    }
    if len(images) < len(places):
        raise TrainingDataError(
            f"{storage.redact(stored.output)} has no image at an address of the measured dataset, and names two "
            "images alike, so that they cannot be told apart by name."
        )
    return Truth("masks dataset", images, by_uri)


def _of_row(reader: ShardReader, shard: int, place: int) -> Marked:
    [(_, row)] = reader.rows(shard, range(place, place + 1))
    if row["status"] not in PROCESSED:
        return Marked((0, 0), ())
    return Marked((row["height"], row["width"]), (_segments(row["masks"]),))
