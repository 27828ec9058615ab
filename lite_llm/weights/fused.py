"""The fused directory: the model's own parameters in one safetensors file, with config, tokenizer and checksums.

It is written one parameter at a time from a model on the meta device, so it needs the memory of the biggest one only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lite_llm.errors import BadCheckpoint, SourceProblem, UsageError
from lite_llm.jsonfile import read_object
from lite_llm.weights.files import SINGLE, Checkpoint, contained, open_checkpoint
from lite_llm.weights.header import NAMES
from lite_llm.weights.loading import Progress, require_fit
from lite_llm.weights.manifest import (
    MANIFEST,
    METADATA_FORMAT,
    VERSION,
    FileRecord,
    Manifest,
    TensorRecord,
    read_manifest,
    sha256,
)
from lite_llm.weights.publish import new_directory, require_apart
from lite_llm.weights.rules import Filling, Piece, Rules, place

CONFIG = "config.json"
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
)
_ALIGN = 64


def write_fused(
    model: nn.Module,
    rules: Rules,
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert a Hugging Face directory. `model` is on the meta device, in the dtype to write.

    `out` appears whole or not at all; an old one is replaced in one step. Twice the same source gives the same bytes.
    """
    source, out = Path(source), Path(out)
    require_apart(source, out)
    checkpoint = open_checkpoint(source)
    if checkpoint.fused:
        raise UsageError(f"{source} is a fused directory already", "convert the Hugging Face directory it came from")
    require_fit(model, checkpoint, rules)
    if overwrite:
        _require_replaceable(out)
    before = _state(checkpoint)
    with new_directory(out, overwrite=overwrite) as partial:
        size = sum(param.nbytes for param in model.parameters())
        if (free := shutil.disk_usage(partial).free) < size:
            raise SourceProblem(f"{out} needs {size / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free")
        files = _companions(source, partial, next(model.parameters()).dtype)
        tensors, digest = _write_tensors(partial / SINGLE, model, rules, checkpoint, progress)
        files[SINGLE] = FileRecord((partial / SINGLE).stat().st_size, digest)
        if _state(checkpoint) != before:
            raise BadCheckpoint(f"{source} was changed during the conversion", "convert again")
        names = {CONFIG} | {entry.file.name for entry in checkpoint.entries.values()}
        Manifest(
            architecture=_architecture(source),
            files=files,
            tensors=tensors,
            source_files={name: (source / name).stat().st_size for name in sorted(names)},
            source_config_sha256=sha256(source / CONFIG),
        ).write(partial)


def verify_fused(directory: Path, progress: Progress | None = None) -> None:
    """Compare every tensor and file with the manifest's checksums. BadCheckpoint names all that are damaged."""
    directory = Path(directory)
    manifest, checkpoint = read_manifest(directory), open_checkpoint(directory)
    damaged, done = [], 0
    for name, tensor in checkpoint.tensors():
        if hashlib.sha256(_raw(tensor)).hexdigest() != manifest.tensors[name].sha256:
            damaged.append(f"tensor {name}")
        done += tensor.nbytes
        if progress is not None:
            progress(done, checkpoint.nbytes)
    for name, record in manifest.files.items():
        if (name != SINGLE or not damaged) and sha256(directory / name) != record.sha256:
            damaged.append(f"file {name}")
    if damaged:
        raise BadCheckpoint(f"{directory} is damaged: checksum of {', '.join(damaged[:8])}", "convert the source again")


def _write_tensors(
    path: Path, model: nn.Module, rules: Rules, checkpoint: Checkpoint, progress: Progress | None
) -> tuple[dict[str, TensorRecord], str]:
    params = dict(model.named_parameters())
    with path.open("wb") as file, ThreadPoolExecutor(2) as pool:
        writer = _Writer(file, pool)
        writer.write(_header(params))
        records, done, total = {}, 0, sum(param.nbytes for param in params.values())
        for name, tensor in _assembled(model, rules, checkpoint):
            digest = writer.write(_raw(tensor))
            records[name] = TensorRecord(NAMES[tensor.dtype], list(tensor.shape), digest)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    return records, writer.whole.hexdigest()


class _Writer:
    """Writes and hashes at once: the three take about the same time and release the interpreter lock."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor):
        self.file, self.pool, self.whole = file, pool, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> str:
        one = hashlib.sha256()
        hashes = [self.pool.submit(sha.update, data) for sha in (self.whole, one)]
        self.file.write(data)
        for done in hashes:
            done.result()
        return one.hexdigest()


@torch.no_grad()
def _assembled(model: nn.Module, rules: Rules, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in order, filled by the layers' own `load`; only one of them is ever in memory."""
    filling = Filling(model, rules)
    owners: dict[str, list[str]] = {name: [] for name in filling.filled}
    sources: dict[str, dict[str, None]] = {name: {} for name in filling.filled}
    for alias, owner in filling.canonical.items():
        owners[owner].append(alias)
    for name, meta in checkpoint.metas():
        for piece in place(name, meta, rules):
            sources[filling.canonical[piece.parameter]][name] = None

    for owner, meta in list(model.named_parameters()):
        real = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype), requires_grad=False)
        for alias in owners[owner]:
            _replace(model, alias, real)
        for name in sources[owner]:
            for piece in _pieces_of(owner, name, checkpoint.tensor(name), rules, filling):
                filling.add(name, piece)
        yield owner, real.data
        for alias in owners[owner]:
            _replace(model, alias, meta)
        del real
    filling.finish()


def _pieces_of(owner: str, name: str, tensor: Tensor, rules: Rules, filling: Filling) -> list[Piece]:
    return [piece for piece in place(name, tensor, rules) if filling.canonical[piece.parameter] == owner]


def _replace(model: nn.Module, name: str, param: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, param)


def _header(params: dict[str, Tensor]) -> bytes:
    """Padded so that the first tensor starts at a multiple of 64 bytes; the others follow without a gap."""
    table: dict[str, object] = {"__metadata__": {"format": METADATA_FORMAT, "version": str(VERSION)}}
    start = 0
    for name, param in params.items():
        end = start + param.nbytes
        table[name] = {"dtype": NAMES[param.dtype], "shape": list(param.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _companions(source: Path, partial: Path, dtype: torch.dtype) -> dict[str, FileRecord]:
    """Copy config, tokenizer and the like; config.json states the dtype that is written."""
    for name in (CONFIG, *_COMPANIONS):
        if name == CONFIG or os.path.lexists(source / name):
            (partial / name).write_bytes(contained(source, name).read_bytes())
    config, stated = read_object(partial / CONFIG), str(dtype).removeprefix("torch.")
    if config.get("dtype", config.get("torch_dtype")) != stated:
        config.pop("torch_dtype", None)
        text = json.dumps({**config, "dtype": stated}, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
    return {path.name: FileRecord(path.stat().st_size, sha256(path)) for path in sorted(partial.iterdir())}


def _architecture(source: Path) -> str:
    names = read_object(source / CONFIG).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _state(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    files = {checkpoint.directory / CONFIG} | {entry.file for entry in checkpoint.entries.values()}
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]


def _require_replaceable(out: Path) -> None:
    """Overwriting replaces a whole directory: only one that a converter wrote, or an empty one."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise UsageError(f"{out} is no directory", "--overwrite replaces a converted directory only")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise UsageError(f"{out} holds other files", "--overwrite replaces a converted directory only")
