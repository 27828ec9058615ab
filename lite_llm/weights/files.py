"""Checkpoint directories: which tensors there are and where, checked from the headers before any data is read."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lite_llm.errors import BadCheckpoint
from lite_llm.jsonfile import read_object
from lite_llm.weights.header import MAX_HEADER, Entry, read_header
from lite_llm.weights.manifest import MANIFEST, METADATA_FORMAT, Manifest, read_manifest
from lite_llm.weights.stream import Range, stream

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory. `manifest` is that of a fused directory, None for a Hugging Face one."""

    directory: Path
    entries: Mapping[str, Entry]
    manifest: Manifest | None = None

    @property
    def fused(self) -> bool:
        return self.manifest is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored; of the memory that loading takes if no dtype is converted."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most bytes have."""
        total: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            total[entry.dtype] = total.get(entry.dtype, 0) + entry.nbytes
        return max(total, key=lambda dtype: total[dtype])

    def names(self) -> list[str]:
        return list(self.entries)

    def metas(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor without its data, for a proof that it fits a model."""
        for name, entry in self.entries.items():
            yield name, torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file. On a CPU they are views of the mapped file: read only, and valid while kept.

        A file that is truncated while mapped ends the process (SIGBUS); replacing it by rename is safe.
        """
        device = torch.device(device)
        by_file = sorted(self.entries.items(), key=lambda item: (item[1].file, item[1].start))
        if device.type == "cpu":
            for file in dict.fromkeys(entry.file for _, entry in by_file):
                with _mapped(file) as opened:
                    for name, entry in by_file:
                        if entry.file == file:
                            yield name, _get(opened, name, entry)
            return
        waiting = {}

        def ranges() -> Iterator[Range]:
            for name, entry in by_file:
                tensor = torch.empty(entry.shape, dtype=entry.dtype, device=device)
                waiting[name] = tensor
                yield Range(name, entry.file, entry.start, tensor.view(-1).view(torch.uint8))

        for name in stream(ranges(), device):
            yield name, waiting.pop(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as a view of its own mapping of the file."""
        with _mapped(self.entries[name].file) as opened:
            return _get(opened, name, self.entries[name])


def open_checkpoint(directory: Path) -> Checkpoint:
    """A Hugging Face or fused directory, with every header read and checked. BadCheckpoint says what is wrong."""
    try:
        return _open(Path(directory))
    except OSError as error:
        raise BadCheckpoint(f"{directory} cannot be read: {error.strerror}") from None


def _open(directory: Path) -> Checkpoint:
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise BadCheckpoint(f"{directory} {what}", "pass a model directory with config.json and *.safetensors")
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        return Checkpoint(directory, _fused_entries(directory, manifest), manifest)
    single, index = (os.path.lexists(directory / name) for name in (SINGLE, INDEX))
    if index and single:
        raise BadCheckpoint(f"{directory} holds both {SINGLE} and {INDEX}", "remove the one that is out of date")
    if index:
        return Checkpoint(directory, _sharded_entries(directory))
    if not single:
        raise _nothing_to_read(directory)
    entries, metadata = read_header(contained(directory, SINGLE))
    if metadata.get("format") == METADATA_FORMAT:
        raise BadCheckpoint(f"{directory} is a fused directory without its {MANIFEST}", "convert the source again")
    if not entries:
        raise BadCheckpoint(f"{directory / SINGLE} holds no tensors")
    return Checkpoint(directory, entries)


def contained(directory: Path, name: str) -> Path:
    """The regular file `name` of a model directory. BadCheckpoint if a link leads out of the directory.

    In a Hugging Face cache, snapshots/REVISION/file may link to blobs/HASH of the same model.
    """
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise BadCheckpoint(f"{directory}: {name[:200]!r} is no plain file name", "nothing outside is opened")
    path, root = directory / name, directory.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadCheckpoint(f"{path} is missing or a broken link", "the download is not complete") from None
    inside = real.is_relative_to(root)
    if root.parent.name == "snapshots":
        inside = inside or real.is_relative_to(root.parent.parent / "blobs")
    if not inside:
        raise BadCheckpoint(f"{path} links to {real}, outside the model directory", "put the file itself there")
    if not real.is_file():
        raise BadCheckpoint(f"{path} is not a regular file")
    return path


def _fused_entries(directory: Path, manifest: Manifest) -> dict[str, Entry]:
    path = directory / SINGLE
    entries, metadata = read_header(contained(directory, SINGLE))
    if metadata.get("format") != METADATA_FORMAT:
        raise BadCheckpoint(f"{path}: format {metadata.get('format')!r}; {MANIFEST} promises {METADATA_FORMAT!r}")
    if {name: (e.dtype, e.shape) for name, e in entries.items()} != manifest.tensors_as_stored():
        raise BadCheckpoint(f"{path} and {MANIFEST} name different tensors, shapes or dtypes", "convert again")
    return entries


def _sharded_entries(directory: Path) -> dict[str, Entry]:
    index = directory / INDEX
    weight_map = read_object(contained(directory, INDEX), MAX_HEADER).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise BadCheckpoint(f"{index}: weight_map is no table from tensor names to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        plain = shard.isprintable() and len(shard) < 200 and shard == Path(shard).name and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{index}: weight_map names the file {shard[:200]!r}; expected a plain *.safetensors name",
                "nothing outside the directory and no pickle is opened",
            )
    if missing := [shard for shard in shards if not (directory / shard).exists()]:
        raise BadCheckpoint(
            f"{directory} lacks {len(missing)} of {len(shards)} files that {INDEX} names: {', '.join(missing)}",
            "the download is not complete: run it again",
        )
    on_disk = {path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name)}
    if extra := sorted(on_disk - set(shards)):
        raise BadCheckpoint(f"{directory} holds files that {INDEX} does not name: {', '.join(extra)}", "remove them")
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(contained(directory, shard))[0].items():
            if name in entries:
                raise BadCheckpoint(f"{directory}: tensor {name!r} is in {entries[name].file.name} and in {shard}")
            if weight_map.get(name) != shard:
                raise BadCheckpoint(f"{directory / shard}: tensor {name!r}: {INDEX} has it in {weight_map.get(name)}")
            entries[name] = entry
    if lost := sorted(weight_map.keys() - entries.keys()):
        raise BadCheckpoint(
            f"{directory / weight_map[lost[0]]} lacks {lost[0]!r}, which {INDEX} places there"
            + (f" ({len(lost)} tensors in all)" if len(lost) > 1 else "")
        )
    return entries


def _nothing_to_read(directory: Path) -> BadCheckpoint:
    if any(directory.glob("*.incomplete")):
        return BadCheckpoint(f"{directory} holds an incomplete download", "run the download again")
    if shards := sorted(path.name for path in directory.glob("*.safetensors")):
        if "adapter_model.safetensors" in shards:
            return BadCheckpoint(f"{directory} holds an adapter, not a model", "merge it into its base model first")
        return BadCheckpoint(
            f"{directory} holds {', '.join(shards[:4])}, but neither {SINGLE} nor {INDEX}",
            "the download is not complete",
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return BadCheckpoint(
            f"{directory} holds its weights as pickle ({', '.join(pickles[:4])}), which can run any code when opened; "
            "only safetensors is read",
            "take a revision with *.safetensors, or convert where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )
    return BadCheckpoint(f"{directory} holds no weights", f"expected {SINGLE}, or {INDEX} and its files")


def _mapped(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None


def _get(opened: safe_open, name: str, entry: Entry) -> Tensor:
    """A tensor that still is what the header said when the checkpoint was opened."""
    try:
        tensor = opened.get_tensor(name)
    except SafetensorError as error:
        raise BadCheckpoint(f"{entry.file}: tensor {name!r}: {error}") from None
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise BadCheckpoint(f"{entry.file}: tensor {name!r} changed while the file was read")
    return tensor
