"""Bombs and damage: refused from the header, or by the decoder, at little cost and in one message."""

import random
import resource
import struct
import time
import zlib

import pytest
from PIL import Image

from lite_llm.errors import UsageError
from lite_llm.text.decoders import Decoders
from lite_llm.text.fetch import MOST_BYTES
from lite_llm.text.headers import MOST_PIXELS, MOST_SIDE, measure
from lite_llm.text.images import open_picture
from tests.text.pictures import (
    FORMATS,
    QUIET,
    check_message,
    chunk,
    encoded,
    gif_of,
    jpeg_of,
    patched,
    photo,
    pixels,
    png,
    refused,
    tiff_of,
    webp_of,
    webp_simple_of,
)

# ---- bombs

BOMBS = {
    "png 13000": lambda: png(13000, 13000, 1, 0, bytes(13000 * 1626)),
    "png 13377": lambda: png(13377, 13377, 1, 0, bytes(13377 * 1674)),
    "png 20000": lambda: png(20000, 20000, 1, 0, bytes(1000)),
    "png widest": lambda: png(2**31 - 1, 2**31 - 1, 8, 6, b""),
    "png column": lambda: png(1, MOST_SIDE + 1, 1, 0, bytes(2 * MOST_SIDE + 2)),
    "jpeg": lambda: jpeg_of(65535, 65535),
    "webp extended": lambda: webp_of(1 << 24, 1 << 24),
    "webp lossless": lambda: webp_simple_of(b"VP8L", 16384, 16384),
    "webp lossy": lambda: webp_simple_of(b"VP8 ", 16383, 16383),
    "gif screen": lambda: gif_of((65535, 65535), (1, 1)),
    "gif frame": lambda: gif_of((1, 1), (65535, 65535)),
    "tiff": lambda: tiff_of(100_000, 100_000),
    "tiff most": lambda: tiff_of(2**32 - 1, 2**32 - 1),
    "bmp": lambda: patched(encoded(photo(), "BMP"), 18, "<ii", 30_000, -30_000),
}
ITXT = b"k\0\1\0\0\0" + zlib.compress(bytes(100 << 20), 9)
COMPRESSED = {
    "png itxt": lambda: png(1, 1, 8, 0, b"\0\0", chunk(b"iTXt", ITXT)),
    "png iccp": lambda: png(1, 1, 8, 0, b"\0\0", chunk(b"iCCP", b"k\0\0" + ITXT[6:])),
    "png ztxt": lambda: png(1, 1, 8, 0, b"\0\0", chunk(b"zTXt", b"k\0\0" + ITXT[6:])),
    "png idat": lambda: png(1, 1, 8, 0, bytes(100 << 20)),
    "png chunks": lambda: png(1, 1, 8, 0, b"\0\0", chunk(b"tEXt", b"k\0v") * 500_000),
    "png unknown chunks": lambda: png(1, 1, 8, 0, b"\0\0", chunk(b"abCd", b"") * 2_000_000),
    "jpeg scans": lambda: _many_scans(),
    "jpeg segments": lambda: b"\xff\xd8" + b"\xff\xe2\0\2" * 7_000_000 + encoded(photo(), "JPEG")[2:],
    "gif comment": lambda: (
        gif_of((1, 1), (1, 1))[:19] + b"!\xfe" + b"\1a" * 12_000_000 + b"\0" + gif_of((1, 1), (1, 1))[19:]
    ),
    "tiff values": lambda: _many_values(),
    "gif frames": lambda: gif_of((1, 1), (1, 1))[:-1] + gif_of((1, 1), (1, 1))[-17:-1] * 60_000 + b";",
}


def _many_scans() -> bytes:
    data = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:-2] + data[at:-2] * 60 + data[-2:]


def _many_values() -> bytes:
    data = bytearray(encoded(photo(), "TIFF") + bytes(30 << 20))
    first = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, first)[0]):
        at = first + 2 + 12 * number
        if struct.unpack_from("<H", data, at)[0] == 273:
            struct.pack_into("<HII", data, at + 2, 3, 15 << 20, 8)
    return bytes(data)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name):
    data = BOMBS[name]()
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    message = refused(data)
    assert time.process_time() - start < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10
    assert "pixels; at most 64,000,000" in message


@pytest.mark.parametrize("name", COMPRESSED)
def test_other_bombs_cost_little(name):
    """Refused, or taken where they do no harm."""
    data = COMPRESSED[name]()
    assert len(data) <= MOST_BYTES
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if name in ("png idat", "gif frames"):
        assert open_picture(data).size == (1, 1)
    else:
        refused(data)
    assert time.process_time() - start < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 160 << 10


