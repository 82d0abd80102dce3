"""Pictures in and out: opening whatever a visitor brings, and marking what the model made.

Everything after this module sees RGB uint8 (H, W, 3), upright, of a bounded size. A picture's header is
judged before its pixels are decoded, so that a small file cannot unfold into gigabytes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import escape

import numpy as np
import pi_heif
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from facesnap.errors import InputError

pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)  # what iPhones send

# What a stranger may hand us: the formats of cameras, phones and the web, and nothing that Pillow runs as a
# program.
FORMATS = ("JPEG", "HEIF", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
# How their files are called, by which folders of photographs are searched
ENDINGS = tuple(".jpg .jpeg .heic .heif .png .webp .gif .bmp .tif .tiff .avif .jp2".split())
MAX_PIXELS = 51_000_000  # a phone's 50 megapixels are 8192 × 6144
MAX_PIXELS_SHRUNK = 65_000_000  # of a JPEG, which is decoded at a part of its size: 64 megapixels are 9280 × 6944

DAMAGED = "The picture is damaged or cut short: save or upload it again."
SRGB = ImageCms.createProfile("sRGB")
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {  # what brings a picture of that EXIF orientation upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def open_image(
    source: str | Path | bytes | Image.Image | np.ndarray,
    *,
    max_pixels: int | None = None,
    max_side: int = 2048,
) -> np.ndarray:
    """Open a picture as sRGB uint8 (H, W, 3), upright, its longer side at most `max_side` pixels.

    `source` is a file name, a file's bytes, a PIL picture, or an array: grey (H, W) or (H, W, 1), RGB (H, W,
    3) or RGBA (H, W, 4), uint8, uint16 (full range) or floats in [0, 1]. The EXIF orientation and the colour
    profile are applied, transparency is laid over white, CMYK, palettes and 16 bits are converted. Of an
    animation the first picture is taken.

    Raises `InputError` if it is no picture, is damaged, or has more than `max_pixels` pixels: by default
    `MAX_PIXELS`, or `MAX_PIXELS_SHRUNK` where the format can be decoded at a part of its size."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(_eight_bits(source))
    if isinstance(source, Image.Image):
        return _finish(source, max_pixels or MAX_PIXELS, max_side)
    if isinstance(source, (str, Path)):
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            name = Path(source).name[-60:]
            raise InputError(f"The picture {name!r} cannot be read: give an existing image file.") from error
    elif isinstance(source, bytes):
        data = source
    else:
        raise InputError(f"A picture cannot be a {type(source).__name__}: give a file's name, its bytes or an array.")
    if not data:
        raise InputError("The picture's file is empty: upload it again.")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # a Pillow may be built without AVIF
    with _decoding():
        try:
            opened = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:  # also said of a picture whose header is damaged
            begins = any(accept and accept(data[:16]) is True for _, accept in (Image.OPEN[f] for f in formats))
            unknown = "This file is not a picture we can read: use JPEG, HEIC, PNG or WebP."
            raise InputError(DAMAGED if begins else unknown) from error
    with opened:
        most = max_pixels or (MAX_PIXELS_SHRUNK if _shrinks(opened, max_side) else MAX_PIXELS)
        return _finish(opened, most, max_side, opened_here=True)


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder raises on damaged data becomes one sentence: the errors share no ancestor but this."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own guard, at 179 million pixels
        raise InputError(_too_many("far too many", MAX_PIXELS)) from error
    except Exception as error:
        raise InputError(DAMAGED) from error


def _shrinks(picture: Image.Image, max_side: int) -> bool:
    """Whether a file can be decoded at a half of its size or less and still be `max_side` large."""
    return picture.format in ("JPEG", "MPO") and max(picture.size) > 2 * max_side


def _too_many(size: str, max_pixels: int) -> str:
    return f"The picture has {size} pixels; at most {max_pixels / 1e6:g} million are allowed: make it smaller."


def _finish(picture: Image.Image, max_pixels: int, max_side: int, *, opened_here: bool = False) -> np.ndarray:
    width, height = picture.size
    if width * height > max_pixels:
        raise InputError(_too_many(f"{width} × {height}", max_pixels))
    if width < 1 or height < 1:
        raise InputError(f"The picture is {width} × {height} pixels: there is nothing in it.")
    with _decoding():
        if opened_here and _shrinks(picture, max_side):
            picture.draft("RGB", (max_side, max_side))  # decode at a half or less: never below max_side
        turn = _turn(picture, own=opened_here)
        plain = _plain(picture)  # Pillow decodes only now
        if max(plain.size) > max_side:
            plain = plain.copy() if plain is picture else plain
            plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        rgb = _srgb(plain, picture.info.get("icc_profile"))
        return np.array(rgb if turn is None else rgb.transpose(turn), dtype=np.uint8)


