"""The settings of a run: frozen, validated where they are made. And its fingerprint.

Two runs with the same fingerprint write the same rows, so one may go on where the other stopped.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from cyclopts import Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator

import pipeline
from schemas import embeddings, manifest, masks

Fraction = Annotated[float, Field(ge=0, le=1)]
PointGrid = tuple[tuple[Fraction, Fraction], ...]
OutputMode = Literal["coco_rle", "uncompressed_rle", "binary_mask"]
Kind = Literal["masks", "embeddings"]
"""What the rows of a run hold of an image; also the name of the folder with its shards."""

_SCHEMA_VERSIONS: Final[dict[Kind, int]] = {
    "masks": masks.SCHEMA_VERSION,
    "embeddings": embeddings.SCHEMA_VERSION,
}

# How the command line shows a setting.
_FLAT: Final = Parameter(name="*")
_NOT_A_FLAG: Final = Parameter(parse=False, show=False)


def _as_tuples(grids: Any) -> Any:
    """Accept arrays, as segment-anything does."""
    return grids if grids is None else tuple(tuple(map(tuple, grid)) for grid in grids)


def _whole_above_one(gpus: float | None) -> float | None:
    """Ray shares one GPU, and gives out several whole."""
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ValueError("above 1 it must be a whole number")
    return gpus


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class AmgConfig(_Settings):
    """Automatic mask generation: the arguments and defaults of `SamAutomaticMaskGenerator`."""

    points_per_side: Annotated[int | None, Field(ge=1)] = 32
    """Points along one side of the grid; the total is its square. None where `point_grids` is given."""
    points_per_batch: Annotated[int | None, Field(ge=1)] = None
    """Prompts decoded at once, 64 by default, where masks are made on a GPU 256. Changes speed and memory, not
    masks."""
    pred_iou_thresh: float | None = None
    """Keep masks whose predicted IoU is above this; 0 or less keeps all. By default 0.88, unless the weights ask
    for another."""
    stability_score_thresh: float | None = None
    """Keep masks whose stability score is at least this; 0 or less keeps all. By default 0.95, unless the weights
    ask for another."""
    stability_score_offset: float = 1.0
    """How far the threshold is moved, in logits, to measure the stability score."""
    box_nms_thresh: float = 0.7
    """Box IoU above which the mask of the lower predicted IoU is a duplicate, within a crop."""
    crop_n_layers: Annotated[int, Field(ge=0, le=8)] = 0
    """Layers of crops to run on besides the whole image; layer i has 4^i crops."""
    crop_nms_thresh: float = 0.7
    """Box IoU above which masks of different crops are duplicates; the smaller crop's stays."""
    crop_overlap_ratio: Fraction = 512 / 1500
    """Overlap of neighbouring crops, as a share of the image's shorter side; halved by each layer."""
    crop_n_points_downscale_factor: Annotated[int, Field(ge=1)] = 1
    """Points along a side in crop layer i are divided by this to the power of i."""
    point_grids: Annotated[tuple[PointGrid, ...] | None, BeforeValidator(_as_tuples), _NOT_A_FLAG] = None
    """Explicit grids of x, y in 0..1, one a crop layer, in place of `points_per_side`."""
    min_mask_region_area: Annotated[int, Field(ge=0)] = 0
    """Remove islands and holes smaller than this many pixels; 0 leaves masks as they are."""
    keep_candidates: bool = False
    """Leave the choice to jobs.curate_masks: thresholds that are not given keep all masks, and none is dropped as
    a duplicate, whatever box_nms_thresh and crop_nms_thresh are."""
    output_mode: Annotated[OutputMode, _NOT_A_FLAG] = "coco_rle"
    """Form of `segmentation`: compressed COCO RLE, uncompressed RLE, or a bool array H x W."""
    memory_budget: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**30)
    """Bytes that masks at the image's size may take at once; one mask is always allowed."""

    def with_thresholds(self, thresholds: Mapping[str, float]) -> Self:
        """The same with the weights' own thresholds where none were given; with `keep_candidates` with 0."""
        chosen: dict[str, float] = {
            name: 0.0 if self.keep_candidates else value
            for name, value in thresholds.items()
            if getattr(self, name) is None
        }
        if self.keep_candidates:
            chosen |= {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
        return self.model_copy(update=chosen)

    @model_validator(mode="after")
    def _one_way_to_say_points(self) -> Self:
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError("give points_per_side or point_grids, and the other as None")
        if self.point_grids is not None and len(self.point_grids) != self.crop_n_layers + 1:
            raise ValueError(f"{len(self.point_grids)} point_grids, {self.crop_n_layers + 1} crop layers")
        return self

    @model_validator(mode="after")
    def _clean_what_is_kept(self) -> Self:
        if self.keep_candidates and self.min_mask_region_area:
            raise ValueError("keep_candidates leaves masks as they are: give min_mask_region_area to the curation")
        return self

    @model_validator(mode="after")
    def _points_in_every_layer(self) -> Self:
        """The reference fails where a layer has no points."""
        if self.point_grids is not None and not all(self.point_grids):
            raise ValueError("one of point_grids has no points")
        smallest = self.crop_n_points_downscale_factor**self.crop_n_layers
        if self.points_per_side is not None and self.points_per_side < smallest:
            raise ValueError(
                f"points_per_side {self.points_per_side} leaves no points in crop layer {self.crop_n_layers}, "
                f"where it is divided by {smallest}"
            )
        return self


class ModelConfig(_Settings):
    """Which model, and how it runs."""

    model: Literal["mobile_sam", "demo", "vit_b", "vit_l", "vit_h"] | None = None
    """Published weights to fetch, mobile_sam by default, or demo, which come along; with a checkpoint, what it
    must be."""
    checkpoint: str | None = None
    """URI of a .pt, .pth or .safetensors file to use instead of published weights."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the model runs; auto takes the first of cuda, mps, cpu that is there."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 gives the reference's masks; bf16 is faster and approximate."""
    image_size: Annotated[int | None, Field(ge=64, multiple_of=16)] = None
    """Side of the encoder's input; by default what the weights were made for, else 1024."""

    @property
    def address(self) -> str:
        """What `load_model` takes: the checkpoint, or a model's name."""
        return self.checkpoint or self.model or "mobile_sam"


class ImagesConfig(_Settings):
    """How images are read."""

    max_pixels: Annotated[int, Field(gt=0)] = 200_000_000
    """Images of more pixels get the status too_large."""
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**30)
    """Files of more bytes get the status too_large."""
    decode_timeout: Annotated[float, Field(gt=0, le=86_400)] = 60
    """Seconds that decoding one image may take; one that twice takes longer gets the status timeout."""
    decode_memory: Annotated[ByteSize, Field(ge=2**28)] = ByteSize(2**33)
    """Bytes of memory that decoding one image may take; one that needs more gets the status out_of_memory."""
    read_ahead: Annotated[int, Field(ge=1, le=256)] = 8
    """Images that a worker reads and decodes ahead."""


