"""Pictures from files, bytes, data URLs and the web to plain RGB, as a model is to see them.

Whatever the data are: size and kind are read from the header by a few lines of our own before a decoder sees anything,
and what a decoder says of damaged data never reaches a message (it may hold memory addresses or the data).
"""

import binascii
import hashlib
import io
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_llm.errors import EnvironmentProblem, UsageError, shown
from lite_llm.text.fetch import MOST_BYTES, Fetcher, Gone, is_picture_type
from lite_llm.text.headers import EXPECTED, FORMATS, MOST_EXTRA, MOST_PIXELS, check_size, check_sums, measure

if TYPE_CHECKING:
    import PIL.Image

    Source = str | Path | bytes | PIL.Image.Image

MOST_PICTURES = 64
"""In one conversation."""
MOST_TOGETHER = 2 * MOST_PIXELS
"""Pixels of all the pictures that are decoded for one prompt: they take 4 bytes each until they are cut to size."""

_COUNTED = 1 << 20  # bytes of a file whose frames are counted one by one, at some 10 us each
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Picture:
    """`image` is RGB and upright, and nobody else's; `digest` stands for its pixels and shape, and for nothing else."""

    image: "PIL.Image.Image"
    digest: str
    stored_size: tuple[int, int]  # width, height before it was turned upright
    stored_mode: str  # Pillow's
    notes: tuple[str, ...]  # what was done to it, for the user

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.size


Decode = Callable[[bytes, str], Picture]
"""(a file's bytes, what to call it in messages) -> what it shows; a UsageError if that cannot be."""


def open_picture(
    source: "Source", fetcher: Fetcher | None = None, decode: Decode | None = None, gone: Gone | None = None
) -> Picture:
    """One picture, decoded. A string is a path or a URL; http(s) URLs need a `fetcher`.

    `decode` stands for `decode_here`: `Decoders.decode` does it in another process. PIL images are decoded here.
    `gone` ends a download, see `Fetcher.fetch`.
    Raises a UsageError for anything that is not a whole picture of a known format and a bearable size.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise EnvironmentProblem(f"pictures need Pillow: {error}", "pip install pillow") from error

    decode = decode or decode_here
    if isinstance(source, PIL.Image.Image):
        return _from_image(source)
    if isinstance(source, str) and _SCHEME.match(source):
        if source[:5].lower() == "data:":
            return decode(_from_data_url(source), "the picture (data URL)")
        if fetcher is None:
            raise UsageError(f"{shown(source)}: URLs are not fetched here", "send the picture itself, as a data URL")
        return decode(fetcher.fetch(source, gone), "the picture (URL)")
    if isinstance(source, (str, Path)):
        return decode(_from_file(source), shown(str(source)))
    if isinstance(source, (bytes, bytearray, memoryview)):
        if (size := memoryview(source).nbytes) > MOST_BYTES:
            _too_heavy("the picture", size)
        return decode(bytes(source), "the picture")
    raise UsageError(f"a picture cannot be a {type(source).__name__}", "pass a path, bytes, a data URL or a PIL image")


def _from_file(source: str | Path) -> bytes:
    name, path = shown(str(source)), Path(source)
    try:
        path = path.expanduser()
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{name} is a directory", "name one picture")
        if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device never ends
            raise UsageError(f"{name} is not a file", "name a picture file")
        if found.st_size > MOST_BYTES:
            _too_heavy(name, found.st_size)
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{name}: there is no such file", "check the path") from None
    except PermissionError:
        raise UsageError(f"{name} may not be read", "change its permissions") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RuntimeError):  # a zero byte, a lone surrogate; "~" of somebody unknown
        raise UsageError(f"{name} is not a path", "check its characters") from None
    return data if len(data) <= MOST_BYTES else _too_heavy(name, len(data))


def _from_data_url(url: str) -> bytes:
    comma = url.find(",", 0, 1024)
    kind, *options = url[5 : max(comma, 0)].lower().split(";")
    if comma < 0 or not options or options[-1].strip() != "base64":
        raise UsageError("the data URL is not in base64", "expected data:image/png;base64,...")
    if not is_picture_type(kind.strip()):
        raise UsageError(f"the data URL holds {shown(kind)}; expected a picture", EXPECTED)
    if (len(url) - comma) * 3 // 4 > MOST_BYTES + 3:
        _too_heavy("the data URL", (len(url) - comma) * 3 // 4)
    try:
        return binascii.a2b_base64(url[comma + 1 :], strict_mode=True)
    except ValueError:  # binascii.Error is one, and so is what is said of characters that are not ASCII
        raise UsageError(
            "the data URL is not whole base64", "use the standard alphabet with its padding, without line breaks"
        ) from None


def _too_heavy(name: str, size: int) -> bytes:
    raise UsageError(f"{name} has {size:,} bytes; at most {MOST_BYTES:,} are taken", "send a smaller picture")


# ---- pixels


def decode_here(data: bytes, name: str) -> Picture:
    """A file's bytes as a picture; `name` is for messages. UsageError as `open_picture` raises it."""
    return decode_with_bytes(data, name)[0]


