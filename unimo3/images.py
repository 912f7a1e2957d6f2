"""The one rule by which an image becomes RGB: in training, in conversion, in prediction and in the exported processor.

Orientation is applied, alpha and transparency are ignored, 12 and 16 bits become 8, and the first frame is read.

Source: Pillow; EXIF 2.3 and XMP for the orientation.
"""

import io
import itertools
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow reads others too, some of them by starting another program, such as Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pillow's name for a JPEG with several pictures, which it finds out itself.
_JPEG_OF_SEVERAL = "MPO"

# Formats that Pillow gives as integers of 32 bits, with the values of 16.
_SIXTEEN_BITS = ("PPM", "PNG")

# Text files may begin as these do: BMP, PBM and its like.
_AMBIGUOUS = (b"BM", *(b"P%d" % number for number in range(1, 7)))
_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that Pillow reads and no pixel needs.
_COMPRESSED = (b"iCCP", b"zTXt", b"iTXt")
_METADATA = (*_COMPRESSED, b"tEXt", b"pHYs", b"tIME")
# Pillow's limit of a compressed text.
_MAX_METADATA_BYTES = 2**20
# A keyword, a language and a translated keyword.
_NUM_KEYWORDS = 3
# Markers of a JPEG's segments, and the length of Adobe's.
_APPLICATION, _ADOBE, _START_OF_SCAN, _ADOBE_BYTES = range(0xE0, 0xF0), 0xEE, 0xDA, 14
# Where EXIF begins in an AVIF file: an item in the list of items.
_EXIF = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)
_AVIF_STARTS = (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1")

_NUM_CHANNELS = (1, 2, 3, 4)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# An RGB image with these would be rotated again, or get a background.
_APPLIED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency")


def open_image(file: bytes | str | Path) -> Image.Image:
    """Open an image file of one of `FORMATS` by its content; its pixels are not decoded yet.

    Args:
        file: its content, or its path.

    Raises:
        UnidentifiedImageError: it is of no such format.
        OSError, ValueError, SyntaxError: it cannot be read, is damaged, or is larger than Pillow's pixel limit.
    """
    with _by_the_rule():
        file = _without_bad_chunks(file) or file
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        except Exception:  # Pillow meets damaged metadata with errors of any kind
            # Other formats are opened before their metadata is read.
            image = _open_without_segments(file) or _open_without_exif(file)
            if image is None:
                raise
            return image


def _without_bad_chunks(file: bytes | str | Path) -> bytes | None:
    """A PNG without metadata that Pillow would refuse, damaged or large when decompressed; None: it has none."""
    bad: list[tuple[int, int]] = []
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        if opened.read(len(_PNG)) != _PNG:
            return None
        while len(head := opened.read(8)) == 8:
            start, size, kind = opened.tell() - 8, int.from_bytes(head[:4]), head[4:]
            if kind not in _METADATA:
                opened.seek(size + 4, os.SEEK_CUR)
                continue
            content, checksum = opened.read(size), opened.read(4)
            is_damaged = int.from_bytes(checksum) != zlib.crc32(kind + content)
            if is_damaged or (kind in _COMPRESSED and _inflates(content)):
                bad.append((start, start + size + 12))
        if not bad:
            return None
        opened.seek(0)
        complete = opened.read()
    ends = [0, *(end for _, end in bad)]
    return b"".join(complete[end:start] for end, start in zip(ends, [*(start for start, _ in bad), None], strict=True))


def _inflates(content: bytes) -> bool:
    """Whether the compressed end of a chunk is larger than Pillow's limit when decompressed."""
    # It follows keywords that end with a zero; zlib's first byte is an x.
    for match in itertools.islice(re.finditer(rb"\0(?=x)", content), _NUM_KEYWORDS):
        inflate = zlib.decompressobj()
        with suppress(zlib.error):
            if len(inflate.decompress(content[match.end() :], _MAX_METADATA_BYTES + 1)) > _MAX_METADATA_BYTES:
                return True
    return False


def _open_without_segments(file: bytes | str | Path) -> Image.Image | None:
    """A JPEG opened without its metadata; None if it is none, or cannot be opened either.

    Of its application segments, a complete one of Adobe stays, which decides about colours, and EXIF, whose orientation
    may still be readable.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        content = opened.read()
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    parts, position, exif = [content[:2]], 2, b""
    while content[position : position + 1] == b"\xff" and len(content) > position + 4:
        marker, size = content[position + 1], int.from_bytes(content[position + 2 : position + 4])
        if marker == _START_OF_SCAN:
            break
        segment = content[position : position + 2 + size]
        is_adobe = marker == _ADOBE and segment[4:9] == b"Adobe" and size >= _ADOBE_BYTES
        if segment[4:8] == b"Exif":
            exif = segment[4:]
        if marker not in _APPLICATION or is_adobe:
            parts.append(segment)
        position += 2 + size
    try:
        image = Image.open(io.BytesIO(b"".join([*parts, content[position:]])), formats=("JPEG",))
    except Exception:  # of any kind; the first error is reported
        return None
    if exif:
        image.info["exif"] = exif
    return image


def _open_without_exif(file: bytes | str | Path) -> Image.Image | None:
    """An AVIF file opened without its EXIF, outside which it states its orientation; None as for segments."""
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        content = opened.read()
    if content[4:12] not in _AVIF_STARTS or _EXIF.search(content) is None:
        return None
    try:
        return Image.open(io.BytesIO(_EXIF.sub(rb"\1none", content)), formats=("AVIF",))
    except Exception:  # of any kind; the first error is reported
        return None


def is_image(path: Path) -> bool:
    """Whether a file begins as an image of one of `FORMATS` does, or cannot be read, which its decoding reports.

    A text that begins as an image does, such as "BMW", is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            open_image(path).close()
        except UnidentifiedImageError:
            return False
        except OSError as error:
            return error.errno is not None or not _begins_as_text_may(path)
        except Exception:  # damage, which decoders meet with errors of any kind
            return not _begins_as_text_may(path)
    return True


def _begins_as_text_may(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2).startswith(_AMBIGUOUS)


def decode(content: bytes, enough_pixels: int = 0) -> Image.Image:
    """Decode an image file to RGB; see `to_rgb`.

    Args:
        enough_pixels: a JPEG whose height and width are at least 2, 4 or 8 times as many is decoded at a half, a
            quarter or an eighth of its size, which is several times as fast. 0: every image is decoded in full.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, is cut off, or is larger than Pillow's bomb limit.
    """
    try:
        image = open_image(content)
        if enough_pixels and image.format in ("JPEG", _JPEG_OF_SEVERAL):
            image.draft(None, (enough_pixels, enough_pixels))
        return to_rgb(image)
    except UnidentifiedImageError as error:
        # Pillow's message contains the address of an object.
        raise ValueError("it is no image of a known kind") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, upright by its EXIF or XMP.

    - An orientation that cannot be read is ignored, as is alpha: the stored colours are used.
    - Grey of 12 or 16 bits is scaled to 8; integers whose white is unknown, and floating-point numbers, are refused.

    The result can be given to this function again, and stays as it is.

    Raises:
        ValueError: the image is of another format than `FORMATS`, its pixels cannot be converted, or it is larger than
            Pillow's pixel limit.
        OSError, SyntaxError: it is damaged.
    """
    if image.format not in (None, *FORMATS, _JPEG_OF_SEVERAL):
        raise ValueError(f"it is a {image.format} file; one of {', '.join(FORMATS)} is needed")
    limit, num_pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and num_pixels > limit:  # Pillow looks at files alone
        raise ValueError(f"Image size ({num_pixels} pixels) exceeds limit of {limit} pixels")
    with _by_the_rule():
        image.load()  # Pillow turns a TIFF here
        turn = _UPRIGHT.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I"):
            upright = _grey_of_8_bits(upright, image)
        elif upright.mode == "F":
            raise ValueError("its pixels are floating-point numbers; scale them to 8 bits")
        rgb = upright.convert("RGB")
    for name in _APPLIED:
        rgb.info.pop(name, None)
    return rgb


def image_of_array(array: np.ndarray, layout: str | None = None) -> Image.Image:
    """An array as an image that `to_rgb` takes.

    Args:
        array: [H, W], [H, W, C] or [C, H, W], with C of 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA). Integers
            from 0 to 255, of uint16 from 0 to 65535, or booleans.
        layout: ``channels_first`` or ``channels_last``; needed where the shape does not decide it.

    Raises:
        ValueError: its shape or its values are not those of an image.
    """
    rows = _channels_last(array, layout)
    if rows.dtype.kind == "b":
        rows = rows.astype(np.uint8) * np.uint8(255)
    elif rows.dtype.kind not in "iu":
        raise ValueError(
            f"an array's values are {array.dtype}; integers from 0 to 255 are needed, or RGB from 0 to 1 with "
            "do_rescale=False"
        )
    if rows.dtype == np.uint16:
        if rows.ndim == 2:
            return Image.fromarray(np.ascontiguousarray(rows))  # `to_rgb` scales it
        rows = rows >> 8  # as Pillow reads colours of 16 bits
    if rows.min() < 0 or rows.max() > 255:
        raise ValueError(f"an array's values reach from {rows.min()} to {rows.max()}; from 0 to 255 are needed")
    return Image.fromarray(np.ascontiguousarray(rows, dtype=np.uint8))


def _channels_last(array: np.ndarray, layout: str | None) -> np.ndarray:
    """An image's array as [H, W] or [H, W, C]."""
    rows = array
    if array.ndim == 3:
        is_first, is_last = (array.shape[axis] in _NUM_CHANNELS for axis in (0, -1))
        if layout is None and is_first and is_last:
            raise ValueError(
                f"an array of shape {list(array.shape)}: its channels may be first or last; give input_data_format, "
                "channels_first or channels_last"
            )
        if layout == "channels_first" or (layout is None and is_first):
            rows = np.moveaxis(array, 0, -1)
        rows = rows[..., 0] if rows.shape[-1] == 1 else rows
    if rows.ndim not in (2, 3) or not rows.size or (rows.ndim == 3 and rows.shape[-1] not in _NUM_CHANNELS):
        raise ValueError(f"an array of shape {list(array.shape)} is no image; [H, W], [H, W, C] or [C, H, W] is needed")
    return rows


def _grey_of_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits as 8 bits; Pillow's own conversion would cut at 255 and leave white.

    Args:
        file: the image as it was opened, with the fields of a TIFF.

    Raises:
        ValueError: its pixels are signed or have 32 bits, so nobody knows which value is white.
    """
    if image.mode == "I" and file.format not in _SIXTEEN_BITS:
        raise ValueError("its pixels are integers that are signed or of more than 16 bits; scale them to 8")
    fields = getattr(file, "tag_v2", None)  # of a TIFF
    white = 65535 if fields is None else 2 ** fields[ExifTags.Base.BitsPerSample][0] - 1
    grey = np.asarray(image, dtype=np.float32) / (white / 255)
    if fields is not None and fields.get(ExifTags.Base.PhotometricInterpretation, 0) == 0:
        grey = 255 - grey  # white is zero, which Pillow knows for 8 bits alone
    return Image.fromarray(grey.round().astype(np.uint8))


@contextmanager
def _by_the_rule() -> Iterator[None]:
    """Ignore Pillow's warnings of damaged EXIF, and of palettes with transparency; that of a bomb is a ValueError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise  # the machine's error, not the image's
    except Exception:  # Pillow meets damaged EXIF with errors of any kind
        return None