def test_no_other_decoder_is_asked(monkeypatch):
    asked = []
    Image.init()
    monkeypatch.setitem(Image.OPEN, "EVIL", (lambda *_: asked.append(1), lambda _: True))
    monkeypatch.setattr(Image, "ID", ["EVIL", *Image.ID])
    for kind in FORMATS:
        data = encoded(photo(), kind)
        open_picture(data)
        refused(data[: len(data) // 2])
    assert not asked


def test_the_limits_are_exact():
    assert measure(png(8000, 8000, 1, 0, b""), "it") == ("PNG", 8000, 8000) and MOST_PIXELS == 8000 * 8000
    with pytest.raises(UsageError):
        measure(png(8000, 8001, 1, 0, b""), "it")
    assert open_picture(Image.new("1", (1, MOST_SIDE))).size == (1, MOST_SIDE)


def test_no_size_at_all():
    for data in (png(0, 5, 8, 0, b""), png(5, 0, 8, 0, b""), gif_of((0, 0), (0, 0)), jpeg_of(7, 0), tiff_of(0, 3),
                 patched(encoded(photo(), "BMP"), 18, "<ii", 0, 0),
                 patched(encoded(photo(), "BMP"), 18, "<i", -4)):  # fmt: skip
        assert "nothing to see" in refused(data)


# ---- damage

CUT = {
    "PNG": encoded(photo(90, 70)), "JPEG": encoded(photo(90, 70), "JPEG"), "WEBP": encoded(photo(90, 70), "WEBP"),
    "progressive": encoded(photo(90, 70), "JPEG", progressive=True),
    "lossless": encoded(photo(90, 70), "WEBP", lossless=True), "GIF": encoded(photo(90, 70, "P"), "GIF"),
    "BMP": encoded(photo(90, 70), "BMP"), "TIFF": encoded(photo(90, 70), "TIFF"),
    "lzw": encoded(photo(90, 70), "TIFF", compression="tiff_lzw"),
    "interlaced": encoded(photo(90, 70, "P"), "GIF", interlace=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
@QUIET
def test_a_file_cut_short_is_refused_or_whole(name):
    data = CUT[name]
    want = pixels(open_picture(data))
    taken = 0
    for cut in range(50):
        try:
            picture = open_picture(data[: len(data) * cut // 50])
        except UsageError as error:
            check_message(error)
        else:
            taken += 1
            assert (pixels(picture) == want).all()
    assert taken < 5


@pytest.mark.parametrize("way", ["here", "in a child"])
def test_a_png_with_one_changed_byte_is_refused_wherever_it_is(way):
    """A changed byte of the pixels would be decoded to another picture, which a model describes all the same."""
    data, noisy = CUT["PNG"], encoded(Image.effect_noise((90, 70), 60), compress_level=0)
    with Decoders() as decoders:
        decode = decoders.decode if way == "in a child" else None
        for whole in (data, noisy):
            assert open_picture(whole + b"behind the end", decode=decode).size == (90, 70)
            for at in range(8, len(whole), 97 if way == "here" else 1999):
                with pytest.raises(UsageError) as info:
                    open_picture(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :], decode=decode)
                check_message(info.value)
    assert "checksum: send the original file" in refused(patched(noisy, len(noisy) // 2, "B", 3))


def mutations(data: bytes, count: int, seed: int):
    """Bytes changed, cut out, doubled, and sizes set to their ends."""
    draw = random.Random(seed)
    for _ in range(count):
        bad = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8, 40))):
            at = draw.randrange(len(bad))
            match draw.randrange(6):
                case 0 | 1:
                    bad[at] = draw.randrange(256)
                case 2:
                    bad[at] ^= 1 << draw.randrange(8)
                case 3:
                    bad[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
                case 4:
                    del bad[at : at + draw.randrange(1, 9)]
                case 5:
                    bad[at:at] = bad[at : at + draw.randrange(1, 60)]
            bad = bad or bytearray(b"\0")
        yield bytes(bad)


@pytest.mark.parametrize("name", CUT)
@QUIET
def test_mutated_files_are_refused_or_pictures(name):
    start, taken, count = time.process_time(), 0, 100
    for data in mutations(CUT[name], count, seed=17):
        try:
            picture = open_picture(data)
        except UsageError as error:
            check_message(error)
        else:
            taken += 1
            assert picture.image.mode == "RGB" and min(picture.size) > 0
            assert pixels(picture).shape == (*picture.size[::-1], 3)
    assert time.process_time() - start < 10
    assert taken < count
