"""Bytes of an image file -> pixels as a model wants them: uint8 RGB, upright, within limits.

    format            by content, never by name: JPEG, PNG, WebP, GIF, TIFF, BMP, PPM, JPEG 2000, AVIF, HEIC
    frames            the first of a multi-page TIFF, an animated GIF, WebP or PNG, an MPO
    orientation       EXIF and XMP orientation 1 to 8 applied; broken EXIF counts as 1
    gray, 1-bit       the same value three times
    transparency      composited on white: alpha, palette alpha, a transparent colour
    CMYK              R = (255 - C) * (255 - K) / 255, and so on. Samples of a JPEG are taken as inverted
                      where it has an Adobe marker and as plain where it has none, as Little CMS does
    16-bit gray       round(value * 255 / 65535), never clipped; wider integers too if all are in 0..65535
    12-bit gray       round(value * 255 / 4095)
    16-bit RGB, RGBA  the high byte
    ICC profiles      not applied: the numbers in the file are the colours
    refused           floating-point samples, CIELAB, other integers, more than four bands

A refusal is an `ImageError` whose status is one of

    empty_file        no bytes
    not_an_image      they begin like none of these formats
    truncated         they begin like one and cannot be read to the end: cut short, if only by the end
                      marker of a JPEG or PNG, or damaged
    too_large         more than `max_pixels`, noticed before pixels are allocated
    out_of_memory     memory ran out while it was decoded
    unsupported       refused by a rule above, or nothing here decodes it
"""

import importlib
import io
import re
import struct
import warnings
import zlib
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageFile, features

from pipeline.errors import ImageError
from schemas.masks import Status

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".heic", ".heif", ".avif"}
)
"""The endings of file names, in lower case, that a listing takes for images."""

# Once for the process and not around a call, because threads share these settings. `max_pixels` replaces
# Pillow's own limit, and what Pillow warns of (odd metadata) would be a log line per image.
Image.init()
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
with suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()

# Two letters, as BMP and PPM have, also begin many a text, so more of the header is asked for.
_SIGNATURES: Final = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"(II|MM)([*+]\0|\0[*+])"),
    "BMP": re.compile(rb"BM.{13}\0{3}", re.DOTALL),
    "PPM": re.compile(rb"P[1-6]\s+[\d#]"),
    "JPEG2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    "AVIF": re.compile(rb".{4}ftyp(.{4})*?(avif|avis)", re.DOTALL),
    "HEIF": re.compile(rb".{4}ftyp(.{4})*?(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL),
}

_UNREADABLE: Final = (
    OSError,  # the ordinary ones, UnidentifiedImageError among them
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)
"""What Pillow's plugins let through when they meet bytes that they did not expect."""

_UNSUPPORTED_WORDS: Final = re.compile(
    "unknown pixel mode|samples per pixel|J2K image mode|cannot handle|not available|not (yet )?supported|"
    "[Uu]nsupported"
)

_DECODERS: Final = {
    "AVIF": "AVIF" in Image.OPEN and features.check("avif"),
    "HEIF": "HEIF" in Image.OPEN,
}
"""Whether those that Pillow can be without are there."""
_DECODER_FROM: Final = {"AVIF": "'pillow>=11.3'", "HEIF": "'everymask[heif]'"}

