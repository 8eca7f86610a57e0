"""Image values to RGB images and training pixels, against the formats' own rules and other routes of Pillow."""

import io
import os
import socket
import struct
import subprocess
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tgol_trainer.data import DataError, ImageError, cropped_share, open_image, open_video, to_pixels
from tgol_trainer.data.images import readable_formats

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(value):
    image = open_image(value)
    assert image.mode == "RGB"
    return np.asarray(image)


# Where the file's first row and first column are shown, by the EXIF 2.3 table of orientations.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
def test_exif_orientation_puts_every_corner_where_the_exif_table_shows_it(orientation):
    stored = Image.new("RGB", (6, 4), (9, 9, 9))
    corners = {(0, 0): RED, (5, 0): GREEN, (0, 3): BLUE, (5, 3): WHITE}  # (x, y) in the file
    for place, colour in corners.items():
        stored.putpixel(place, colour)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(encoded(stored, exif=exif))
    assert upright.size == ((6, 4) if orientation <= 4 else (4, 6))
    row_side, column_side = SIDES[orientation]
    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    for (x, y), colour in corners.items():
        sides = {row_side if y == 0 else opposite[row_side], column_side if x == 0 else opposite[column_side]}
        shown = (0 if "left" in sides else upright.width - 1, 0 if "top" in sides else upright.height - 1)
        assert upright.getpixel(shown) == colour
    assert open_image(upright).tobytes() == upright.tobytes()  # opening again does not turn again


def test_broken_exif_around_good_pixels_is_ignored():
    assert pixels_of(encoded(Image.new("RGB", (3, 2), RED), "JPEG", exif=b"Exif\0\0garbage")).shape == (2, 3, 3)


def test_transparent_pixels_are_composited_over_white():
    """Over white, alpha a gives a·c + (1 - a)·255: 0.2·100 + 0.8·255 = 224, 0.2·50 + 204 = 214, 204."""
    image = Image.new("RGBA", (2, 1), (100, 50, 0, 51))
    image.putpixel((1, 0), (7, 7, 7, 0))
    assert pixels_of(encoded(image)).tolist() == [[[224, 214, 204], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (100, 51))
    assert pixels_of(encoded(grey)).tolist() == [[[224, 224, 224]]]


def test_transparent_palette_and_colour_key_become_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert pixels_of(encoded(palette, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    key = Image.new("RGB", (2, 1), GREEN)
    key.putpixel((1, 0), RED)
    assert pixels_of(encoded(key, transparency=GREEN)).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    """65535 = 255·257, so the 16-bit value 257·k is the 8-bit value k."""
    levels = np.array([[0, 1, 100, 255]])
    sixteen = Image.fromarray((levels * 257).astype(np.uint16))
    assert sixteen.mode == "I;16"
    for value in (encoded(sixteen), sixteen, encoded(sixteen, "TIFF")):
        assert pixels_of(value)[..., 0].tolist() == levels.tolist()


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.int32, 1), (np.int32, 257), (np.float32, 1 / 255), (np.float32, 1), (np.float32, 257)]
)
def test_thirty_two_bit_grey_is_scaled_from_the_range_that_holds_it(dtype, factor):
    levels = np.array([[0, 3, 128, 255]])
    deep = Image.fromarray((levels * factor).astype(dtype))
    assert deep.mode in ("I", "F")
    assert pixels_of(encoded(deep, "TIFF"))[..., 1].tolist() == levels.tolist()


def test_grey_beyond_the_known_ranges_is_stretched_from_its_minimum_to_its_maximum():
    deep = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert pixels_of(deep)[0, :, 2].tolist() == [0, 128, 255]
    assert pixels_of(Image.fromarray(np.full((1, 2), -5.0, np.float32))).tolist() == [[[0] * 3] * 2]
    with pytest.raises(ImageError, match="NaN"):
        open_image(Image.fromarray(np.array([[np.nan, 0]], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P", "HSV"])
def test_other_modes_become_rgb(mode):
    # Two uniform halves: a conversion of colours, not of dithering, is what is compared.
    image = Image.new("RGB", (4, 2), (250, 240, 230))
    image.paste((10, 20, 30), (0, 0, 2, 2))
    converted = image.convert(mode)
    result = pixels_of(converted)
    assert np.array_equal(result, np.asarray(converted.convert("RGB")))
    assert result[0, 0].mean() < 60 < 200 < result[0, 3].mean()


def test_every_form_of_one_image_gives_the_same_pixels(tmp_path):
    image = noise(7, 5)
    path = tmp_path / "a.png"
    image.save(path)
    expected = np.asarray(image)
    forms = [image, path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path)]
    forms += [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}, {"path": str(path)}]
    forms += [expected, expected.tolist(), expected.astype(np.int64), expected / 255, (expected / 255).tolist()]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, "a.png")
    forms += [f"zip://a.png::{tmp_path / 'all.zip'}"]  # how a streamed archive names its members
    for form in forms:
        assert np.array_equal(pixels_of(form), expected)


