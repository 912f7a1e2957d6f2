"""The rule by which an image becomes RGB: orientation, alpha, depth, and which files are images at all."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from tests.data.conftest import saved
from unimo3.images import FORMATS, decode, is_image, open_image, to_rgb

BYTE, ASCII, SHORT, UNDEFINED = 1, 2, 3, 7
ORIENTATION, X_RESOLUTION, IMAGE_WIDTH = 0x0112, 0x011A, 0x0100
INCHES = (0x0128, SHORT, 1, b"\2\0")
ROTATED_6 = (ORIENTATION, SHORT, 1, struct.pack("<H", 6))


def noise(width: int = 30, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def exif_of(*entries: tuple[int, int, int, bytes], number: int | None = None) -> bytes:
    """EXIF as a TIFF with these entries (tag, type, count, value), however wrong."""
    listed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries) if number is None else number) + listed + bytes(4)
    return b"Exif\0\0" + tiff


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation=\"6\"/></x:xmpmeta>"
# Whether the image is to be turned.
EXIF = {
    "is no TIFF": (exif_of()[:6] + b"no TIFF at all", False),
    "is empty": (b"Exif\0\0", False),
    "ends within its list": (exif_of((IMAGE_WIDTH, SHORT, 1, b"\1\0"), number=900)[:-6], False),
    "has a text as orientation": (exif_of((ORIENTATION, ASCII, 2, b"6")), False),
    "has an orientation of 9": (exif_of((ORIENTATION, SHORT, 1, b"\x09\0")), False),
    "has orientations of a wrong type": (exif_of((ORIENTATION, 99, 70000, b"\xff\xff\xff\xff")), False),
    "has a resolution in ASCII": (exif_of(ROTATED_6, (X_RESOLUTION, ASCII, 4, b"72\0\0")), True),
    "has a resolution of no numbers": (exif_of(ROTATED_6, (X_RESOLUTION, UNDEFINED, 1, b"7"), INCHES), True),
    "has a resolution without a denominator": (exif_of((X_RESOLUTION, BYTE, 1, b"7"), INCHES), False),
    "has a width that is undefined": (exif_of((IMAGE_WIDTH, UNDEFINED, 4, b"\1\2\3\4"), ROTATED_6), True),
    "has a width of no known type": (exif_of((IMAGE_WIDTH, 60, 4, b"\1\2\3\4"), ROTATED_6), True),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("what", EXIF)
def test_exif_costs_no_image_and_turns_where_it_can_be_read(what, kind):
    exif, is_turned = EXIF[what]
    content = saved(noise(), kind, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Image.open(io.BytesIO(saved(noise(), kind))).convert("RGB")
        warnings.simplefilter("error")
        actual = decode(content)
    assert pixels(actual) == pixels(plain.transpose(Image.Transpose.ROTATE_270) if is_turned else plain)
    assert pixels(to_rgb(actual)) == pixels(actual)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_an_avif_with_damaged_exif_has_the_files_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION], exif[270] = orientation, "a dog"
    content = saved(noise(), "AVIF", exif=exif)
    undamaged = decode(content)
    assert undamaged.size == ((30, 20) if orientation == 1 else (20, 30))
    start = content.index(b"MM\0*")
    for position in range(start - 6, start + 30):
        for value in (0, 0xFF):
            damaged = bytearray(content)
            damaged[position] = value
            assert pixels(decode(bytes(damaged))) == pixels(undamaged), position
    path = tmp_path / "a.avif"
    path.write_bytes(content.replace(b"MM\0*", b"no T"))
    with pytest.raises(ValueError, match="Invalid Exif payload"):
        Image.open(path)
    assert is_image(path)
    assert pixels(to_rgb(open_image(path))) == pixels(undamaged)
    with pytest.raises(ValueError, match="Invalid Exif payload"):
        decode(path.read_bytes().replace(b"ftyp", b"ftyq", 1).replace(b"ftyq", b"ftyp")[: len(content) // 2])


def test_an_orientation_in_xmp_is_applied_once():
    content = saved(noise(), "JPEG", xmp=XMP)
    actual = decode(content)
    assert pixels(actual) == pixels(
        Image.open(io.BytesIO(content)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    )
    assert pixels(to_rgb(actual)) == pixels(actual)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P", "1"])
def test_a_tiff_is_turned_once_in_every_mode(orientation, mode):
    image = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000) if mode == "I;16" else noise(3, 2)
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned, plain = (decode(saved(image, "TIFF", **options)) for options in ({"exif": exif}, {}))
    method = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    assert pixels(turned) == pixels(plain if method is None else plain.transpose(method))


def test_alpha_is_ignored_and_sixteen_bits_become_eight():
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    for kind in ("PNG", "TIFF"):
        assert decode(saved(clear, kind)).getpixel((0, 0)) == (10, 20, 30)
    assert decode(saved(Image.new("LA", (2, 2), (40, 0)), "PNG")).getpixel((0, 0)) == (40, 40, 40)
    keyed = decode(saved(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert keyed.getpixel((0, 0)) == (1, 2, 3)
    assert keyed.info == {}
    deep = Image.fromarray(np.asarray([[0, 257 * 7], [65535, 300]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.asarray(decode(saved(deep, kind)))[..., 2].tolist() == [[0, 7], [255, 1]]


PHOTOMETRIC, SAMPLE_FORMAT = 0x0106, 0x0153
UNSIGNED, SIGNED, FLOATING = 1, 2, 3


def grey_tiff(
    values: list[int], bits: int, white_is_zero=False, sample_format=UNSIGNED, order="<", deflated=False
) -> bytes:
    """A TIFF of one row of grey values."""
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values)
        content = int(packed, 2).to_bytes(len(packed) // 8)
    else:
        content = np.asarray(values).astype(f"{order}{'_uif'[sample_format]}{bits // 8}").tobytes()
    content = zlib.compress(content) if deflated else content
    facts = {256: len(values), 257: 1, 258: bits, 259: 8 if deflated else 1, PHOTOMETRIC: 0 if white_is_zero else 1}
    facts |= {273: 8, 277: 1, 278: 1, 279: len(content), SAMPLE_FORMAT: sample_format}
    entries = b"".join(struct.pack(f"{order}HHIHxx", tag, SHORT, 1, value) for tag, value in facts.items())
    start = 8 + len(content) + len(content) % 2
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return (head + content).ljust(start, b"\0") + struct.pack(f"{order}H", len(facts)) + entries + bytes(4)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (8, {}),
        (8, {"white_is_zero": True}),
        (12, {}),
        (16, {}),
        (16, {"white_is_zero": True}),
        (16, {"order": ">"}),
    ],
)
def test_black_grey_and_white_stay_at_every_depth_of_a_tiff(bits, options, deflated):
    white = 2**bits - 1
    values = [0, white // 3, white * 2 // 5, white]
    if options.get("white_is_zero"):
        values = [white - value for value in values]
    content = grey_tiff(values, bits, deflated=deflated, **options)
    assert pixels(decode(content)) == [[[value] * 3 for value in (0, 85, 102, 255)]]


@pytest.mark.parametrize("maximum", [255, 1000, 4095, 65535])
def test_a_pgm_is_scaled_by_its_maximum(maximum):
    values = [0, maximum // 5, maximum]
    content = np.asarray(values, dtype="u1" if maximum < 256 else ">u2").tobytes()
    assert pixels(decode(b"P5 3 1 %d\n" % maximum + content))[0] == [[value] * 3 for value in (0, 51, 255)]


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "order"),
    [
        ([0, 200], 32, UNSIGNED, "<"),
        ([0, 60000], 32, SIGNED, "<"),
        ([0, 60000], 32, SIGNED, ">"),
        ([0, 1], 32, FLOATING, "<"),
        ([0, 32767], 16, SIGNED, "<"),
        ([-5, 200], 16, SIGNED, ">"),
    ],
)
def test_grey_values_without_a_known_white_are_refused(values, bits, sample_format, order):
    with pytest.raises(ValueError, match="scale them to 8"):
        decode(grey_tiff(values, bits, sample_format=sample_format, order=order))


@pytest.mark.parametrize("mode", ["F", "I"])
@pytest.mark.parametrize("value", [0, 1, 200, 70000])
def test_numbers_beyond_sixteen_bits_are_refused(mode, value):
    with pytest.raises(ValueError, match="scale them to 8"):
        to_rgb(Image.new(mode, (2, 2), value))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "content", [POSTSCRIPT, saved(noise(), "ICO"), saved(noise(), "PCX"), b"%PDF-1.4", b"", b"<svg/>"]
)
def test_files_of_other_formats_are_no_images_and_start_no_program(tmp_path, monkeypatch, content):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="it is no image of a known kind"):
        decode(content)
    assert not is_image(tmp_path / "photo.jpg")
    if content[:2] in (b"%!", b"\0\0", b"\n\5"):
        # As users open it, before they hand it to the processor.
        with pytest.raises(ValueError, match=r"it is a .* file; one of JPEG, PNG"):
            to_rgb(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_documented_format_is_read_by_its_content(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = saved(noise(), kind)
    (tmp_path / "photo").write_bytes(content)
    assert is_image(tmp_path / "photo")
    assert open_image(content).format == kind
    assert decode(content).size == (30, 20)
    several = saved(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    assert decode(several).size == to_rgb(Image.open(io.BytesIO(several))).size == (30, 20)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return len(content).to_bytes(4) + kind + content + checksum.to_bytes(4)


LARGE = zlib.compress(bytes(2**21))
CHUNKS = {
    "a large compressed text": chunk(b"zTXt", b"parameters\0\0" + LARGE),
    "a large international text": chunk(b"iTXt", b"parameters\0\1\0\0\0" + LARGE),
    "a large profile": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "a wrong checksum of a text": chunk(b"tEXt", b"a\0b", 5),
    "a wrong checksum of a resolution": chunk(b"pHYs", bytes(9), 5),
    "a wrong checksum of a time": chunk(b"tIME", bytes(7), 5),
    "metadata that is right": chunk(b"tEXt", b"a\0b") + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b")),
}


@pytest.mark.parametrize("what", CHUNKS)
@pytest.mark.parametrize("is_last", [False, True])
def test_metadata_costs_no_png(tmp_path, what, is_last):
    image = noise()
    content = saved(image, "PNG")
    end = len(content) - 12 if is_last else 33  # before the end, or behind the header
    content = content[:end] + CHUNKS[what] + content[end:]
    assert pixels(decode(content)) == pixels(image)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert pixels(to_rgb(open_image(path))) == pixels(image)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


SEGMENTS = {
    "a short JFIF": segment(0xE0, b"JFIF\0\1"),
    "a short Adobe": segment(0xEE, b"Adobe\0"),
    "a short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4"),
    "a short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a short EXIF": segment(0xE1, b"Exif\0\0II"),
}


@pytest.mark.parametrize("what", SEGMENTS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_metadata_costs_no_jpeg(tmp_path, what, mode):
    content = saved(noise().convert(mode), "JPEG")
    damaged = content[:2] + SEGMENTS[what] + content[2:]
    assert pixels(decode(damaged)) == pixels(decode(content))
    path = tmp_path / "a.jpg"
    path.write_bytes(damaged)
    assert pixels(to_rgb(open_image(path))) == pixels(decode(content))


def test_a_jpeg_keeps_its_orientation_without_its_other_metadata():
    exif = exif_of(ROTATED_6)
    content = saved(noise(), "JPEG", exif=exif)
    damaged = content[:2] + SEGMENTS["a short JFIF"] + SEGMENTS["a short Photoshop"] + content[2:]
    assert pixels(decode(damaged)) == pixels(decode(content))
    assert decode(damaged).size == (20, 30)


@pytest.mark.parametrize("text", ["BMW catalogue", "P1 is a text", "P6 too", "BM"])
def test_a_text_that_begins_as_an_image_is_none(tmp_path, text):
    (tmp_path / "notes.txt").write_text(text)
    assert not is_image(tmp_path / "notes.txt")
    noise().save(tmp_path / "photo.bmp")
    assert is_image(tmp_path / "photo.bmp")