_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode one image file by the rules in the module's docstring.

    Returns rgb_HW3: uint8, C-contiguous, writeable, height and width as displayed. Raises `ImageError` and
    nothing else, whatever the bytes are, unless they are the end of the process: `pipeline.decoding` is for that.
    Several threads may call it at once.
    """
    if not data:
        raise ImageError(Status.EMPTY_FILE, "the file has zero bytes")
    kind = _kind_of(data)
    try:
        if kind == "WEBP":  # Pillow allocates its canvas while opening
            _check_size(_webp_size(data), max_pixels)
        image = _open(data, kind)
        _check_size(image.size, max_pixels)
        image.load()
        if kind == "PNG":
            _check_png_end(data)
            _scale_transparent_colour(image, depth=data[24])
        return _to_array(_upright(_to_rgb(image), image))
    except _UNREADABLE as error:
        raise _unreadable(kind, error) from error
    except Image.DecompressionBombError as error:  # another library has set Pillow's limit
        raise ImageError(Status.TOO_LARGE, f"{kind} image: {error}") from error
    except MemoryError as error:
        raise ImageError(Status.OUT_OF_MEMORY, f"no memory to decode this {kind} image: {error!r}") from error


def input_size_of(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Height and width of an image as the input of an encoder: the longer is `image_size`.

    Rounded as `ResizeLongestSide.get_preprocess_shape` of segment_anything rounds, and no side below 1.
    """
    scale = image_size / max(size)
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def _kind_of(data: bytes) -> str:
    """Return Pillow's name of the format that `data` begin like."""
    head = data[:64]
    for kind, signature in _SIGNATURES.items():
        if signature.match(head):
            return kind
    formats = ", ".join(_SIGNATURES)
    raise ImageError(Status.NOT_AN_IMAGE, f"begins with {head[:16]!r}, like none of {formats}")


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    """Read the header. Not through `Image.open`, which keeps to itself why a plugin gave up."""
    if not _DECODERS.get(kind, True):
        message = f"{kind} image, and no decoder for it is installed: pip install {_DECODER_FROM[kind]}"
        raise ImageError(Status.UNSUPPORTED, message)
    image = Image.OPEN[kind][0](io.BytesIO(data), "")
    bands = getattr(image, "tag_v2", {}).get(ExifTags.Base.SamplesPerPixel, 1)
    if bands > 4:  # Pillow drops the others of some such TIFFs
        raise ImageError(Status.UNSUPPORTED, f"{kind} image with {bands} bands; at most 4 are handled")
    return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        message = f"{width} x {height} pixels are more than the limit of {max_pixels:,}; --max-pixels raises it"
        raise ImageError(Status.TOO_LARGE, message)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return a WebP's width and height, by https://developers.google.com/speed/webp/docs/riff_container."""
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_png_end(data: bytes) -> None:
    """Refuse a PNG whose pixels are all there and whose end is not, which Pillow accepts."""
    if data.rfind(b"IEND\xaeB`\x82") < 0:
        raise ImageError(Status.TRUNCATED, "PNG data end too early: no IEND chunk")


def _scale_transparent_colour(image: Image.Image, *, depth: int) -> None:
    """Bring a PNG's transparent colour from the file's bit depth to 8 bits, as Pillow did the pixels."""
    colour = image.info.get("transparency")
    if image.mode == "L" and colour is not None:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and colour is not None and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Return the loaded image in mode RGB; the image itself if it is."""
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba)
        return canvas
    if image.mode == "RGB":
        return image
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return ImageChops.invert(image).convert("RGB")  # Pillow inverts every CMYK JPEG
    if image.mode in {"1", "L", "P", "CMYK", "YCbCr"}:
        return image.convert("RGB")
    what = {"F": "floating-point samples", "LAB": "CIELAB colours"}.get(image.mode, f"mode {image.mode}")
    raise ImageError(
        Status.UNSUPPORTED, f"{image.format} image with {what}; convert it to 8 or 16-bit RGB or gray"
    )


def _from_integers(image: ImageFile.ImageFile) -> Image.Image:
    """Return an image of one integer band in mode RGB, scaled from 16 bits, or from a TIFF's 12."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        found = f"integers from {values.min()} to {values.max()}"
        message = f"{image.format} image with {found}; 0 to 65535 are handled"
        raise ImageError(Status.UNSUPPORTED, message)
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    gray = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero: Pillow inverts 8 bits, not 16
        gray = 255 - gray
    if (transparent := image.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _upright(rgb: Image.Image, image: ImageFile.ImageFile) -> Image.Image:
    """Turn `rgb` as the metadata of `image` say: 1 for a TIFF or HEIC, as loading has turned those."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _UNREADABLE:
        orientation = None
    turn = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)


def _to_array(rgb: Image.Image) -> NDArray[np.uint8]:
    """Copy the pixels out, in bands that stay in cache: faster than `np.array(rgb)`, and half the memory."""
    width, height = rgb.size
    rgb_HW3 = np.empty((height, width, 3), np.uint8)
    step = max(1, 2**18 // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        rgb_HW3[top:bottom] = np.asarray(rgb.crop((0, top, width, bottom)))
    return rgb_HW3


def _unreadable(kind: str, error: Exception) -> ImageError:
    """Tell an image of a kind that Pillow does not read from one that is cut or damaged."""
    # A plugin looks codes up in tables; one that is not there is a feature that Pillow lacks.
    if _UNSUPPORTED_WORDS.search(str(error)) or isinstance(error.__cause__, KeyError):
        return ImageError(Status.UNSUPPORTED, f"{kind} image of a kind that Pillow does not read: {error}")
    return ImageError(Status.TRUNCATED, f"{kind} data end too early or are damaged: {error}")
