"""`pipeline.images` on every kind of pixel: inks, palettes, transparency, bit depths, bands."""

import struct
import zlib

import numpy as np
import pytest
from image_files import RED, Array, assert_close, decode, encode, picture, refusal, tiff
from PIL import Image, ImageChops, ImageCms

from schemas.masks import Status

# The module tells Pillow to be quiet about odd metadata; pytest's own filters come before the module's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

WHITE = (255, 255, 255)


def png(raw_rows: list[bytes], width: int, depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any bit depth, which Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, len(raw_rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in raw_rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


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
