"""The header of a safetensors file, read strictly: also what the library lets through is refused.

Layout: 8 bytes little-endian length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the data.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lite_llm.errors import BadCheckpoint
from lite_llm.jsonfile import parse_object

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20  # the format allows 100 MB; 16 MiB name more than 100,000 tensors
_NO_SAFETENSORS = {
    b"PK\x03\x04": "it looks like a pickle (torch.save) under another name; it was not opened",
    b"\x80\x02": "it looks like a pickle under another name; it was not opened",
    b"version ": "it looks like a Git LFS pointer: run `git lfs pull`",
    b"<!DOCTYP": "it looks like a web page: download the file again",
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `nbytes` bytes from byte `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. BadCheckpoint with the tensor, if one is at fault."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            if len(first) < 8:
                raise BadCheckpoint(f"{path} has {size} bytes; a safetensors file has at least 10", "download it again")
            length = int.from_bytes(first, "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                hint = next((h for magic, h in _NO_SAFETENSORS.items() if first.startswith(magic)), "download it again")
                raise BadCheckpoint(
                    f"{path} is not a safetensors file or is damaged: its header would have {length} bytes; "
                    f"the file has {size}, a header at most {MAX_HEADER}",
                    hint,
                )
            text = file.read(length)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    header = parse_object(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{path}: __metadata__ is not a table of strings")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _require_gapless(path, entries, 8 + length, size)
    return entries, metadata


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    def wrong(what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{path}: tensor {name[:200]!r}: {what}", "the file is damaged: download it again")

    if not name or len(name) > 1000 or not name.isprintable():
        raise wrong("its name is empty, longer than 1000 characters or not printable")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise wrong(f"dtype = {str(value['dtype'])[:80]!r}; supported: {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _sizes(shape) or len(shape) > 8 or 0 in shape:
        raise wrong(f"shape = {str(shape)[:80]}; expected at most 8 sizes of at least 1")
    if not _sizes(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets = {str(offsets)[:80]}; expected two byte offsets")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise wrong(f"{value['dtype']} {shape} takes {nbytes} bytes, data_offsets = {offsets} hold another number")
    return Entry(path, dtype, tuple(shape), data + offsets[0], nbytes)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _require_gapless(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != start:
            raise BadCheckpoint(
                f"{path}: tensor {name!r} starts at byte {entry.start}; expected {start}: data overlap or have a hole",
                "the file is damaged: download it again",
            )
        start += entry.nbytes
    if start != size:
        raise BadCheckpoint(
            f"{path} has {size} bytes; its header describes {start}",
            "the download is not complete" if size < start else "the file is damaged: download it again",
        )
