"""`pipeline.images` on real image bytes. Cases are numbered as in the list of what everymask must survive."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageCms

from pipeline.errors import ImageError
from pipeline.images import IMAGE_SUFFIXES, decode_image
from schemas.masks import Status

# The module tells Pillow to be quiet about odd metadata; pytest's own filters come before the module's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

WHITE = (255, 255, 255)
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


def png(raw_rows: list[bytes], width: int, depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any bit depth, which Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, len(raw_rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in raw_rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


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


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


# --- case 1 to 5: what is no image, or too much of one


def test_case_01_zero_bytes() -> None:
    assert refusal(b"")[0] is Status.EMPTY_FILE


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_case_02_truncated_jpeg(options: dict[str, Any]) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encode(noise, "JPEG", quality=90, **options)
    decode(whole)
    for cut in [*range(3, 700), *range(700, len(whole) - 40, 37), *range(len(whole) - 40, len(whole))]:
        status, message = refusal(whole[:cut])
        assert status is Status.TRUNCATED, f"cut at {cut} of {len(whole)}"
        assert "JPEG" in message


def test_case_02_truncated_png() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8)
    whole = encode(noise, "PNG", exif=exif(6))
    decode(whole)
    decode(whole + b"bytes after the end are no reason to refuse")
    for cut in [*range(8, 200), *range(200, len(whole) - 40, 37), *range(len(whole) - 40, len(whole))]:
        assert refusal(whole[:cut])[0] is Status.TRUNCATED, f"cut at {cut} of {len(whole)}"


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_case_02_truncated_others(file_format: str) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8)
    whole = encode(noise, file_format)
    decode(whole)
    for cut in [24, 40, len(whole) // 3, len(whole) // 2, len(whole) * 3 // 4]:
        assert refusal(whole[:cut])[0] is Status.TRUNCATED, f"cut at {cut} of {len(whole)}"


@pytest.mark.parametrize(
    "text",
    [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b'{"error": "AccessDenied"}',
        b"Python, PNG and other words that begin like image formats",
        b"BMW and other words that begin like image formats",
        b"P1 is where the other car was parked",
        b"\x89",
        b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would run Ghostscript
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    ],
)
def test_case_03_text_is_not_an_image(text: bytes) -> None:
    status, message = refusal(text)
    assert status is Status.NOT_AN_IMAGE
    assert repr(text[:8])[2:-1] in message


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_case_04_content_decides(file_format: str) -> None:
    """There is no name to be misled by: every format is known by its bytes."""
    image = np.zeros((5, 7, 3), np.uint8)
    image[:, 4:] = RED
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(image, file_format, **lossless)), image)


def test_case_05_header_claims_too_much() -> None:
    vast = struct.pack(">I", 60_000)
    as_png = bytearray(encode(picture(), "PNG"))
    as_png[16:24] = vast + vast
    as_png[29:33] = struct.pack(">I", zlib.crc32(as_png[12:29]))
    as_jpeg = bytearray(encode(picture(), "JPEG"))
    frame = as_jpeg.index(b"\xff\xc0")
    as_jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data in (bytes(as_png), bytes(as_jpeg)):
        status, message = refusal(data, 500_000_000)
        assert status is Status.TOO_LARGE
        assert "60000 x 60000" in message
        assert "500,000,000" in message
        assert "--max-pixels" in message


def test_case_05_webp_size_is_read_before_pillow_allocates_its_canvas() -> None:
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (59_999).to_bytes(3, "little") * 2
    assert refusal(b"RIFF" + struct.pack("<I", 22) + b"WEBP" + extended)[0] is Status.TOO_LARGE
    for options in ({}, {"lossless": True}, {"exif": exif(1)}):
        data = encode(picture(24, 40), "WEBP", **options)
        assert decode(data, 24 * 40).shape == (24, 40, 3)
        status, message = refusal(data, 24 * 40 - 1)
        assert status is Status.TOO_LARGE
        assert "40 x 24" in message


def test_case_05_limit_is_the_settings() -> None:
    tiny = encode(picture(10, 10), "PNG")
    assert decode(tiny, 100).shape == (10, 10, 3)
    assert refusal(tiny, 99)[0] is Status.TOO_LARGE


def test_case_05_limit_is_not_pillows() -> None:
    """More than Pillow allows, and less than the setting: the pixels are tried, and there are none."""
    claims = bytearray(tiff(np.zeros((777, 1, 1), np.uint8), photometric=1))
    for tag, value in ((256, 13_400), (257, 13_400)):
        at = claims.rindex(struct.pack("<HHI", tag, 3, 1))
        claims[at + 8 : at + 10] = struct.pack("<H", value)
    assert refusal(bytes(claims), 200_000_000)[0] is Status.TRUNCATED


def test_case_05_pillows_limit_if_another_library_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert refusal(encode(picture(), "TIFF"))[0] is Status.TOO_LARGE


# --- cases 6 and 7: orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_case_06_exif_orientation(file_format: str, orientation: int) -> None:
    upright = picture()
    # What a camera stores, from the standard's text: row 0 and column 0 of the stored picture are ...
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]
    if orientation == 6:  # row 0 is the right side, column 0 is the top
        stored = np.stack([upright[:, -1 - i] for i in range(upright.shape[1])])
    if orientation == 8:  # row 0 is the left side, column 0 is the bottom
        stored = np.stack([upright[::-1, i] for i in range(upright.shape[1])])
    options: dict[str, Any] = {"quality": 95} if file_format in {"JPEG", "WEBP", "AVIF"} else {}
    data = encode(np.ascontiguousarray(stored), file_format, exif=exif(orientation), **options)
    assert_close(decode(data), upright, tolerance=0 if file_format in {"PNG", "TIFF"} else 12)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_case_07_orientation_out_of_range(orientation: int) -> None:
    assert_close(decode(encode(picture(), "JPEG", quality=95, exif=exif(orientation))), picture())


def test_case_07_broken_exif() -> None:
    good = exif(6).tobytes()
    rng = np.random.default_rng(7)
    broken = [good[:cut] for cut in range(6, 28)]  # the entry ends at 28
    broken += [b"Exif\0\0" + rng.bytes(int(length)) for length in rng.integers(1, 200, 30)]
    broken += [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40]
    broken += [good.replace(b"\x00\x03\x00\x00\x00\x01", b"\x00\x02\x00\x00\x00\x04")]  # text, not a number
    for bad in broken:
        assert decode(encode(picture(), "JPEG", quality=95, exif=bad)).shape == (24, 40, 3), bad
        assert decode(encode(picture(), "PNG", exif=bad)).shape == (24, 40, 3), bad


def test_case_07_pillow_is_quiet_about_it() -> None:
    """In a process of its own, since pytest replaces the warning filters."""
    data = encode(
        picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x02\0\xff\0\0\0\0\x20\0\0" * 5
    )
    program = (
        "import sys; from pipeline.images import decode_image;"
        f"print(decode_image({data!r}, max_pixels=1000).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "(24, 40, 3)\n"
    assert done.stderr == ""


# --- cases 8 to 13: colours


def cmyk_twins() -> tuple[Image.Image, Array]:
    """A CMYK picture with some black in it, and what it looks like."""
    cmy = 255 - picture().astype(float)
    k = np.full(cmy.shape[:2], 40.0)
    ink = np.dstack([np.clip((cmy - 40) / (255 - 40) * 255, 0, 255), k]).round().astype(np.uint8)
    rgb = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    return Image.frombytes("CMYK", (40, 24), ink.tobytes()), rgb.round().astype(np.uint8)


def test_case_08_cmyk_with_adobe_marker_is_inverted() -> None:
    cmyk, rgb = cmyk_twins()
    data = encode(cmyk, "JPEG", quality=100)  # Pillow writes it as Adobe does
    assert b"\xff\xee\x00\x0eAdobe" in data
    assert_close(decode(data), rgb)


def test_case_08_cmyk_without_adobe_marker_is_not_inverted() -> None:
    cmyk, rgb = cmyk_twins()
    data = without_adobe_marker(encode(ImageChops.invert(cmyk), "JPEG", quality=100))  # so: stored as it is
    assert_close(decode(data), rgb)


def test_case_08_ycck() -> None:
    cmyk, rgb = cmyk_twins()
    *cmy, k = cmyk.split()
    luma, blue, red = Image.merge("RGB", cmy).convert("YCbCr").split()
    planes = [*(ImageChops.invert(plane) for plane in (luma, blue, red)), k]
    data = bytearray(encode(Image.merge("CMYK", planes), "JPEG", quality=100))
    data[data.index(b"\xff\xee\x00\x0eAdobe") + 15] = 2  # the transform: YCCK
    assert_close(decode(bytes(data)), rgb)


def test_case_08_cmyk_tiff() -> None:
    cmyk, rgb = cmyk_twins()
    assert_close(decode(encode(cmyk, "TIFF")), rgb, tolerance=1)


def test_case_09_gray_and_one_bit() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(8, 32)
    expected = np.repeat(ramp[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode(ramp, "PNG")), expected)
    np.testing.assert_array_equal(decode(encode(ramp, "TIFF")), expected)
    assert_close(decode(encode(ramp, "JPEG", quality=100)), expected)
    bits = Image.fromarray(ramp).point(lambda value: 255 * (value > 100), "1")
    for file_format in ("PNG", "TIFF", "BMP", "PPM"):
        np.testing.assert_array_equal(decode(encode(bits, file_format)), np.where(expected > 100, 255, 0))


def test_case_09_gray_with_alpha() -> None:
    pixels = np.array([[[10, 255], [10, 0], [0, 51]]], np.uint8)
    data = encode(Image.fromarray(pixels, "LA"), "PNG")
    np.testing.assert_array_equal(decode(data), [[(10, 10, 10), WHITE, (204, 204, 204)]])


def test_case_09_premultiplied_gray_with_alpha() -> None:
    data = tiff(np.array([[[10, 255], [0, 0]]], np.uint8), photometric=1, extra=(1,))
    np.testing.assert_array_equal(decode(data), [[(10, 10, 10), WHITE]])


def test_case_09_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([9, 8, 7, *RED, 0, 0, 255])
    image.putdata([0, 1, 2])
    np.testing.assert_array_equal(decode(encode(image, "PNG")), [[(9, 8, 7), RED, (0, 0, 255)]])
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=1)), [[(9, 8, 7), WHITE, (0, 0, 255)]])
    np.testing.assert_array_equal(
        decode(encode(image, "PNG", transparency=b"\x00\xff\x80")), [[WHITE, RED, (127, 127, 255)]]
    )
    np.testing.assert_array_equal(decode(encode(image, "GIF", transparency=2)), [[(9, 8, 7), RED, WHITE]])


def test_case_09_one_transparent_colour() -> None:
    """At every bit depth that PNG has; Pillow compares the 8-bit pixels with the file's number."""
    gray4 = png([b"\x5f"], 2, 4, 0, (b"tRNS", b"\0\x05"))
    np.testing.assert_array_equal(decode(gray4), [[WHITE, WHITE]])
    gray4_white = png([b"\x5f"], 2, 4, 0, (b"tRNS", b"\0\x0f"))
    np.testing.assert_array_equal(decode(gray4_white), [[(85, 85, 85), WHITE]])
    gray8 = png([b"\x05\x06"], 2, 8, 0, (b"tRNS", b"\0\x05"))
    np.testing.assert_array_equal(decode(gray8), [[WHITE, (6, 6, 6)]])
    gray16 = png([struct.pack(">2H", 1000, 1001)], 2, 16, 0, (b"tRNS", struct.pack(">H", 1000)))
    np.testing.assert_array_equal(decode(gray16), [[WHITE, (4, 4, 4)]])
    rgb8 = png([bytes([1, 2, 3, 1, 2, 4])], 2, 8, 2, (b"tRNS", bytes([0, 1, 0, 2, 0, 3])))
    np.testing.assert_array_equal(decode(rgb8), [[WHITE, (1, 2, 4)]])
    colour = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    rgb16 = png([colour + bytes(6)], 2, 16, 2, (b"tRNS", colour))
    np.testing.assert_array_equal(decode(rgb16), [[WHITE, (0, 0, 0)]])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_case_10_rgba_on_white(file_format: str) -> None:
    pixels = np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 51]]], np.uint8)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encode(pixels, file_format, **options)
    np.testing.assert_array_equal(decode(data), [[RED, WHITE, (204, 204, 204)]])


