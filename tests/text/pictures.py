"""Pictures for the tests, sound and not, and what is asked of a refusal."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lite_llm.errors import UsageError
from lite_llm.text.images import open_picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
QUIET = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says more than once that EXIF is damaged


def photo(width=40, height=30, mode="RGB") -> Image.Image:
    """Smooth, without symmetry, each corner of its own colour."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rgb = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def refused(source) -> str:
    with pytest.raises(UsageError) as info:
        open_picture(source)
    return check_message(info.value)


def check_message(error) -> str:
    message = str(error)
    assert error.hint and message.isprintable() and len(message) < 300
    assert not re.search(r"object at|0x[0-9a-f]{4}|\bb'|BytesIO|Traceback", message), message
    return message


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, rows, extra=b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def webp_of(width, height) -> bytes:
    data = bytearray(encoded(photo(mode="RGBA"), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def webp_simple_of(kind, width, height) -> bytes:
    data = bytearray(encoded(photo(), "WEBP", lossless=kind == b"VP8L"))
    assert data[12:16] == kind
    if kind == b"VP8L":
        struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14)
    else:
        struct.pack_into("<HH", data, 26, width, height)
    return bytes(data)


def patched(data: bytes, at: int, form: str, *values) -> bytes:
    data = bytearray(data)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


def jpeg_of(width, height) -> bytes:
    data = encoded(photo(), "JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def tiff_of(width, height) -> bytes:
    data = bytearray(encoded(photo(), "TIFF"))
    first = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, first)[0]):
        at = first + 2 + 12 * number
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            size = width if struct.unpack_from("<H", data, at)[0] == 256 else height
            struct.pack_into("<HII", data, at + 2, 4, 1, size)
    return bytes(data)


def gif_of(screen, frame) -> bytes:
    head = b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff!\xfe\x03abc\0"
    return head + b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x02\x02\x4c\x01\0;"