def test_arrays_of_one_two_and_four_channels():
    grey = np.array([[0, 255], [128, 7]], dtype=np.uint8)
    for form in (grey, grey[..., None], grey.tolist(), grey / np.float32(255)):
        assert np.array_equal(pixels_of(form), np.stack([grey] * 3, axis=-1))
    assert pixels_of(grey > 100).tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]
    assert pixels_of(np.array([[[100, 51]]], dtype=np.uint8)).tolist() == [[[224] * 3]]
    assert pixels_of(np.array([[[100, 50, 0, 51]]], dtype=np.uint8)).tolist() == [[[224, 214, 204]]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((3, 8, 8)), r"channels first.*transpose\(1, 2, 0\)"),
        (np.zeros((4, 8, 8, 3)), "shape"),
        (np.zeros((0, 8, 3)), "shape"),
        (np.full((2, 2, 3), 200.0), "0..1.*200"),
        (np.full((2, 2, 3), -0.5), "0..1.*-0.5"),
        (np.full((2, 2), np.nan), "0..1"),
        (np.full((2, 2, 3), 256), "0..255"),
        (np.array([["a", "b"]]), "0..255"),
        ([[1, 2], [3]], "inhomogeneous"),
        (3.5, "type float is not an image"),
        (torch.zeros(3, 4, 4), "type Tensor is not an image"),
        (b"", "cannot identify"),
        (b"<html>not found</html>", "cannot identify"),
    ],
)
def test_values_that_are_no_image_are_refused_with_the_reason(value, words):
    with pytest.raises(ImageError, match=words) as caught:
        open_image(value)
    assert caught.value.cause == "undecodable image"
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize("value", [None, "", "  ", {"bytes": None, "path": None}, {"bytes": None, "path": ""}])
def test_missing_images_are_told_from_broken_ones(value):
    with pytest.raises(ImageError) as caught:
        open_image(value)
    assert caught.value.cause == "missing image"


def test_a_missing_file_is_told_from_a_broken_one(tmp_path):
    for path in (tmp_path / "no.png", tmp_path / "no" / "no.png", tmp_path):
        with pytest.raises(ImageError) as caught:
            open_image({"bytes": None, "path": str(path)})
        assert caught.value.cause == "image file not found"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_cut_in_half_raises_in_every_format(kind, tmp_path):
    whole = encoded(noise(64, 64), kind)
    half = tmp_path / "half"
    half.write_bytes(whole[: len(whole) // 2])
    for value in (half, half.read_bytes()):
        with pytest.raises(ImageError) as caught:
            open_image(value)
        assert caught.value.cause in ("truncated image", "undecodable image")
    if kind in ("JPEG", "PNG", "BMP"):
        assert caught.value.cause == "truncated image"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels_of(animation)[0, 0].tolist() == list(RED)


def test_a_decompression_bomb_is_an_image_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"DecompressionBombError.*fewer pixels"):
        open_image(encoded(noise(20, 20)))


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
{} loop
%%EOF
"""


def test_no_image_starts_another_program_and_formats_that_are_not_read_are_named(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, which runs what is in it. `{} loop` never ends."""
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **options: pytest.fail(f"started {command}"))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **options: pytest.fail(f"started {command}"))
    (tmp_path / "a.png").write_bytes(EPS)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    forms = [EPS, tmp_path / "a.png", {"bytes": EPS, "path": "a.png"}, f"zip://a.png::{tmp_path / 'all.zip'}"]
    for value in [*forms, Image.open(io.BytesIO(EPS))]:
        with pytest.raises(ImageError, match="PNG, "):
            open_image(value)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "file:// pipe"])