def _turn(picture: Image.Image, *, own: bool) -> Image.Transpose | None:
    """What brings the picture upright. EXIF is only read: writing it anew, as Pillow's `exif_transpose` does,
    fails on tags that no writer should have written, such as a brightness of −1/0."""
    if not own:
        picture.load()  # Pillow turns a TIFF while it decodes; the mark is gone then
    try:
        exif = picture.getexif()
        # taken out of a picture of ours, so that Pillow does not turn it as well
        return UPRIGHT.get(exif.pop(ORIENTATION, 1) if own else exif.get(ORIENTATION, 1))
    except Exception:  # EXIF so damaged that it cannot be parsed says nothing; the pixels may be whole
        return None


def _plain(picture: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel in a mode that can be resized and has a colour space: L, RGB, CMYK, LAB,
    or LA and RGBA where some of it is transparent."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":  # 16-bit grey, or 32 bits that hold 16 or 8
        values = np.asarray(picture).astype(np.float64)
        if not np.isfinite(values).all():
            raise InputError("The picture has values that are no numbers: save it again with 8 bits a channel.")
        most = values.max(initial=0)
        top = 65535.0 if mode.startswith("I;16") or most > 255 else 255.0
        if mode == "F" and most <= 1:
            top = 1.0
        return Image.fromarray(np.clip(values * 255 / top + 0.5, 0, 255).astype(np.uint8))
    if mode == "La":  # Pillow knows one way only from premultiplied grey
        return picture.convert("LA")
    if mode in ("LA", "RGBA", "PA", "RGBa") or "transparency" in picture.info:
        return picture.convert("LA" if mode == "LA" else "RGBA")
    return picture if mode in ("L", "RGB", "CMYK", "LAB") else picture.convert("RGB")


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture in one of `_plain`'s modes → RGB over white, its colours those of the profile it came with."""
    alpha = picture.getchannel("A") if picture.mode in ("LA", "RGBA") else None
    if alpha is not None:
        picture = picture.convert(picture.mode[:-1])
    if picture.mode == "LAB":
        rgb = _through(ImageCms.createProfile("LAB"), picture)
    else:
        rgb = _profiled(picture, profile) if profile else picture.convert("RGB")
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _profiled(picture: Image.Image, profile: bytes) -> Image.Image:
    try:
        return _through(ImageCms.ImageCmsProfile(io.BytesIO(profile)), picture)
    except (ImageCms.PyCMSError, OSError):  # a profile that is damaged, or of other channels, says nothing
        return picture.convert("RGB")


def _through(profile: Any, picture: Image.Image) -> Image.Image:
    made = ImageCms.profileToProfile(picture, profile, SRGB, outputMode="RGB")
    assert made is not None  # it is only where the picture is changed in place
    return made


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """uint8 (H, W), (H, W, 3) or (H, W, 4) of the array forms `open_image` takes."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise InputError(f"An array of shape {array.shape} is no picture: give (H, W), (H, W, 3) or (H, W, 4).")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) * 255 // 65535).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(np.min(array)), float(np.max(array))
        if not (low >= 0.0 and high <= 1.0):  # also true of NaN
            raise InputError(f"A float picture must lie in [0, 1], this one runs from {low:g} to {high:g}: rescale it.")
        return (array * 255 + 0.5).astype(np.uint8)
    raise InputError(f"An array of {array.dtype} is no picture: give uint8, uint16 or floats in [0, 1].")


def save_png(image: np.ndarray | Image.Image, target: str | Path | BinaryIO, *, info: dict[str, str]) -> None:
    """Write a generated picture as PNG, marked as made by a model.

    `info` (prompt, seed, model …) goes into text chunks, one a key; an XMP packet says the same as IPTC's
    digital source type does: trainedAlgorithmicMedia, which is what sites and search engines look for."""
    chunks = PngInfo()
    for key, value in info.items():
        chunks.add_itxt(key, str(value))
    chunks.add_itxt("XML:com.adobe.xmp", _xmp(info.get("Software", "FaceSnap")))
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(target, format="PNG", pnginfo=chunks)


def _xmp(tool: str) -> str:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/">'
        f"<Iptc4xmpExt:DigitalSourceType>{TRAINED_ALGORITHMIC_MEDIA}</Iptc4xmpExt:DigitalSourceType>"
        f"<xmp:CreatorTool>{escape(tool)}</xmp:CreatorTool>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
