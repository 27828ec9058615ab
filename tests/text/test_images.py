"""Pictures: right pixels for every odd form, from every source, and one clear refusal for what is none."""

import base64
import io
import os
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lite_llm.text.fetch import MOST_BYTES
from lite_llm.text.images import open_picture
from tests.text.pictures import (
    FORMATS,
    QUIET,
    encoded,
    photo,
    pixels,
    png,
    refused,
)

# ---- right pixels


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 300), (300, 1), (64, 48), (257, 129), (3, 4000)], ids=str)
def test_each_format_in_each_shape(kind, size):
    image = photo(*size)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    picture = open_picture(encoded(image, kind, **options.get(kind, {})))
    lossy = 40 if kind in ("JPEG", "GIF") else 0
    assert picture.size == picture.stored_size == size and picture.image.mode == "RGB" and not picture.notes
    assert np.abs(pixels(picture) - np.asarray(image).astype(int)).mean() <= lossy / 4
    assert type(picture.image) is Image.Image


ODD = {
    "grey": (encoded(photo(mode="L")), photo(mode="L"), 0),
    "black and white": (encoded(photo(mode="1")), photo(mode="1"), 0),
    "palette": (encoded(photo(mode="P")), photo(mode="P"), 0),
    "palette of 4": (encoded(photo().quantize(4), bits=2), photo().quantize(4), 0),
    "interlaced gif": (encoded(photo(mode="P"), "GIF", interlace=1), photo(mode="P"), 0),
    "opaque alpha": (encoded(photo(mode="RGBA")), photo(), 0),
    "cmyk jpeg": (encoded(photo(mode="CMYK"), "JPEG", quality=95), photo(), 6),
    "cmyk tiff": (encoded(photo(mode="CMYK"), "TIFF"), photo(), 0),
    "grey jpeg": (encoded(photo(mode="L"), "JPEG", quality=95), photo(mode="L"), 4),
    "progressive": (encoded(photo(), "JPEG", quality=95, progressive=True, subsampling=0), photo(), 6),
    "webp lossy": (encoded(photo(), "WEBP", quality=95), photo(), 12),
    **{f"tiff {how}": (encoded(photo(), "TIFF", compression=how), photo(), 0)
       for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "raw")},
    "tiff g4": (encoded(photo(mode="1"), "TIFF", compression="group4"), photo(mode="1"), 0),
    "tiff jpeg": (encoded(photo(), "TIFF", compression="jpeg", quality=95), photo(), 12),
    "bmp of 8 bits": (encoded(photo(mode="P"), "BMP"), photo(mode="P"), 0),
    "bmp of 1 bit": (encoded(photo(mode="1"), "BMP"), photo(mode="1"), 0),
    "bmp from the top": (b"", photo(), 0),
}  # fmt: skip


def _bmp_from_the_top() -> bytes:
    data = bytearray(encoded(photo(), "BMP"))
    struct.pack_into("<i", data, 22, -30)
    row = 40 * 3
    start = struct.unpack_from("<I", data, 10)[0]
    rows = [data[start + row * y : start + row * (y + 1)] for y in range(30)]
    return bytes(data[:start]) + b"".join(reversed(rows))


@pytest.mark.parametrize("name", ODD)
def test_odd_kinds(name):
    data, want, lossy = ODD[name]
    picture = open_picture(data or _bmp_from_the_top())
    assert np.abs(pixels(picture) - np.asarray(want.convert("RGB")).astype(int)).max() <= lossy
    assert not picture.notes and picture.size == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    picture = open_picture(encoded(Image.fromarray(values), kind))
    assert np.abs(pixels(picture)[..., 0] - values / 257).max() <= 0.5
    assert picture.stored_mode.startswith("I") and not picture.notes


def test_sixteen_bits_of_the_other_byte_order():
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(">u2")
    image = Image.frombytes("I;16B", (40, 30), values.tobytes())
    picture = open_picture(encoded(image, "TIFF"))
    assert np.abs(pixels(picture)[..., 0] - values.astype(float) / 257).max() <= 0.5


