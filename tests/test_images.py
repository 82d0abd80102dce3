"""Opening: what a visitor brings becomes upright RGB of bounded size, or a sentence saying what is wrong."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from facesnap.errors import InputError
from facesnap.images import open_image, save_png

# 64 × 32, red on the left, as HEIC; its EXIF says "on its side", which counts for nothing beside the container's word
HEIC = zlib.decompress(base64.b85decode(
    "c-muNV30{GsVvAy%}izhg51nBLl8SRGck>UfpK4MYDppk1Sn>t<P<^K3<a6VB@Af5Br_);Y>0~k0}}%yh{gB_LIXiOPz(r|9N{7=Kx~njnU@CUfn"
    "-I2oK&zfpqh-bWJ3ldK}L`g*NRNAa=wDhl3WI;N`}9g1w{ow`fg@Haz2nQ1L}2VWCjUM04tLF!0_kqj~@&S{LBeJ9TE<VJdFSUgA_1>R4{{(+%6`"
    "EM4+UW6C)#<%mRf*)@iSvEZez*Bf~%eD8vjR7!;F$%Gq2P4;CNj1X?1ToS##amz+}p6y;@LYXAy~WEK~sLcQw%#Tv;ui3LzL$ngqL8XO4!|Nnmg4"
    "Ge*T%!*8qATtLC2auA;EXak$1tS9^Ya<ggYYUJqm06UU1{LQ^PAN_X2R_Ke?%b3_P%K4jFs>JF_^RG$|Np^X_y33YRn$qA8ruImr>gub<mvw>SFh"
    "(W{on9@@%rWGAHUgTs-L55dw%k>?RgP5xGVonda>L+K3Y`JNcV51=;7@Kf8t)wa8#bPfRVNH&Z?gv$Fe~p#n+cX3&`VOU}O{mg&QbrAg%%c>NSOB"
))  # fmt: skip

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


def test_heic_is_read():
    opened = open_image(HEIC)
    assert opened.shape == (32, 64, 3) and near(opened[16, 5], RED) and near(opened[16, 60], BLUE)


def odd_exif():
    """EXIF of a picture that lies on its side, with values whose types no standard allows (TIFF 6.0's layout)."""
    entries = [
        struct.pack("<HHIf", 0x0100, 11, 1, 20.5),  # ImageWidth as a float
        struct.pack("<HHIHxx", 0x0112, 3, 1, 6),  # Orientation
        struct.pack("<HHI4s", 0x011A, 2, 4, b"72d"),  # XResolution as text
        struct.pack("<HHII", 0x8769, 4, 1, 8 + 2 + 4 * 12 + 4),  # where the next list begins
    ]
    brightness = struct.pack("<HHHII", 1, 0x9203, 10, 1, 62 + 2 + 12 + 4)  # and where its value lies
    first = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + brightness + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "MPO", "TIFF"])
def test_tags_that_cannot_be_written_again_do_not_stop_the_reading(kind):
    if kind == "TIFF":  # whose EXIF is the file itself
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(picture(), kind, exif=exif, dpi=(72, 72))
        resolution = struct.pack("<HHI", 0x011A, 5, 1)
        assert resolution in data
        data = data.replace(resolution, struct.pack("<HHI", 0x011A, 2, 1))  # a text now
    else:
        data = encoded(picture(), kind, exif=odd_exif())
    opened = open_image(data)
    assert opened.shape == (40, 20, 3) and near(opened[5, 10], RED, 40) and near(opened[35, 10], BLUE, 40)
    with Image.open(io.BytesIO(data)) as lazy:
        assert open_image(lazy).shape == (40, 20, 3) or kind == "TIFF"


def test_exif_that_cannot_be_parsed_says_nothing():
    exif = b"Exif\0\0MM\0*" + b"\xff" * 40
    assert open_image(encoded(picture(), "JPEG", exif=exif)).shape == (20, 40, 3)