class ClusterConfig(_Settings):
    """What a worker is given by Ray."""

    num_workers: Annotated[int | None, Field(ge=1)] = None
    """Workers at most, each with one model; by default as many as the cluster's GPUs or CPUs allow."""
    gpus_per_worker: Annotated[float | None, Field(ge=0), AfterValidator(_whole_above_one)] = None
    """GPUs a worker claims; by default 1 on CUDA, else 0. 0.5 puts two workers on one GPU."""
    cpus_per_worker: Annotated[float | None, Field(gt=0)] = None
    """CPUs a worker claims; by default 1 with a GPU, else up to 4. Also its number of threads."""


class LoadedWeights(NamedTuple):
    """What only the loaded model knows of itself."""

    sha256: str
    """Of the checkpoint, hexadecimal."""
    image_size: int
    """Side of the encoder's input in pixels."""
    architecture: str
    thresholds: Mapping[str, float]
    """That masks are kept by where the run's settings name none."""


class RunConfig(_Settings):
    """What every run has, whatever its rows hold."""

    kind: ClassVar[Kind]

    images: str
    """Folder, prefix, glob, list file, tar or Parquet file, on any fsspec filesystem."""
    output: str
    """Folder or prefix that receives run.json, manifest/, the shards, progress.json and summary.json."""
    images_per_shard: Annotated[int, Field(ge=1)]
    """Images a Parquet file; also what a killed worker loses at most."""
    overwrite: bool = False
    """Delete the run that the output holds, the same one too, and start anew."""
    dry_run: bool = False
    """List the images, make a sample of them, print what the run would cost as JSON, and write nothing."""
    retry_failed: bool = False
    """Do the finished shards again that hold failed images."""
    max_failure_rate: Fraction = 0.5
    """Stop when more than this share of the images fail (judged after 100 images, or at the end)."""
    allow_empty: bool = False
    """An address without images gives an empty dataset instead of an error."""
    kernels: Annotated[bool, _NOT_A_FLAG] = False
    model: Annotated[ModelConfig, _FLAT] = ModelConfig()
    reading: Annotated[ImagesConfig, _FLAT] = ImagesConfig()
    cluster: Annotated[ClusterConfig, _FLAT] = ClusterConfig()

    @property
    def asks_for_device(self) -> bool:
        """Whether another device than whatever is there is asked for."""
        return self.model.device in {"cuda", "mps"} or bool(self.cluster.gpus_per_worker)

    def determinants(self, weights: LoadedWeights) -> dict[str, Any]:
        """All that decides what the rows say, as JSON. What only changes speed is left out.

        The version of the rows' schema stands in `schema` under the run's kind.
        """
        return {
            "images": self.images,
            "images_per_shard": self.images_per_shard,
            "precision": self.model.precision,
            "image_size": weights.image_size,
            "reading": self.reading.model_dump(mode="json", include={"max_pixels", "max_bytes"}),
            "weights_sha256": weights.sha256,
            "code": pipeline.__version__,
            "schema": {"manifest": manifest.SCHEMA_VERSION, self.kind: _SCHEMA_VERSIONS[self.kind]},
        }


