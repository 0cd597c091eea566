"""`pipeline.images` on real image bytes. Cases are numbered as in the list of what everymask must survive."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from image_files import RED, assert_close, decode, encode, exif, picture
from PIL import ExifTags, Image

from pipeline.images import IMAGE_SUFFIXES

# The module tells Pillow to be quiet about odd metadata; pytest's own filters come before the module's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_case_04_content_decides(file_format: str) -> None:
    """There is no name to be misled by: every format is known by its bytes."""
    image = np.zeros((5, 7, 3), np.uint8)
    image[:, 4:] = RED
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(image, file_format, **lossless)), image)


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


def test_every_pixel_arrives_in_its_place() -> None:
    """Larger than one band of the copy, with a last band that is not full."""
    image = np.random.default_rng(0).integers(0, 256, (1003, 701, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode(image, "BMP")), image)


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