def test_what_is_not_a_file_is_refused_and_not_waited_for(kind, tmp_path):
    path = tmp_path / "1.png"
    server = socket.socket(socket.AF_UNIX)
    if "pipe" in kind:
        os.mkfifo(path)
    elif kind == "socket":
        server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    value = f"file://{path}" if "://" in kind else str(path)
    for read in (open_image, lambda value: open_video(value, 1)):
        with pytest.raises(DataError, match="not a file"):
            read(value)
    server.close()


ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Colours of the primaries as (X, Y, Z) under D50, by columns: Adobe RGB (1998), sRGB (IEC 61966-2-1)."""


P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def icc_profile(space, primaries=(), gamma=563 / 256):
    """
    A colour profile as ICC.1 lays it out: matrix and one curve, or a curve alone for grey. The curve is a power, or
    with `gamma` None that of sRGB, as phones store it.
    """

    def xyz(values):
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round((gamma or 1) * 256)) + bytes(2)
    if gamma is None:
        parts = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        curve = b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(part * 65536) for part in parts))
    description = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78 + 1)
    tags = {b"desc": description, b"wtpt": xyz((0.9642, 1.0, 0.8249)), b"cprt": b"text" + bytes(8)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for name, column in zip("rgb", np.transpose(primaries) if space != b"GRAY" else (), strict=False):
        tags |= {f"{name}XYZ".encode(): xyz(column), f"{name}TRC".encode(): curve}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02200000, b"mntr", space, b"XYZ ") + bytes(12)
    header += b"acsp" + bytes(28) + xyz((0.9642, 1.0, 0.8249))[8:] + bytes(48)
    return header + table + body


def shown(stored, primaries=ADOBE, gamma=563 / 256):
    """The sRGB pixel that shows as a stored one: to light by the power, to XYZ, to sRGB's light and by its curve."""
    light = np.linalg.solve(SRGB, np.asarray(primaries) @ (np.asarray(stored) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "RGBA", "P"])
def test_colours_become_srgb_by_the_profile_of_the_file(kind):
    """(122, 199, 75) in Adobe RGB shows as (60, 200, 60) does in sRGB."""
    profile, stored = icc_profile(b"RGB ", ADOBE), (122, 199, 75)
    image = Image.new("RGBA" if kind == "RGBA" else "RGB", (16, 16), stored)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "P":
        image = image.quantize(4)
    found = open_image(encoded(image, "PNG" if kind in ("RGBA", "P") else kind, icc_profile=profile, **options))
    assert np.abs(shown(stored) - (60, 200, 60)).max() < 1
    # A level of the file is up to three in the dark, and JPEG stores whole levels of luminance and chrominance.
    assert np.abs(np.asarray(found, dtype=float) - shown(stored)).max() < (5 if kind == "JPEG" else 2.5)
    assert open_image(found).tobytes() == found.tobytes()  # opening again does not convert again