def test_case_11_gray_16_bit() -> None:
    values = np.array([[0, 1, 128, 129, 256, 32767, 32768, 40000, 65406, 65407, 65534, 65535]], np.uint16)
    expected = np.repeat(np.rint(values / 65535 * 255).astype(np.uint8)[..., None], 3, axis=2)
    assert expected[0, 6, 0] == 128
    files = {
        "png": encode(values, "PNG"),
        "little-endian tiff": tiff(values[..., None], photometric=1),
        "big-endian tiff": tiff(values[..., None], photometric=1, order=">"),
        "compressed tiff": encode(values, "TIFF", compression="tiff_lzw"),
        "32-bit tiff": tiff(values[..., None].astype(np.int32), photometric=1),
        "pgm": b"P5\n12 1\n65535\n" + values.astype(">u2").tobytes(),
    }
    for name, data in files.items():
        np.testing.assert_array_equal(decode(data), expected, err_msg=name)
    np.testing.assert_array_equal(decode(tiff(values[..., None], photometric=0)), 255 - expected)


def test_case_11_gray_16_bit_every_value() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(values, "PNG"))[..., 1], expected)


def test_case_11_gray_12_bit() -> None:
    twelve = bytearray(tiff(np.zeros((1, 3, 1), np.uint8), photometric=1, bits=12))
    twelve[8:11] = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    assert decode(bytes(twelve))[0, :2, 0].tolist() == [255, 128]


