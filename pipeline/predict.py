"""What a run's model makes of an image: the contents of its row, masks or the teacher's embedding."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from pipeline.amg import MaskGenerator
from pipeline.config import LoadedWeights, MasksConfig, RunConfig
from pipeline.contents import FUNNEL, MASKS_ROWS_PER_GROUP, SECONDS, Content, Row
from pipeline.errors import ImageError
from pipeline.model import SamModel
from pipeline.phase_clock import PhaseClock
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

    def of_image(rgb_HW3: NDArray[np.uint8]) -> Row:
        clock = PhaseClock(generator.model.device)
        masks, funnel = generator.generate_with_funnel(rgb_HW3, clock=clock)
        status = Status.OK if masks else Status.EMPTY
        return {"masks": masks, "status": status, FUNNEL: asdict(funnel), SECONDS: clock.seconds()}

    return Content(
        schema=MASKS_SCHEMA, rows_per_group=MASKS_ROWS_PER_GROUP, of_image=of_image, of_failure={"masks": []}
    )


def embeddings_content(teacher: SamModel) -> Content:
    """The embedding of an image, rounded to float16.

    Noise compresses little, but the byte with sign and exponent does once it stands apart: zstd of split bytes
    leaves three quarters, at the cost of a copy. Checksums, because damaged numbers are numbers too.
    """

    def of_image(rgb_HW3: NDArray[np.uint8]) -> Row:
        clock = PhaseClock(teacher.device)
        with clock.phase("encode"):
            encoded = teacher.encode(rgb_HW3)
            embedding_CGG = encoded.features_1CHW[0].half().cpu().numpy()
        if not np.isfinite(embedding_CGG).all():
            raise ImageError(Status.UNSUPPORTED, "the teacher's embedding of it is not finite in float16")
        height, width = encoded.input_size
        columns = {"input_height": height, "input_width": width, "embedding": embedding_CGG.reshape(-1)}
        return columns | {SECONDS: clock.seconds()}

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
        of_failure={"input_height": None, "input_width": None, "embedding": None},
    )