def png_of_16_bits(colour, profile):
    """A PNG file of RGB in 16 bits, which Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + struct.pack(">3H", *(257 * value for value in colour)) * 4 for _ in range(4))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"iCCP", b"p\0\0" + zlib.compress(profile))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("stored", "seen"), [((234, 51, 35), (255, 0, 0)), ((117, 251, 76), (0, 255, 0))])
def test_photos_of_a_phone_are_brought_from_display_p3_to_srgb(stored, seen):
    """The red and the green of sRGB are (234, 51, 35) and (117, 251, 76) in Display P3."""
    profile = icc_profile(b"RGB ", P3, gamma=None)
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.new("RGB", (8, 4), stored)
    jpeg = encoded(image, "JPEG", quality=100, subsampling=0, icc_profile=profile, exif=turned)
    for content in (jpeg, encoded(image, "AVIF", quality=100, icc_profile=profile), png_of_16_bits(stored, profile)):
        found = pixels_of(content).astype(int)
        assert np.abs(found - seen).max() <= 16  # JPEG is off by a level, which is many in the dark
        assert found[..., np.argmax(seen)].min() >= 253
    assert pixels_of(jpeg).shape == (8, 4, 3)


def test_ink_without_a_profile_is_read_as_viewers_do():
    image = Image.new("CMYK", (4, 4), (255, 0, 255, 0))
    assert np.abs(pixels_of(encoded(image, "JPEG", quality=100)).astype(int) - (0, 255, 0)).max() <= 2


def test_a_profile_of_grey_is_followed_and_transparency_stays():
    """A grey g of the power 1.0 is light g/255: 64 → 0.251 → 255·(1.055·0.251^(1/2.4) − 0.055) = 137."""
    linear = icc_profile(b"GRAY", gamma=1.0)
    assert abs(pixels_of(encoded(Image.new("L", (4, 4), 64), icc_profile=linear)).mean() - 137) < 2
    image = Image.new("LA", (4, 4), (64, 0))
    assert pixels_of(encoded(image, icc_profile=linear)).min() == 255


@pytest.mark.parametrize("profile", ["sRGB", "cut", "of grey", "of no kind"])
def test_a_profile_of_srgb_or_one_that_is_broken_changes_no_pixel(profile):
    good = icc_profile(b"RGB ", ADOBE)
    content = {
        "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "cut": good[:200],
        "of grey": icc_profile(b"GRAY"),
        "of no kind": b"x" * 300,
    }[profile]
    image = noise(9, 7)
    image.info["icc_profile"] = content
    assert np.array_equal(pixels_of(encoded(image, icc_profile=content)), np.asarray(image))
    assert np.array_equal(pixels_of(image), np.asarray(image)) and image.info["icc_profile"] == content


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_file_is_found_whichever_way_unicode_writes_its_name(form, tmp_path):
    other = "NFD" if form == "NFC" else "NFC"
    folder = tmp_path / unicodedata.normalize(form, "forêt")
    folder.mkdir()
    noise(4, 4).save(folder / unicodedata.normalize(form, " café.png"))
    asked = tmp_path / unicodedata.normalize(other, "forêt") / unicodedata.normalize(other, "café.png")
    for value in (asked, str(asked), {"bytes": None, "path": str(asked)}):
        assert np.array_equal(pixels_of(value), np.asarray(noise(4, 4)))


def test_a_name_in_other_capitals_and_a_folder_named_twice_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    noise(4, 4).save(tmp_path / "train" / "Cat.PNG")
    for name, words in [
        ("cat.png", "there is 'Cat.PNG'"),
        ("train/Cat.PNG", r"leave 'train' out"),
        ("dog.png", "^no"),
    ]:
        with pytest.raises(ImageError, match=words) as caught:
            open_image(tmp_path / "train" / name)
        assert caught.value.cause == "image file not found"


class ClientError(Exception):
    """As that of aiohttp, which is no OSError."""


@pytest.mark.parametrize("error", [ImportError("it is not installed"), ClientError("403, message='Forbidden'")])
def test_what_a_client_of_urls_raises_concerns_one_image(monkeypatch, error):
    def xopen(*arguments):
        raise error

    monkeypatch.setattr("datasets.utils.file_utils.xopen", xopen)
    with pytest.raises(ImageError, match=str(error)) as caught:
        open_image("https://nowhere.invalid/a.png")
    assert caught.value.cause == "undecodable image"


def test_resizing_equals_resizing_everything_and_then_cutting_out_the_centre():
    for size, resolution, covering, box in [
        ((64, 32), (16, 16), (32, 16), (8, 0, 24, 16)),
        ((32, 96), (16, 16), (16, 48), (0, 16, 16, 32)),
        ((80, 40), (40, 20), (80, 40), (30, 0, 50, 40)),  # no change of scale: a pure cut
        ((10, 10), (40, 20), (40, 40), (10, 0, 30, 40)),  # enlarged
    ]:
        image = noise(*size)
        expected = np.asarray(image.resize(covering, Image.Resampling.LANCZOS).crop(box)).astype(int)
        result = to_pixels(image, resolution)
        assert result.shape == (3, *resolution)
        levels = (result.double() + 1) * 127.5
        assert (levels.permute(1, 2, 0) - torch.from_numpy(expected)).abs().max() <= 1 + 1e-4


def test_pixels_are_contiguous_float32_from_minus_one_for_black_to_one_for_white():
    small = Image.new("RGB", (8, 8), (0, 255, 51))
    for image in (small, small.resize((16, 16))):
        result = to_pixels(image, (8, 8))
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert (result[0] == -1).all() and (result[1] == 1).all()
        assert torch.allclose(result[2], torch.tensor(0.2 * 2 - 1))
    assert (to_pixels(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (8, 8)) == 1).all()


def test_shrinking_is_antialiased():
    """A chessboard of single pixels, shrunk eightfold, is grey everywhere; picked pixels would be black or white."""
    board = Image.fromarray(((np.indices((128, 128)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    assert to_pixels(board, (16, 16)).abs().max() < 0.05


def test_any_size_gives_the_resolution():
    for size in [(1, 1), (1, 999), (999, 1), (511, 513), (333, 777)]:
        assert to_pixels(noise(*size), (24, 40)).shape == (3, 24, 40)


def test_cropped_share_by_hand():
    assert cropped_share(200, 100, (512, 512)) == 0.5
    assert cropped_share(100, 300, (64, 64)) == pytest.approx(2 / 3)
    assert cropped_share(64, 48, (480, 640)) == 0
    # 4:3 into 16:9: the width stays, 4/3 : 16/9 = 3/4 of the height remains.
    assert cropped_share(400, 300, (90, 160)) == pytest.approx(0.25)


# ---- Formats that need a package of their own ----


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"), (b"\xff\x0a\xfa\x7f", "JXL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL")],
)
def test_a_format_whose_package_is_not_there_is_named_with_what_to_install(monkeypatch, start, name):
    monkeypatch.setattr("tgol_trainer.data.images._PLUGIN_FORMATS", ())
    with pytest.raises(ImageError, match=rf"it is {name}, which `pip install 'tgol_trainer\[formats\]'` reads"):
        open_image(start + bytes(40))


@pytest.mark.parametrize(("package", "name"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
def test_images_of_such_a_format_are_read_where_its_package_is_there(package, name):
    pytest.importorskip(package)
    readable_formats()  # registers the package
    file = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 30, 30)).save(file, name, quality=95)
    opened = open_image(file.getvalue())
    assert opened.size == (64, 32)
    assert np.abs(np.subtract(opened.getpixel((32, 16)), (200, 30, 30))).max() < 6