def test_case_11_integers_out_of_range() -> None:
    for value in (-1, 65536):
        status, message = refusal(tiff(np.array([[[0], [value]]], np.int32), photometric=1))
        assert status is Status.UNSUPPORTED
        assert str(value) in message


def test_case_11_rgb_16_bit() -> None:
    values = np.array([[[0, 255, 256], [0x1234, 0x8000, 0xFFFF]]], np.uint16)
    files = {
        "png": png([values.astype(">u2").tobytes()], 2, 16, 2),
        "little-endian tiff": tiff(values, photometric=2),
        "big-endian tiff": tiff(values, photometric=2, order=">"),
    }
    for name, data in files.items():
        np.testing.assert_array_equal(decode(data), values >> 8, err_msg=name)


def test_case_11_alpha_16_bit() -> None:
    rgba = png([struct.pack(">8H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 1, 2, 3, 0)], 2, 16, 6)
    np.testing.assert_array_equal(decode(rgba), [[(0x12, 0x56, 0x9A), WHITE]])
    gray = png([struct.pack(">4H", 0x1234, 0xFFFF, 1, 0)], 2, 16, 4)
    np.testing.assert_array_equal(decode(gray), [[(0x12, 0x12, 0x12), WHITE]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_case_12_float_tiff(dtype: type, value: float) -> None:
    assert refusal(tiff(np.full((2, 2, 1), value, dtype), photometric=1))[0] is Status.UNSUPPORTED


@pytest.mark.parametrize("photometric", [1, 2])
@pytest.mark.parametrize("bands", [5, 6, 7, 13])
def test_case_13_more_than_four_bands(bands: int, photometric: int) -> None:
    extra = (0,) * (bands - (1 if photometric == 1 else 3))
    status, message = refusal(tiff(np.zeros((3, 3, bands), np.uint8), photometric, extra))
    assert status is Status.UNSUPPORTED
    assert "TIFF" in message


def test_four_bands_of_which_one_is_unspecified() -> None:
    samples = np.array([[[1, 2, 3, 0], [4, 5, 6, 99]]], np.uint8)
    np.testing.assert_array_equal(decode(tiff(samples, photometric=2, extra=(0,))), samples[..., :3])


def test_lab_is_unsupported_and_ycbcr_is_not() -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(picture()),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    status, message = refusal(encode(lab, "TIFF"))
    assert status is Status.UNSUPPORTED
    assert "LAB" in message
    assert_close(decode(encode(Image.fromarray(picture()).convert("YCbCr"), "TIFF")), picture())


def test_unknown_kinds_of_known_formats_are_unsupported() -> None:
    twelve_bit = bytearray(encode(picture(), "JPEG"))
    twelve_bit[twelve_bit.index(b"\xff\xc0") + 4] = 12
    compression = tiff(np.zeros((2, 2, 1), np.uint8), photometric=1, compression=34712)
    for data in (bytes(twelve_bit), compression):
        assert refusal(data)[0] is Status.UNSUPPORTED


# --- cases 14 to 17: frames, decoders, shapes


@pytest.mark.parametrize("file_format", ["TIFF", "GIF", "WEBP", "PNG", "AVIF", "MPO"])
def test_case_14_first_frame(file_format: str) -> None:
    first, second = Image.new("RGB", (8, 6), RED), Image.new("RGB", (8, 6), (0, 0, 255))
    data = encode(first, file_format, save_all=True, append_images=[second, first])
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert_close(decode(data), np.full((6, 8, 3), RED, np.uint8))


def test_case_15_heic_and_avif_without_decoder() -> None:
    """In a process of its own, where neither decoder can be imported."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    heic_by_compatible_brand = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(60)
    avif = b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif" + bytes(60)
    program = f"""
import sys
sys.modules["pillow_heif"] = sys.modules["PIL._avif"] = None
from pipeline.errors import ImageError
from pipeline.images import decode_image
for data in {[heic, heic_by_compatible_brand, avif]!r}:
    try:
        decode_image(data, max_pixels=1000)
    except ImageError as error:
        print(error.status, str(error)[:4], str(error).rpartition(" ")[2])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heif, avif_ = "unsupported HEIF 'everymask[heif]'\n", "unsupported AVIF 'pillow>=11.3'\n"
    assert done.stdout == heif + heif + avif_, done.stderr


def test_case_15_avif_with_decoder() -> None:
    assert_close(decode(encode(picture(), "AVIF", quality=95)), picture(), tolerance=12)


def test_case_15_heic_with_decoder() -> None:
    """Upright too: HEIC says itself how it is turned, and its EXIF says it again."""
    assert_close(decode(encode(picture(), "HEIF", quality=95)), picture(), tolerance=12)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encode(picture(), "HEIF", quality=95, exif=exif.tobytes())
    assert_close(decode(turned), np.rot90(picture(), -1), tolerance=12)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (3, 300_000)])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_case_16_thin_images(file_format: str, height: int, width: int) -> None:
    image = np.random.default_rng(16).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode(image, file_format)), image)


def test_case_16_thin_jpegs() -> None:
    for height, width in [(1, 1), (1, 5000), (5000, 1)]:
        assert decode(encode(picture(height, width), "JPEG")).shape == (height, width, 3)


def test_case_17_one_colour() -> None:
    image = np.full((300, 1000, 3), (12, 200, 99), np.uint8)
    np.testing.assert_array_equal(decode(encode(image, "PNG")), image)


# --- everything at once


def test_every_pixel_arrives_in_its_place() -> None:
    """Larger than one band of the copy, with a last band that is not full."""
    image = np.random.default_rng(0).integers(0, 256, (1003, 701, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode(image, "BMP")), image)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 8))):
        # Headers are where the interesting bytes are.
        at = int(rng.integers(0, len(changed) if rng.random() < 0.5 else min(len(changed), 200)))
        changed[at] = int(rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))]))
    if rng.random() < 0.2:
        del changed[int(rng.integers(1, len(changed))) :]
    if rng.random() < 0.2:
        at = int(rng.integers(0, len(changed)))
        changed[at:at] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(changed)


