"""What a run's model makes of an image: the contents of its row, masks or the teacher's embedding."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.amg import MaskGenerator
from pipeline.config import LoadedWeights, MasksConfig, RunConfig
from pipeline.contents import FUNNEL, MASKS_ROWS_PER_GROUP, SECONDS, Content, Row
from pipeline.errors import ImageError
from pipeline.memory import is_out_of_memory
from pipeline.model import SamModel
from pipeline.model.sam import Embedding
from pipeline.phase_clock import PhaseClock
from pipeline.phases import Phase
from schemas.embeddings import embeddings_schema
from schemas.masks import MASKS_SCHEMA, Status


def weights_of(model: SamModel) -> LoadedWeights:
    """What decides a run's rows and only the loaded model knows."""
    return LoadedWeights(model.weights_sha256, model.image_size, model.architecture, model.thresholds)


def content_of(config: RunConfig, model: SamModel) -> Content:
    """What the run of these settings makes, with a model that is loaded and checked."""
    if isinstance(config, MasksConfig):
        return masks_content(MaskGenerator(model, **config.amg.model_dump()))
    return embeddings_content(model)


def masks_content(generator: MaskGenerator) -> Content:
    """All masks of an image."""

    def of_image(rgb_HW3: NDArray[np.uint8], encoded: _Encoded | None = None) -> Row:
        clock = PhaseClock(generator.model.device)
        masks, funnel = generator.generate_with_funnel(rgb_HW3, encoded and encoded.embedding, clock)
        status = Status.OK if masks else Status.EMPTY
        seconds = _seconds(clock, encoded)
        return {"masks": masks, "status": status, FUNNEL: asdict(funnel), SECONDS: seconds}

    return Content(
        schema=MASKS_SCHEMA,
        rows_per_group=MASKS_ROWS_PER_GROUP,
        of_image=of_image,
        images_per_batch=generator.model.images_per_batch,
        of_images=_together(generator.model, of_image),
        of_failure={"masks": []},
    )


def embeddings_content(teacher: SamModel) -> Content:
    """The embedding of an image, rounded to float16.

    Noise compresses little, but the byte with sign and exponent does once it stands apart: zstd of split bytes
    leaves three quarters, at the cost of a copy. Checksums, because damaged numbers are numbers too.
    """

    def of_image(rgb_HW3: NDArray[np.uint8], encoded: _Encoded | None = None) -> Row:
        clock = PhaseClock(teacher.device)
        with clock.phase("encode"):
            embedding = encoded.embedding if encoded else teacher.encode(rgb_HW3)
            embedding_CGG = embedding.features_1CHW[0].half().cpu().numpy()
        if not np.isfinite(embedding_CGG).all():
            raise ImageError(Status.UNSUPPORTED, "the teacher's embedding of it is not finite in float16")
        height, width = embedding.input_size
        columns = {"input_height": height, "input_width": width, "embedding": embedding_CGG.reshape(-1)}
        return columns | {SECONDS: _seconds(clock, encoded)}

    return Content(
        schema=embeddings_schema(teacher.image_size),
        rows_per_group=4,
        encoding={
            "use_dictionary": False,
            "write_statistics": ["image_id"],
            "column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"},
            "write_page_checksum": True,
        },
        of_image=of_image,
        images_per_batch=teacher.images_per_batch,
        of_images=_together(teacher, of_image),
        of_failure={"input_height": None, "input_width": None, "embedding": None},
    )


class _Encoded(NamedTuple):
    """An image that was encoded with others."""

    embedding: Embedding
    clock: PhaseClock
    images: int
    """That the clock's time is of."""


def _together(
    model: SamModel, of_image: Callable[[NDArray[np.uint8], _Encoded | None], Row]
) -> Callable[[list[NDArray[np.uint8]]], list[Callable[[], Row]]]:
    """Encodes images at once; once memory has not sufficed for that, each when it is its turn."""
    suffices = True

    def of_images(images_HW3: list[NDArray[np.uint8]]) -> list[Callable[[], Row]]:
        nonlocal suffices
        clock = PhaseClock(model.device)
        try:
            with clock.phase("encode"):
                embeddings = model.encode_batch(images_HW3) if suffices else []
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            suffices = False
        if not suffices:
            return [partial(of_image, rgb_HW3, None) for rgb_HW3 in images_HW3]
        return [
            partial(of_image, rgb_HW3, _Encoded(embedding, clock, len(images_HW3)))
            for rgb_HW3, embedding in zip(images_HW3, embeddings, strict=True)
        ]

    return of_images


def _seconds(clock: PhaseClock, encoded: _Encoded | None) -> dict[Phase, float]:
    """Of an image's phases, with its part of what several took."""
    seconds = clock.seconds()
    if encoded:
        shared = encoded.clock.seconds()["encode"] / encoded.images
        seconds["encode"] = seconds.get("encode", 0.0) + shared
    return seconds
