"""`pipeline.images` on what is no image, damaged, or too much of one: refused with a reason, never a crash."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from image_files import decode, encode, exif, picture, refusal, tiff
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images import decode_image
from schemas.masks import Status

# The module tells Pillow to be quiet about odd metadata; pytest's own filters come before the module's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


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


def test_unknown_kinds_of_known_formats_are_unsupported() -> None:
    twelve_bit = bytearray(encode(picture(), "JPEG"))
    twelve_bit[twelve_bit.index(b"\xff\xc0") + 4] = 12
    compression = tiff(np.zeros((2, 2, 1), np.uint8), photometric=1, compression=34712)
    for data in (bytes(twelve_bit), compression):
        assert refusal(data)[0] is Status.UNSUPPORTED


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