def icc_profile(primaries, gamma):
    """A colour profile by its primaries' XYZ (3, 3), one a row, adapted to D50, and one gamma (ICC.1:2001, 6.3)."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz((0.9642, 1, 0.8249))}
    for name, row in zip("rgb", primaries, strict=True):
        tags |= {name.encode() + b"XYZ": xyz(row), name.encode() + b"TRC": curve}
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", 132 + 12 * len(tags) + len(body), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
PROPHOTO = ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249))


@pytest.mark.parametrize(("primaries", "gamma"), [(P3, 2.2), (PROPHOTO, 1.8)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_of_the_profile(primaries, gamma, mode):
    """Skin, stored as another colour space writes it, comes out as sRGB writes it."""
    skin = np.array([224, 172, 140])
    linear = np.where(skin > 10.3, ((skin / 255 + 0.055) / 1.055) ** 2.4, skin / 3294.6)
    srgb = np.array(((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)))  # at D50
    stored = np.linalg.solve(np.array(primaries).T, srgb.T @ linear) ** (1 / gamma) * 255
    image = Image.new(mode, (8, 8), tuple(stored.round().astype(int)) + (255,) * (mode == "RGBA"))
    assert np.abs(stored - skin).max() > 6
    assert near(open_image(encoded(image, icc_profile=icc_profile(primaries, gamma)))[4, 4], skin, 3)


def test_a_profile_for_other_channels_or_damaged_changes_nothing():
    grey = Image.new("L", (8, 8), 100)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile"):
        assert open_image(encoded(grey, "JPEG", quality=95, icc_profile=profile))[4, 4].tolist() == [100, 100, 100]


MODES = [
    "1",
    "P",
    "L",
    "LA",
    "La",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "F",
    "I;16",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_a_picture(mode):
    given = Image.new(mode, (60, 30))
    assert open_image(given).shape == (30, 60, 3)
    assert open_image(given, max_side=20).shape == (10, 20, 3)
    assert given.size == (60, 30)


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


@pytest.mark.parametrize(
    ("kind", "size", "passes"),
    [
        ("JPEG", (9280, 6944), True),  # 64 megapixels, decoded at a quarter
        ("PNG", (8192, 6144), True),  # 50 megapixels
        ("PNG", (9280, 6944), False),
        ("JPEG", (12000, 9000), False),
    ],
)
def test_what_phones_send_passes_and_more_is_refused(kind, size, passes, monkeypatch):
    """Only the header is as large as it says: what passes fails at decoding, in other words."""
    data = encoded(picture(), kind)
    marker, order = (b"IHDR", slice(None)) if kind == "PNG" else (b"\xff\xc0\x00\x11\x08", slice(None, None, -1))
    at = data.index(marker) + len(marker)
    sides = struct.pack(">II" if kind == "PNG" else ">HH", *size[order])
    data = data[:at] + sides + data[at + len(sides) :]
    if kind == "PNG":
        data = data[: at + 13] + struct.pack(">I", zlib.crc32(data[at - 4 : at + 13])) + data[at + 17 :]
    monkeypatch.setattr(Image.Image, "load", lambda self: (_ for _ in ()).throw(OSError("decoding begins")))
    with pytest.raises(InputError, match="damaged" if passes else f"{size[0]} × {size[1]} pixels; at most"):
        open_image(data)


def test_huge_picture_is_refused_before_it_is_decoded():
    """A header that promises 12000 × 12000, and no pixels: decoding would fail with another message."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"12000 × 12000 pixels.*51 million"):
        open_image(bomb)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # here Pillow's own guard speaks first
    with pytest.raises(InputError, match="51 million"):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"GIF in name only", "not a picture"),
        (encoded(picture(), "EPS"), "not a picture"),
        (encoded(picture(200, 200))[:200], "damaged or cut short"),
        (encoded(picture(200, 200), "JPEG")[:900], "damaged or cut short"),
        (encoded(picture(200, 200), "AVIF")[:-40], "."),
        (HEIC[:-40], "damaged or cut short"),
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
        (np.zeros((7200, 7200), np.uint8), "7200 × 7200"),
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