def test_sixteen_bits_of_colour():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 32768, 65535, 257, 514, 771) for _ in range(2))
    data = png(2, 2, 16, 2, rows)
    assert pixels(open_picture(data))[0].tolist() == [[0, 128, 255], [1, 2, 3]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize(
    "low, high, note",
    [
        (0, 1, "0 to 1 taken as"), (0, 200, "0 to 255 taken as"), (0, 300, "0 to 65535 taken as"),
        (-5, 5, "-5 to 5 spread over"), (0, 1e9, "0 to 1e+09 spread over"), (7, 7, "0 to 255 taken as"),
    ],
)  # fmt: skip
def test_what_is_made_of_numbers_is_said(low, high, note, kind):
    values = np.linspace(low, high, 40 * 30).reshape(30, 40).astype(kind)
    picture = open_picture(encoded(Image.fromarray(values), "TIFF"))
    if kind is np.int32 and high == 1:
        note = "0 to 255 taken as"
    assert picture.notes == (f"values from {note} black to white",)
    if "spread" in note or "to 1 " in note:
        assert pixels(picture).min() == 0 and pixels(picture).max() == 255


def test_floats_that_are_no_numbers():
    values = np.full((4, 4), np.nan, np.float32)
    values[0] = [np.inf, -np.inf, 3e38, -3e38]
    picture = open_picture(encoded(Image.fromarray(values), "TIFF"))
    assert picture.notes[0] == "NaN and infinity taken as 0" and "spread over" in picture.notes[1]


@pytest.mark.parametrize(
    "name", ["rgba", "la", "palette", "palette bytes", "rgb key", "grey key", "gif", "webp", "tiff"]
)
def test_what_is_transparent_is_white(name):
    clear = photo(mode="RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.array([[0] * 20 + [255] * 20], np.uint8), 30, 0)))
    solid = {"rgba": "RGBA", "webp": "RGBA", "tiff": "RGBA"}.get(name)
    if solid:
        data = encoded(clear, "PNG" if name == "rgba" else name, **({"lossless": True} if name == "webp" else {}))
    elif name == "la":
        data = encoded(clear.convert("LA"))
    elif name in ("palette", "palette bytes", "gif"):
        flat = Image.fromarray(np.repeat(np.array([[0] * 20 + [1] * 20], np.uint8), 30, 0)).convert("P")
        flat.putpalette([9, 9, 9, 200, 100, 50])
        data = encoded(flat, "GIF" if name == "gif" else "PNG", transparency=b"\0\xff" if "bytes" in name else 0)
    else:
        flat = Image.new("RGB" if name == "rgb key" else "L", (40, 30), 0)
        flat.paste((9, 9, 9) if name == "rgb key" else 9, (20, 0, 40, 30))
        data = encoded(flat, transparency=(0, 0, 0) if name == "rgb key" else 0)
    picture = open_picture(data)
    assert (pixels(picture)[:, :20] == 255).all() and (pixels(picture)[:, 20:] != 255).any()
    assert picture.notes == ("alpha laid on white",)


def test_half_transparent_is_half_white():
    assert pixels(open_picture(encoded(Image.new("RGBA", (1, 1), (100, 0, 200, 128)))))[0, 0].tolist() == [
        177,
        127,
        227,
    ]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_once(kind, orientation):
    image, exif = photo(), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(image, kind, exif=exif, **options)
    picture = open_picture(data)
    if kind == "TIFF":  # stored pixels are the same for each
        want = image
        want.getexif()[0x0112] = orientation
        want = ImageOps.exif_transpose(want)
    else:
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture.size == ((30, 40) if orientation in (5, 6, 7, 8) else (40, 30))
    assert picture.stored_size == (40, 30)
    assert np.abs(pixels(picture) - np.asarray(want.convert("RGB")).astype(int)).max() <= (8 if kind == "JPEG" else 0)
    assert picture.notes == ((f"turned by EXIF {orientation}",) if 2 <= orientation <= 8 else ())


@QUIET
def test_broken_or_huge_exif_turns_nothing():
    plain = pixels(open_picture(encoded(photo())))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\1"):
        assert (pixels(open_picture(encoded(photo(), exif=exif))) == plain).all()
    exif = Image.Exif()
    exif[0x0112], exif[0x9C9E] = 6, b"x" * (2 << 20)
    assert open_picture(encoded(photo(), exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_many_frames(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = open_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert pixels(picture)[0, 0].tolist() == [255, 0, 0] and picture.notes == ("first of 3 frames",)


def test_frames_of_a_large_gif_are_not_counted():
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (700, 900), dtype=np.uint8)) for n in range(3)]
    picture = open_picture(encoded(noise[0], "GIF", save_all=True, append_images=noise[1:]))
    assert picture.notes == ("first of several frames",)


def test_a_photo_with_more_behind_it_is_one_photo():
    data = encoded(photo(), "MPO", save_all=True, append_images=[photo(8, 8)])
    assert open_picture(data).size == (40, 30) and not open_picture(data).notes


# ---- sources


def test_all_sources_give_the_same_picture(tmp_path, monkeypatch):
    data = encoded(photo())
    path = tmp_path / "ünï 画像 🙂.jpg"  # the name does not say what it is
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "data:image/png;base64," + base64.b64encode(data).decode()

    class Fetched:
        def fetch(self, url, gone=None):
            return data

    sources = [data, bytearray(data), memoryview(data), path, str(path), f"~/{path.name}", url, "DATA" + url[4:],
               url.replace("image/png", ""), url.replace("image/png", "image/jpeg"),
               Image.open(path), photo()]  # fmt: skip
    digests = {open_picture(source).digest for source in sources}
    digests.add(open_picture("https://example.com/a.png", Fetched()).digest)
    assert len(digests) == 1


def test_urls_are_refused_without_a_fetcher():
    for url in ("http://example.com/a.png", "https://127.0.0.1/", "HTTP://x/", "file:///etc/passwd", "ftp://x/y"):
        assert "not fetched here" in refused(url)


def test_the_digest_is_of_pixels_and_shape():
    one = open_picture(photo())
    assert one.digest == open_picture(encoded(photo(), "BMP")).digest
    flat = Image.new("RGB", (6, 4))
    shapes = [open_picture(flat), open_picture(Image.new("RGB", (4, 6)))]
    shapes += [open_picture(Image.new("RGB", size)) for size in ((24, 1), (1, 24), (12, 2))]
    assert len({picture.digest for picture in shapes}) == 5
    dot = photo()
    dot.putpixel((3, 3), (1, 2, 3))
    assert open_picture(dot).digest != one.digest


def test_a_picture_of_pillow_is_left_alone():
    image = photo(mode="P")
    before = image.copy()
    picture = open_picture(image)
    picture.image.putpixel((0, 0), (9, 9, 9))
    assert image == before
    rgb = photo()
    assert open_picture(rgb).image is not rgb


def test_a_file_that_pillow_opened_is_decoded_only_if_we_would(tmp_path):
    photo().save(tmp_path / "a.ppm")
    photo().save(tmp_path / "a.png")
    assert "PPM" in refused(Image.open(tmp_path / "a.ppm"))
    assert open_picture(Image.open(tmp_path / "a.png")).size == (40, 30)
    assert open_picture(Image.open(tmp_path / "a.ppm").convert("RGB")).size == (40, 30)
    (tmp_path / "cut.png").write_bytes(encoded(photo(400, 300))[:500])
    assert "cannot be decoded" in refused(Image.open(tmp_path / "cut.png"))
    assert "nothing to see" in refused(Image.new("RGB", (0, 7)))


@pytest.mark.parametrize(
    "source", [None, 3, 2.5, [], {}, np.zeros((3, 3, 3)), object()], ids=lambda s: type(s).__name__
)
def test_what_is_no_source(source):
    assert type(source).__name__ in refused(source)


# ---- files


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", MOST_BYTES + 1)
    for path, said in [
        (tmp_path / "missing.png", "no such file"), (tmp_path, "directory"), (tmp_path / "pipe.png", "not a file"),
        ("/dev/zero", "not a file"), ("/dev/null", "not a file"), (tmp_path / "loop.png", "cannot be read"),
        (tmp_path / "empty.png", "nothing"), (tmp_path / "sparse.png", "33,554,433 bytes"), ("a\0b", "not a path"),
        ("", "directory"), ("x" * 5000, "cannot be read"), (tmp_path / "empty.png" / "inside", "cannot be read"),
        ("~nobody-of-this-name/a.png", "not a path"), ("\ud800.png", ""), ("\x1b[31mred\n.png", "no such file"),
    ]:  # fmt: skip
        assert said in refused(path)


def test_a_file_without_permission(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(photo()))

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "may not be read" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("data, said", [
    (b"Hello, I am no picture.\n" * 9, "text"), ("Grüße".encode() * 99, "text"), (b"<html><body>", "text"),
    (b'<?xml version="1.0"?>\n<svg xmlns="x">', "SVG"), (b"<svg>", "SVG"), (b"%PDF-1.7\n", "PDF"),
    (b"PK\x03\x04\0\0", "zip"), (b"\0\0\0\x18ftypheic\0\0", "HEIC"), (b"\0\0\0\x18ftypmif1\0", "HEIC"),
    (b"\0\0\0\x18ftypavif\0", "AVIF"), (b"\0\0\0\x18ftypmp42\0", "video"), (b"\x1f\x8b\x08", "gzip"),
    (b"\x7fELF\x02\x01\0", "unknown"), (b"II+\0\x08\0\0\0", "BigTIFF"), (b"", "nothing"), (b"\0" * 99, "unknown"),
    (encoded(photo(), "PPM"), ""), (encoded(photo(), "ICO"), "unknown"), (encoded(photo(), "TGA"), ""),
    (encoded(photo(), "JPEG2000"), "unknown"), (encoded(photo(), "PCX"), "unknown"), (encoded(photo(), "EPS"), ""),
    (encoded(photo(), "PDF"), "PDF"), (encoded(photo(), "DDS"), "unknown"), (encoded(photo(), "SGI"), "unknown"),
], ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes")  # fmt: skip
def test_other_data_is_named(tmp_path, data, said):
    (tmp_path / "photo.png").write_bytes(data)
    message = refused(tmp_path / "photo.png")
    assert said in message and "photo.png" in message and "expected a picture" in message


# ---- data URLs


@pytest.mark.parametrize("url, said", [
    ("data:image/png;base64,", "nothing"), ("data:image/png;base64", "not in base64"), ("data:", "not in base64"),
    ("data:,x", "not in base64"), ("data:image/png,abc", "not in base64"), ("data:image/png;base64;x,AAAA", "not in"),
    ("data:text/html;base64,AAAA", "text/html"), ("data:application/pdf;base64,AAAA", "pdf"),
    ("data:image/png;base64,AA AA", "whole base64"), ("data:image/png;base64,AAA", "whole base64"),
    ("data:image/png;base64,AAAA\n", "whole base64"), ("data:image/png;base64,AA==AA==", "whole base64"),
    ("data:image/png;base64,-_-_", "whole base64"), ("data:image/png;base64,ÄÖÜß", "whole base64"),
    ("data:image/png;base64,=AAA", "whole base64"), ("data:image/png;base64,\ud800AAA", "whole base64"),
    ("data:image/png;base64,AAAA", "unknown data"), ("data:image/png;base64,SGVsbG8gd29ybGQ=", "text"),
    ("data:" + "x" * 5000 + ";base64,AAAA", "not in base64"), ("data:image/\x1b[1m;base64,AAAA", ""),
])  # fmt: skip
def test_data_urls_that_hold_no_picture(url, said):
    assert said in refused(url)


def test_a_huge_data_url_is_refused_before_it_is_copied():
    url, start = "data:image/png;base64," + "A" * 100_000_000, time.process_time()
    assert "bytes" in refused(url)
    assert time.process_time() - start < 0.05


# ---- and nothing else


def test_sound_pictures_make_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data, *_ in ODD.values():
            open_picture(data or _bmp_from_the_top())


def test_lab_is_converted_or_refused_by_name():
    image = Image.new("LAB", (4, 4))
    try:
        image.convert("RGB")
    except ValueError:  # Pillow up to 12
        assert "LAB" in refused(image)
    else:
        assert open_picture(image).image.mode == "RGB"


def test_pictures_need_neither_transformers_nor_torch():
    code = (
        "import sys; from lite_llm.text.images import open_picture, take_pictures; assert 'PIL' not in sys.modules;"
        "from PIL import Image; open_picture(Image.new('RGB', (2, 2)));"
        "assert not sys.modules.keys() & {'torch', 'transformers', 'tokenizers'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