def seeds() -> dict[str, bytes]:
    image = Image.fromarray(picture())
    files = {f: encode(image, f) for f in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000")}
    files["TIFF, compressed"] = encode(image, "TIFF", compression="tiff_deflate", exif=exif(6))
    files["TIFF, JPEG inside"] = encode(image, "TIFF", compression="jpeg")
    files["JPEG, CMYK, EXIF"] = encode(image.convert("CMYK"), "JPEG", exif=exif(5))
    files["PNG, palette"] = encode(image.quantize(16), "PNG", transparency=b"\0\x80", exif=exif(3))
    files["PNG, 16 bits"] = encode(np.arange(960, dtype=np.uint16).reshape(24, 40), "PNG")
    for animated in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        files[f"{animated}, frames"] = encode(image, animated, save_all=True, append_images=[image.rotate(90)])
    return files


@pytest.mark.parametrize("name", seeds())
def test_mutated_files_are_images_or_refused(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    original = seeds()[name]
    refused = 0
    for _ in range(60):
        data = mutated(original, rng)
        try:
            decode(data, 200_000)
        except ImageError as error:
            assert error.status not in {Status.OK, Status.EMPTY}
            refused += 1
    assert refused > 0


def test_eight_threads_at_once() -> None:
    files = [*seeds().values(), b"", b"<html>", encode(picture(), "JPEG", exif=exif(8))] * 10

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode_image(data, max_pixels=10**6).tobytes()
        except ImageError as error:
            return str(error.status)

    alone = [outcome(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == alone


def test_suffixes_are_what_a_listing_compares_with() -> None:
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".tif",
        ".gif",
        ".ppm",
        ".heic",
        ".avif",
    } <= IMAGE_SUFFIXES
    assert not {".json", ".txt", ".svg", ".mp4", ""} & IMAGE_SUFFIXES