class MasksConfig(RunConfig):
    """One run of `jobs.generate_masks`."""

    kind = "masks"

    images_per_shard: Annotated[int, Field(ge=1)] = 256
    """Images a Parquet file; also what a killed worker loses at most."""
    kernels: bool = True
    """Run the decoder in kernels: C++ on a CPU; Triton in bf16 where a GPU is faster with it. Changes speed and
    rounding."""
    amg: Annotated[AmgConfig, _FLAT] = AmgConfig()

    def determinants(self, weights: LoadedWeights) -> dict[str, Any]:
        """All that decides what the rows say, with the arguments of mask generation."""
        settings = self.amg.with_thresholds(weights.thresholds)  # which say all that keep_candidates does
        amg = settings.model_dump(mode="json", exclude={"points_per_batch", "memory_budget", "keep_candidates"})
        return super().determinants(weights) | {"amg": amg}


class EmbeddedImagesConfig(ImagesConfig):
    """How images are read that are to be embedded: `--max-bytes` is the store's limit there."""

    max_bytes: Annotated[ByteSize, Field(gt=0), Parameter(name="--max-image-bytes")] = ByteSize(2**30)
    """Files of more bytes get the status too_large."""


class EmbeddingsConfig(RunConfig):
    """One run of `jobs.embed_images`."""

    kind = "embeddings"

    images_per_shard: Annotated[int, Field(ge=1)] = 64
    """Images a Parquet file, 2 MiB each at image size 1024; also what a killed worker loses at most."""
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(2**40)
    """Bytes that all embeddings may take, uncompressed; more are refused before any worker starts. (The limit
    on one image's file is --max-image-bytes here.)"""
    reading: Annotated[EmbeddedImagesConfig, _FLAT] = EmbeddedImagesConfig()

    def determinants(self, weights: LoadedWeights) -> dict[str, Any]:
        """All that decides what the rows say, with the teacher's architecture."""
        return super().determinants(weights) | {"architecture": weights.architecture}


class ImportConfig(RunConfig):
    """One run of `jobs.import_sa1b`."""

    kind = "masks"

    images: str
    """Folder, prefix, glob or tar with the images, and beside each its JSON, on any fsspec filesystem."""
    images_per_shard: Annotated[int, Field(ge=1)] = 256
    """Images a Parquet file."""
    dry_run: Annotated[bool, _NOT_A_FLAG] = False
    max_failure_rate: Annotated[Fraction, _NOT_A_FLAG] = 1.0
    model: Annotated[ModelConfig, _NOT_A_FLAG] = ModelConfig()
    cluster: Annotated[ClusterConfig, _NOT_A_FLAG] = ClusterConfig()

    def determinants(self, weights: LoadedWeights) -> dict[str, Any]:
        """All that decides what the rows say: no model of ours does."""
        common = super().determinants(weights)
        return {name: common[name] for name in common if name not in {"weights_sha256", "precision"}} | {
            "source": "SA-1B"
        }


def fingerprint(determinants: dict[str, Any]) -> str:
    """SHA-256, hexadecimal, of a run's determinants."""
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()