def decode_with_bytes(data: bytes, name: str) -> tuple[Picture, bytes]:
    """As `decode_here`, and the picture's pixels, three bytes each, row by row."""
    import PIL.Image

    kind, width, height = measure(data, name)
    if kind == "PNG":
        check_sums(data, name)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=[kind]) as image:
            check_size(name, *image.size)  # a decoder may read a header in another way
            mode = image.mode
            before = _orientation(image)  # Pillow turns a TIFF when it decodes it, and the others never
            image.load()
            after = _orientation(image)
            rgb, notes = _rgb(image, name)
            frames = _frames(image, kind, len(data))
    except (UsageError, KeyboardInterrupt):
        raise
    except MemoryError:
        raise UsageError(f"{name} takes more memory to decode than a picture may", "send it smaller") from None
    except Exception:  # decoders raise anything, and say in it where their objects lie
        raise UsageError(f"{name} is a {kind} that is damaged or cut short", "send the whole file") from None
    return _picture(rgb, after, max(before, after), (width, height), mode, [*frames, *notes])


def _from_image(source: "PIL.Image.Image") -> Picture:
    """A picture of Pillow's: the frame that it stands at. A file that Pillow has opened is decoded only if we would."""
    import PIL.ImageFile

    name = "the picture"
    if isinstance(source, PIL.ImageFile.ImageFile) and source.format not in (*FORMATS, "MPO"):
        raise UsageError(f"{name} is a file of format {shown(source.format)}", "decode it first: image.convert('RGB')")
    size, mode = source.size, source.mode
    check_size(name, *size)
    try:
        before = _orientation(source)
        source.load()
        after = _orientation(source)
        rgb, notes = _rgb(source, name)
    except UsageError:
        raise
    except Exception:
        raise UsageError(f"{name} (a PIL image) cannot be decoded", "check its file") from None
    return _picture(rgb, after, max(before, after), size, mode, notes)[0]


def _picture(
    rgb: "PIL.Image.Image", turn: int, turned: int, size: tuple[int, int], mode: str, notes: list[str]
) -> tuple[Picture, bytes]:
    import PIL.Image

    way = PIL.Image.Transpose
    ways = {
        2: way.FLIP_LEFT_RIGHT, 3: way.ROTATE_180, 4: way.FLIP_TOP_BOTTOM, 5: way.TRANSPOSE, 6: way.ROTATE_270,
        7: way.TRANSVERSE, 8: way.ROTATE_90,
    }  # fmt: skip
    if turn in ways:
        rgb = rgb.transpose(ways[turn])
    if turned in ways:
        notes = [*notes, f"turned by EXIF {turned}"]
    rgb.info = {}  # profiles and comments are of no use to a model, and may be large
    hashed = hashlib.blake2b(b"%d x %d" % rgb.size, digest_size=32)
    pixels = rgb.tobytes()
    hashed.update(pixels)
    return Picture(rgb, hashed.hexdigest(), size, mode, tuple(notes)), pixels


def _orientation(image: "PIL.Image.Image") -> int:
    """1 (upright) to 8 as EXIF or XMP say; 1 if they are unreadable, for the picture is not."""
    if len(image.info.get("exif") or b"") > MOST_EXTRA:
        return 1
    try:
        value = image.getexif().get(0x0112)
    except Exception:
        return 1
    return value if value in range(2, 9) else 1


def _frames(image: "PIL.Image.Image", kind: str, size: int) -> list[str]:
    if kind == "JPEG":  # phones put depth and brightness behind the photo as further ones
        return []
    try:
        if size <= _COUNTED or kind in ("PNG", "WEBP"):
            count = getattr(image, "n_frames", 1)
        else:
            count = "several" if image.is_animated else 1
    except Exception:  # a later frame is damaged, which is no matter here
        count = "several"
    return [f"first of {count} frames"] if count != 1 else []


