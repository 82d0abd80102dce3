"""Opening: what a visitor brings becomes upright RGB of bounded size, or a sentence saying what is wrong."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from facesnap.errors import InputError
from facesnap.images import open_image, save_png

RED, BLUE = (200, 30, 20), (20, 40, 210)


def picture(width=40, height=20):
    """Red on the left, blue on the right."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = RED, BLUE
    return Image.fromarray(array)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel, colour, tolerance=12):
    return np.abs(pixel.astype(int) - colour).max() <= tolerance


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = picture()
    (tmp_path / "a.png").write_bytes(encoded(image))
    opened = [
        open_image(source)
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image, np.array(image))
    ]
    for other in opened:
        assert other.dtype == np.uint8 and other.shape == (20, 40, 3)
        assert np.array_equal(other, opened[0])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_read(kind):
    opened = open_image(encoded(picture(), kind))
    assert near(opened[10, 5], RED, 25) and near(opened[10, 35], BLUE, 25)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_tiffs_of_every_range_keep_their_brightness(white):
    grey = np.array([[0.0, 0.25, 1.0]] * 3, np.float32) * white
    opened = open_image(encoded(Image.fromarray(grey), "TIFF"))
    assert np.abs(opened[0, :, 0].astype(float) - [0, 64, 255]).max() <= 1


def test_a_float_tiff_with_holes_is_refused():
    grey = np.array([[0.0, np.nan]], np.float32)
    with pytest.raises(InputError, match="no numbers: save it again with 8 bits"):
        open_image(encoded(Image.fromarray(grey), "TIFF"))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees, clockwise
    opened = open_image(encoded(picture(), "JPEG", exif=exif, quality=95))
    assert opened.shape == (40, 20, 3)
    assert near(opened[5, 10], RED) and near(opened[35, 10], BLUE)


def test_cmyk_becomes_rgb():
    opened = open_image(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    assert near(opened[10, 5], RED) and near(opened[10, 35], BLUE)


def test_sixteen_bits_keep_their_brightness():
    grey = np.full((8, 8), 32768, np.uint16)
    for source in (encoded(Image.fromarray(grey)), grey):
        assert near(open_image(source)[4, 4], (128, 128, 128), 1)


def test_palette_and_transparency_lie_over_white():
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.r_[np.zeros((10, 40), np.uint8), np.full((10, 40), 255, np.uint8)]))
    opened = open_image(encoded(clear))
    assert near(opened[2, 5], (255, 255, 255), 0) and near(opened[15, 5], RED, 0)
    paletted = picture().convert("P", dither=Image.Dither.NONE)
    opened = open_image(encoded(paletted, transparency=paletted.getpixel((0, 0))))
    assert near(opened[2, 5], (255, 255, 255), 0) and near(opened[2, 35], BLUE, 30)


def test_grey_and_float_arrays_are_pictures():
    assert open_image(np.full((4, 6), 7, np.uint8)).tolist() == np.full((4, 6, 3), 7).tolist()
    assert open_image(np.full((4, 6, 1), 7, np.uint8)).shape == (4, 6, 3)
    assert open_image(np.full((4, 6, 3), 0.5)).max() == 128


def test_long_side_is_bounded_and_shape_kept():
    opened = open_image(encoded(picture(400, 200)), max_side=100)
    assert opened.shape == (50, 100, 3)
    assert near(opened[25, 5], RED, 2) and near(opened[25, 95], BLUE, 2)
    large = open_image(encoded(picture(1000, 500), "JPEG", quality=95), max_side=100)  # JPEG's own shrinking
    assert large.shape == (50, 100, 3) and near(large[25, 5], RED)


def test_the_given_picture_is_left_alone():
    image = picture(400, 200)
    open_image(image, max_side=100)
    assert image.size == (400, 200)


def test_huge_picture_is_refused_before_it_is_decoded():
    """A header that promises 12000 × 12000, and no pixels: decoding would fail with another message."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"12000 × 12000 pixels.*25 million"):
        open_image(bomb)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # here Pillow's own guard speaks first
    with pytest.raises(InputError, match="25 million"):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"GIF in name only", "not a picture"),
        (encoded(picture(), "EPS"), "not a picture"),
        (encoded(picture(200, 200))[:200], "damaged or cut short"),
        (encoded(picture(200, 200), "JPEG")[:900], "damaged or cut short"),
        ("no/such/secret_folder/me.png", "'me.png' cannot be read"),
        (12, "cannot be a int"),
        (io.BytesIO(b"a file"), "cannot be a BytesIO: give a file's name, its bytes or an array"),
        ("no\0name.png", "cannot be read: give an existing image file"),
        (Image.new("RGB", (0, 5)), "0 × 5 pixels: there is nothing in it"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "is no picture"),
        (np.full((4, 4, 3), 255.0), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((5001, 5001), np.uint8), "5001 × 5001"),
    ],
)
def test_refusals_are_one_sentence_with_a_remedy(source, message):
    with pytest.raises(InputError, match=message) as refused:
        open_image(source)
    assert "\n" not in str(refused.value) and "secret_folder" not in str(refused.value)
    assert ":" in str(refused.value) and str(refused.value).endswith(".")


def test_a_lazily_opened_picture_that_is_cut_short_is_refused_too():
    with pytest.raises(InputError, match="damaged"):
        open_image(Image.open(io.BytesIO(encoded(picture(200, 200), "JPEG")[:900])))


def test_saved_png_says_that_a_model_made_it(tmp_path):
    image = np.array(picture())
    save_png(image, tmp_path / "out.png", info={"prompt": "a person, façade & <b>", "seed": "7"})
    with Image.open(tmp_path / "out.png") as saved:
        assert np.array_equal(np.array(saved), image)
        assert saved.text["prompt"] == "a person, façade & <b>" and saved.text["seed"] == "7"
        assert "trainedAlgorithmicMedia" in saved.text["XML:com.adobe.xmp"]
