"""The phases of an image and of its shard."""

from typing import Final, Literal, get_args

Phase = Literal["fetch", "decode", "encode", "decode_masks", "post_process", "write"]
"""An image's phases in their order, and that of its shard: the bytes are fetched; the pixels decoded; the image
encoder; the prompt encoder and the mask decoder; filters, upsampling, suppression and RLE; the shard's file is
written."""
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
ON_DEVICE: Final[tuple[Phase, ...]] = ("encode", "decode_masks", "post_process")
"""Those that take an image one after another; the others run beside them."""