def _rgb(image: "PIL.Image.Image", name: str) -> tuple["PIL.Image.Image", list[str]]:
    """A new RGB picture with nothing behind it but white."""
    import PIL.Image

    if image.mode.startswith(("I", "F")):
        return _from_numbers(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            white = PIL.Image.new("RGBA", image.size, "white")
            return PIL.Image.alpha_composite(white, image).convert("RGB"), ["alpha laid on white"]
    try:
        return image.convert("RGB"), []
    except ValueError:  # LAB
        raise UsageError(f"{name} has colours of mode {image.mode}", "save it as RGB") from None


def _from_numbers(image: "PIL.Image.Image") -> tuple["PIL.Image.Image", list[str]]:
    """Grey of 16 or 32 bits, and notes on it. 16 bits become 8. Others do not say what their white is: it is guessed to
    be 1 (of fractions), 255 or 65,535, or else they are spread from their least value to their greatest."""
    import numpy as np
    import PIL.Image

    values = np.asarray(image).astype(np.float32)
    notes = [] if np.isfinite(values).all() else ["NaN and infinity taken as 0"]
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(-1e30, 1e30)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        top = next((top for top in (1.0, 255.0, 65535.0)[image.mode != "F" :] if high <= top), None)
        if low >= 0 and top is not None:
            low, high, how = 0.0, top, "taken as"
        else:
            how = "spread over"
        notes.append(f"values from {low:g} to {high:g} {how} black to white")
    grey = np.rint((values - low) * (255.0 / max(high - low, 1e-30))).astype(np.uint8)
    return PIL.Image.fromarray(grey).convert("RGB"), notes


# ---- messages


def take_pictures(messages: Sequence[Mapping[str, Any]], local: bool = True) -> tuple[list[Any], list["Source"]]:
    """Messages for the chat template, whose pictures are bare {"type": "image"}, and the pictures' sources in order.

    A part is {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}} with an http(s) or data
    URL (OpenAI's), or {"type": "image"} with one of "url", "path" and "image" (anything that `open_picture` takes).
    Without `local`, as for messages from a network, only URLs count: no file of this machine is opened. What is wrong
    with a message otherwise is left to the template's own check.
    """
    sources: list[Source] = []
    kept: list[Any] = []
    for index, message in enumerate(messages if isinstance(messages, (list, tuple)) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (list, tuple)):
            parts = []
            for number, part in enumerate(content):
                where = f"messages[{index}].content[{number}]"
                source = _source(where, part, local)
                if source is not None:
                    sources.append(source)
                parts.append(part if source is None else {"type": "image"})
            message = {**message, "content": parts}
        kept.append(message)
    if len(sources) > MOST_PICTURES:
        raise UsageError(f"{len(sources)} pictures in one conversation; at most {MOST_PICTURES} are taken")
    return kept, sources


def _source(where: str, part: Any, local: bool) -> Any:
    """None for text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return None
    if kind == "image_url":
        _check_keys(where, part, {"type", "image_url"})
        inner = part.get("image_url")
        if isinstance(inner, Mapping):
            _check_keys(f"{where}.image_url", inner, {"url", "detail"})
            inner = inner.get("url")
        return _url(f"{where}.image_url", inner)
    if kind != "image":
        raise UsageError(f"{where}.type = {shown(kind)}; known: 'text', 'image', 'image_url'")
    _check_keys(where, part, {"type", "image", "path", "url"})
    given = [key for key in ("image", "path", "url") if key in part]
    if len(given) != 1:
        raise UsageError(f"{where} has {' and '.join(given) or 'no picture'}", "give one of 'image', 'path' and 'url'")
    key, value = given[0], part[given[0]]
    if value is None:
        raise UsageError(f"{where}.{key} is None; expected a picture")
    if key == "url":
        return _url(f"{where}.url", value)
    if not local:
        raise UsageError(f"{where}.{key}: files of this machine are not opened for messages", "send a data URL")
    if key == "path" and not isinstance(value, (str, Path)):
        raise UsageError(f"{where}.path is a {type(value).__name__}; expected a path")
    return Path(value) if key == "path" else value


def _url(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.lower().startswith(("data:", "http://", "https://")):
        what = shown(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise UsageError(f"{where} is {what}; expected an http(s) or data URL")
    return value


def _check_keys(where: str, part: Mapping, known: set[str]) -> None:
    unknown = [key for key in part if key not in known]
    if unknown:
        raise UsageError(f"{where} has {shown(unknown[0])}; known: {', '.join(sorted(known))}")


# ---- for a terminal


def preview(picture: Picture, width: int, height: int, colour: bool) -> str:
    """The picture in at most `width` x `height` characters, each of them two square pixels, one above the other.

    `colour` is 24-bit; without it, black and white dots. Lines end in newlines, the last one too.
    """
    import PIL.Image

    wide, high = picture.size
    scale = min(width / wide, 2 * height / high, 1.0)
    size = max(int(wide * scale), 1), max(int(high * scale), 1)
    small = picture.image.resize(size, PIL.Image.Resampling.BOX)
    rows = list(range(0, size[1], 2))
    if not colour:
        dots = small.convert("1").load()
        return "".join(
            "".join(" ▀▄█"[bool(dots[x, y]) + 2 * (y + 1 < size[1] and bool(dots[x, y + 1]))] for x in range(size[0]))
            + "\n"
            for y in rows
        )
    lines, pixels = [], small.load()
    for y in rows:
        for x in range(size[0]):
            lines.append(f"\x1b[38;2;{_rgb_code(pixels[x, y])}m")
            lines.append(f"\x1b[48;2;{_rgb_code(pixels[x, y + 1])}m▀" if y + 1 < size[1] else "▀")
        lines.append("\x1b[0m\n")
    return "".join(lines)


def _rgb_code(pixel: tuple[int, int, int]) -> str:
    return ";".join(map(str, pixel))
