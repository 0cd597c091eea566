"""Image files made here, decoded by `pipeline.images` and compared."""

import io
import struct
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images import decode_image
from schemas.masks import Status

RED = (255, 0, 0)
Array = NDArray[np.uint8]


def decode(data: bytes, max_pixels: int = 10**7) -> Array:
    """Decode, and check what holds for every decoded image."""
    rgb_HW3 = decode_image(data, max_pixels=max_pixels)
    assert rgb_HW3.dtype == np.uint8
    assert rgb_HW3.ndim == 3
    assert rgb_HW3.shape[2] == 3
    assert rgb_HW3.flags.c_contiguous
    assert rgb_HW3.flags.writeable
    return rgb_HW3


def refusal(data: bytes, max_pixels: int = 10**7) -> tuple[Status, str]:
    with pytest.raises(ImageError) as caught:
        decode_image(data, max_pixels=max_pixels)
    return caught.value.status, str(caught.value)


def encode(image: Image.Image | NDArray[Any], file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, file_format, **options)
    return file.getvalue()


def picture(height: int = 24, width: int = 40) -> Array:
    """Smooth, coloured and different under every flip and turn, so that JPEG hardly changes it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1)
    return np.stack([red, green, np.full_like(x, 60)], axis=-1).astype(np.uint8)


def assert_close(a: Array, b: Array, tolerance: int = 10) -> None:
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= tolerance


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def tiff(
    samples: NDArray[Any],
    photometric: int,
    extra: tuple[int, ...] = (),
    order: Literal["<", ">"] = "<",
    **tags: int,
) -> bytes:
    """An uncompressed TIFF of any sample type and number of bands, which Pillow cannot write."""
    height, width, bands = samples.shape
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        258: (tags.get("bits", samples.dtype.itemsize * 8),) * bands,
        259: (tags.get("compression", 1),),
        262: (photometric,),
        273: (8,),
        277: (bands,),
        278: (height,),
        279: (len(pixels),),
        339: (kind,) * bands,
    } | ({338: extra} if extra else {})
    start = 8 + len(pixels)
    more = start + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(order + "H", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        body = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(body) > 4:
            field, values = struct.pack(order + "I", more + len(values)), values + body
        else:
            field = body.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, 3, len(numbers)) + field
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", start) + pixels + directory + bytes(4) + values
