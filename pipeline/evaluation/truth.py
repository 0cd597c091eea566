"""What is true of images: from COCO's JSON, SA-1B, BSDS500 or another masks dataset."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from pycocotools import mask as coco

from pipeline import rle, sa1b, storage
from pipeline.errors import ImageError, TrainingDataError
from pipeline.evaluation.matching import Named, matched
from pipeline.evaluation.pictures import SMALLEST_SEGMENT
from pipeline.export.dataset import file_name
from pipeline.reading.stored import ShardReader, StoredMasks, stored_masks
from pipeline.rle import Rle
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
    """What is known of a dataset's images. It is read when it is asked for."""

    kind: str
    images: Mapping[str, Callable[[], Marked]]
    """By the URIs of the dataset's images."""
    total: int
    """Images that something is known of, the dataset's and others."""


def open_truth(uri: str, measured: StoredMasks, uris: Iterable[str]) -> Truth:
    """Find out what kind of truth an address holds, and list its images.

    Args:
        uri: COCO's JSON, a folder or tar of SA-1B, a folder of BSDS500's `.mat` files, or a masks dataset.
        measured: What is measured against it, which may not be the same dataset.
        uris: Of the images that are measured. Those of a masks dataset are matched by URI, if one is in both, all
            others by their files' paths, as `matching.matched` says.

    Raises:
        StorageError: the address cannot be read.
        TrainingDataError: there is no truth, it is damaged, or paths do not tell which image is which.
        OutputConflict: `run.json` of a dataset is damaged.
    """
    uri = storage.canonical_uri(uri)
    if storage.exists(f"{uri}/run.json"):
        if uri == measured.output:
            raise TrainingDataError(f"{storage.redact(uri)} is what is to be measured; give another as --truth.")
        return _of_dataset(stored_masks(uri), measured, set(uris))
    kind, readers = _listed(uri)
    named = [(Named(address, file_name(address, uri)), read) for address, read in readers]
    return Truth(kind, _matched(uri, named, measured, uris), len(named))


def _listed(uri: str) -> tuple[str, list[tuple[str, Callable[[], Marked]]]]:
    """What kind of truth an address holds, and the images' addresses there with what reads each."""
    files = list(storage.list_files(uri))
    if len(files) == 1 and files[0].uri == uri and suffix_of(uri) == ".json":
        return "COCO JSON", _of_coco(uri)
    if mats := [file.uri for file in files if suffix_of(file.uri) == ".mat"]:
        return "BSDS500", [(mat, partial(_of_mat, mat)) for mat in mats]
    annotations = [(address, partial(_of_sa1b, address, read)) for address, read in sa1b.find_annotations(uri)]
    if not annotations:
        raise TrainingDataError(f"{storage.redact(uri)} holds no truth: it must be {_WHAT_IS_TRUTH}.")
    return "SA-1B", [*annotations]


def _matched(
    uri: str, truths: list[tuple[Named, Callable[[], Marked]]], measured: StoredMasks, uris: Iterable[str]
) -> dict[str, Callable[[], Marked]]:
    images = (Named(image, file_name(image, measured.images_uri)) for image in uris)
    readers = {named.address: read for named, read in truths}
    pairs = matched(images, [named for named, _ in truths], storage.redact(uri))
    return {image: readers[truth] for image, truth in pairs.items()}


# COCO


def _of_coco(uri: str) -> list[tuple[str, Callable[[], Marked]]]:
    try:
        document = json.loads(storage.read_bytes(uri))
        images: dict[int, dict[str, Any]] = {image["id"]: image for image in document["images"]}
        names = {number: str(image.get("file_name") or image["coco_url"]) for number, image in images.items()}
        annotations: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in document["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        sizes = {number: (int(image["height"]), int(image["width"])) for number, image in images.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingDataError(f"{storage.redact(uri)} is not COCO's JSON of instances: {error!r}") from error
    return [
        (name, partial(_of_coco_image, f"{storage.redact(uri)}, {name}", sizes[number], annotations[number]))
        for number, name in names.items()
    ]


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


def _of_sa1b(address: str, read: Callable[[], bytes]) -> Marked:
    try:
        annotated = sa1b.parse(read())
    except ImageError as error:
        raise TrainingDataError(f"{storage.redact(address)}: {error}") from error
    return Marked((annotated.height, annotated.width), (_segments(annotated.masks),))


def _segments(masks: list[dict[str, Any]]) -> tuple[Segment, ...]:
    return tuple(Segment(mask["segmentation"], mask["area"]) for mask in masks)


def _of_mat(uri: str) -> Marked:
    try:
        label_maps = bsds.label_maps(io.BytesIO(storage.read_bytes(uri)))
        people = [bsds.segments(label_map_HW, SMALLEST_SEGMENT) for label_map_HW in label_maps]
        encoded = [tuple(_segment(rle.encode(mask_HW)) for mask_HW in masks_NHW) for masks_NHW in people]
        return Marked((label_maps[0].shape[0], label_maps[0].shape[1]), tuple(encoded))
    except (ValueError, LookupError, TypeError) as error:
        raise TrainingDataError(f"{storage.redact(uri)} is no segmentation of BSDS500: {error!r}") from error


def _segment(encoded: Rle) -> Segment:
    return Segment(encoded, rle.area(encoded))


def _of_dataset(stored: StoredMasks, measured: StoredMasks, uris: set[str]) -> Truth:
    reader = ShardReader(stored)
    readers: dict[str, Callable[[], Marked]] = {
        row.ref.uri: partial(_of_row, reader, shard, place)
        for shard in stored.shards
        for place, row in enumerate(reader.shard(shard).listed)
    }
    images = {uri: read for uri, read in readers.items() if uri in uris}
    if not images:
        named = [(Named(uri, file_name(uri, stored.images_uri)), read) for uri, read in readers.items()]
        images = _matched(stored.output, named, measured, uris)
    return Truth("masks dataset", images, len(readers))


def _of_row(reader: ShardReader, shard: int, place: int) -> Marked:
    [(_, row)] = reader.rows(shard, range(place, place + 1))
    if row["status"] not in PROCESSED:
        return Marked((0, 0), ())
    return Marked((row["height"], row["width"]), (_segments(row["masks"]),))
