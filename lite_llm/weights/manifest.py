"""The manifest of a fused directory: what was written, from what, with a checksum of every file and tensor."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lite_llm.errors import BadCheckpoint
from lite_llm.jsonfile import read_object
from lite_llm.weights.header import DTYPES, MAX_HEADER

MANIFEST = "manifest.json"
METADATA_FORMAT = "lite_llm-fused"
VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    dtype: str  # as safetensors names it
    shape: list[int]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    architecture: str
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    source_files: dict[str, int]  # name -> size
    source_config_sha256: str

    def tensors_as_stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        return {name: (DTYPES.get(t.dtype), tuple(t.shape)) for name, t in self.tensors.items()}

    def write(self, directory: Path) -> None:
        table = {"format": METADATA_FORMAT, "version": VERSION, **asdict(self)}
        (directory / MANIFEST).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest, with its version, the sizes of all files and the hash of config.json checked."""
    path = directory / MANIFEST
    table = read_object(path, MAX_HEADER)
    if table.pop("format", None) != METADATA_FORMAT:
        raise BadCheckpoint(f"{path} is not of a lite_llm fused directory")
    version = table.pop("version", None)
    if version != VERSION:
        raise BadCheckpoint(f"{path}: version = {version!r}; this lite_llm reads {VERSION}", "convert the source again")
    manifest = _typed(path, table)
    for name, record in manifest.files.items():
        file = directory / name
        if name != Path(name).name or not file.is_file():
            raise BadCheckpoint(f"{directory} lacks the file {name!r} of its {MANIFEST}", "convert the source again")
        if file.stat().st_size != record.size:
            raise BadCheckpoint(f"{file} has {file.stat().st_size} bytes; {MANIFEST} says {record.size}")
    for name in ("config.json", "model.safetensors"):
        if name not in manifest.files:
            raise BadCheckpoint(f"{path} does not list {name}")
    if sha256(directory / "config.json") != manifest.files["config.json"].sha256:
        raise BadCheckpoint(
            f"{directory / 'config.json'} was changed after the conversion", "change the source's and convert again"
        )
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _typed(path: Path, table: dict[str, Any]) -> Manifest:
    try:
        table["files"] = {name: FileRecord(**record) for name, record in table["files"].items()}
        table["tensors"] = {name: TensorRecord(**record) for name, record in table["tensors"].items()}
        manifest = Manifest(**table)
        manifest.tensors_as_stored()
    except (TypeError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}", "convert the source again") from None
    return manifest
