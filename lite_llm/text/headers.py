"""What kind of picture some bytes are and how large, by their header alone.

This runs before any decoder sees the data. Where a decoder would read the header in another way, `images` asks it and
checks again; what counts here is that nothing is refused only after memory or time are spent.
"""

import re
import struct
import zlib

from lite_llm.errors import UsageError

MOST_PIXELS = 64_000_000
MOST_SIDE = 65_535  # as many as a JPEG may have; a column of 64 million rows would need 0.5 GB for its rows alone
MOST_EXTRA = 1 << 20
"""Bytes of EXIF, and before the first frame of a GIF."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
EXPECTED = "send a PNG, JPEG, WebP, GIF, BMP or TIFF"

_MOST_SCANNED = 1 << 31  # pixels times scans of a progressive JPEG, each of which goes over the whole picture
_MOST_VALUES = 1 << 20  # in one tag of a TIFF; Pillow makes a Python number of each
_MOST_PIECES = 20_000  # chunks of a PNG, segments of a JPEG; Pillow takes some us for each
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of a JPEG; after a scan the data hold none
_OTHERS = [
    (re.compile(rb".{4}ftyp(hei|mif)", re.DOTALL), "HEIC"),
    (re.compile(rb".{4}ftypavi", re.DOTALL), "AVIF"),
    (re.compile(rb".{4}ftyp", re.DOTALL), "a video"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"PK\x03\x04"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "gzip data"),
    (re.compile(rb"II\+\0|MM\0\+"), "BigTIFF"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg", re.DOTALL), "SVG"),
    (re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]{1,512}\Z"), "text"),
]


def measure(data: bytes, name: str) -> tuple[str, int, int]:
    """Format, width and height by the header. UsageError for what no decoder should see."""
    for kind, read in (("PNG", _png), ("JPEG", _jpeg), ("WEBP", _webp), ("GIF", _gif), ("BMP", _bmp), ("TIFF", _tiff)):
        try:
            size = read(data)
        except (struct.error, IndexError):
            raise UsageError(f"{name} is a {kind} that is damaged or cut short", "send the whole file") from None
        if size is not None:
            check_size(name, *size)
            return kind, *size
    found = next((what for pattern, what in _OTHERS if pattern.match(data[:512])), "unknown data")
    raise UsageError(f"{name} holds {found if data else 'nothing'}; expected a picture", EXPECTED)


def check_sums(data: bytes, name: str) -> None:
    """UsageError for a PNG, as `measure` has it, that has a chunk whose checksum is not its own.

    Pillow checks none of the pixels' own, so that changed data would pass for another picture. PNG alone of our formats
    has checksums. 27 MB take 6 to 12 ms, decoding them 350.
    """
    view, at, kind = memoryview(data), 8, b""
    while kind != b"IEND" and at + 8 <= len(data):  # what follows the end is no part of the picture
        kind, end = data[at + 4 : at + 8], at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            raise UsageError(f"{name} is a PNG that is cut short", "send the whole file")
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise UsageError(
                f"{name} is a PNG that is damaged: the data from byte {at:,} on do not match their checksum",
                "send the original file again",
            )
        at = end + 4


def check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UsageError(f"{name} is {width} x {height} pixels: there is nothing to see", "send another picture")
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        raise UsageError(
            f"{name} is {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} in all and {MOST_SIDE:,} on a side are "
            "taken",
            "send it smaller",
        )


def _png(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    at = 8
    for _ in range(_MOST_PIECES):
        if at + 8 > len(data):
            return struct.unpack_from(">II", data, 16)
        at += 12 + struct.unpack_from(">I", data, at)[0]
    raise IndexError


def _bmp(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"BM"):
        return None
    width, height = struct.unpack_from("<HH" if data[14] == 12 else "<ii", data, 18)
    return width, abs(height)


def _webp(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"RIFF") or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return 1 + low_w + (high_w << 16), 1 + low_h + (high_h << 16)
    if data[12:16] == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _gif(data: bytes) -> tuple[int, int] | None:
    """The screen, or the first frame where that is larger, as Pillow has it."""
    if not data.startswith((b"GIF87a", b"GIF89a")):
        return None
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while data[at] == 0x21:  # an extension: its kind, and blocks up to an empty one
        at += 2
        while data[at]:
            at += 1 + data[at]
            if at > MOST_EXTRA:
                raise IndexError
        at += 1
    if data[at] != 0x2C:
        raise IndexError
    left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
    return max(width, left + wide), max(height, top + high)


def _jpeg(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    at, pieces, scans, width, height = 2, 0, 0, 0, 0
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] != 0xD9:
        marker, at, pieces = data[found.end() - 1], found.end(), pieces + 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            high, wide = struct.unpack_from(">HH", data, at + 3)
            width, height = max(width, wide), max(height, high)
        scans += marker == 0xDA
        if scans > 1 and scans * width * height > _MOST_SCANNED:
            raise UsageError(f"the JPEG has {scans} scans or more of {width} x {height} pixels", "save it as baseline")
        at += 0 if marker in (0x01, 0xD8) else struct.unpack_from(">H", data, at)[0]
        if pieces > _MOST_PIECES:
            raise IndexError
    if not scans:
        raise IndexError
    return width, height


def _tiff(data: bytes) -> tuple[int, int] | None:
    if not data.startswith((b"II*\0", b"MM\0*")):
        return None
    order = "<" if data.startswith(b"II") else ">"
    first = struct.unpack_from(order + "I", data, 4)[0]
    sizes = {}
    for number in range(struct.unpack_from(order + "H", data, first)[0]):
        tag, kind, count = struct.unpack_from(order + "HHI", data, first + 2 + 12 * number)
        if count > _MOST_VALUES and kind not in (1, 2, 6, 7):
            raise UsageError(f"the TIFF has {count:,} values in one tag", "save it in fewer strips")
        sizes[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, first + 10 + 12 * number)[0]
    if not {256, 257} <= sizes.keys():
        raise IndexError
    return sizes[256], sizes[257]
