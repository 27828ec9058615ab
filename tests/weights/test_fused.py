"""LDR-11, -12, -14, -16, -17: a fused directory holds the same weights, is the same each time, or is an error."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lite_llm.errors import BadCheckpoint, SourceProblem, UsageError
from lite_llm.weights import load_weights, open_checkpoint
from lite_llm.weights.fused import verify_fused, write_fused
from lite_llm.weights.random import hf_shapes
from tests.weights.tiny import bits, build, config_of, same, tensors_of, write

ROOT = Path(__file__).parent.parent.parent


def convert(source, out, dtype=torch.bfloat16, **options):
    model, rules = build(source, dtype, "meta")
    write_fused(model, rules, source, out, **options)
    return out


def contents(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(directory.iterdir())}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", config_of(), shards=2)


@pytest.fixture
def fused(source):
    return convert(source, source.parent / "fused")


@pytest.mark.parametrize("shape", ["tiny-llama-3.2-1b", "tiny-llama-2-7b", "tiny-qwen2.5-7b", "tiny-qwen3-8b"])
def test_both_directories_load_to_the_same_bits(shape, tmp_path):
    source = write(tmp_path / "source", config_of(shape))
    out = convert(source, tmp_path / "out")
    models = []
    for directory in (source, out):
        checkpoint = open_checkpoint(directory)
        model, rules = build(directory)
        load_weights(model, checkpoint, rules)
        assert checkpoint.fused == (directory == out)
        assert (model.head.weight is model.embed.weight) == config_of(shape)["tie_word_embeddings"]
        models.append(bits(model))
    assert same(*models)
    verify_fused(out)


def test_it_is_a_valid_safetensors_file_of_our_parameters(source, fused):
    model, _ = build(source)
    tensors = tensors_of(config_of())
    with safe_open(fused / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "lite_llm-fused"
        assert set(file.keys()) == dict(model.named_parameters()).keys()
        parts = [tensors[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"]
        assert torch.equal(file.get_tensor("blocks.0.attn.qkv.weight"), torch.cat(parts))
    assert (fused / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (fused / "generation_config.json").exists() and not list(fused.glob("*.py"))


def test_parameters_are_views_of_the_file(fused):
    model, rules = build(fused)
    load_weights(model, open_checkpoint(fused), rules)
    starts = [param.data_ptr() for param in model.parameters()]
    assert max(starts) - min(starts) < (fused / "model.safetensors").stat().st_size


def test_a_fused_directory_loads_in_another_dtype(source, fused):
    models = []
    for directory in (source, fused):
        model, rules = build(directory, torch.float32)
        load_weights(model, open_checkpoint(directory), rules)
        models.append({name: param.clone() for name, param in model.named_parameters()})
    assert same(*models)


def test_a_conversion_to_another_dtype_says_so_in_the_config(source, tmp_path):
    out = convert(source, tmp_path / "out", torch.float16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert open_checkpoint(out).dtype == torch.float16
    verify_fused(out)


def test_converting_twice_gives_the_same_bytes(source, tmp_path):
    code = "import sys; from tests.weights.test_fused import *; convert(Path(sys.argv[1]), Path(sys.argv[2]))"
    for name, locale in (("one", "C"), ("two", "C.UTF-8")):
        settings = {**os.environ, "PYTHONHASHSEED": str(len(locale)), "LC_ALL": locale, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, source, tmp_path / name], env=settings, check=True, cwd=ROOT)
    one, two = ({name: data for name, (data, _) in contents(tmp_path / n).items()} for n in ("one", "two"))
    assert one == two


def test_a_flipped_bit_is_found_by_the_tensors_name(fused):
    path = fused / "model.safetensors"
    whole = path.read_bytes()
    for name, entry in open_checkpoint(fused).entries.items():
        data = bytearray(whole)
        data[entry.start + entry.nbytes // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=f"tensor {name}$|tensor {name}:"):
            verify_fused(fused)
    path.write_bytes(whole)
    (fused / "generation_config.json").write_text("[]")
    with pytest.raises(BadCheckpoint, match="file generation_config.json"):
        verify_fused(fused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "without its manifest"),
        (lambda d: (d / "manifest.json").write_text("{}"), "not of a lite_llm"),
        (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda d: edit(d, version=2), "version = 2"),
        (lambda d: edit(d, files=3), "damaged"),
        (lambda d: edit(d, tensors={}), "different tensors"),
        (lambda d: edit(d, files={"../x": {"size": 1, "sha256": ""}}), "'../x'"),
        (
            lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace("1e-05", "2e-05")),
            "changed",
        ),
        (lambda d: (d / "generation_config.json").unlink(), "lacks the file"),
        (lambda d: os.truncate(d / "model.safetensors", 1000), "bytes; manifest.json says"),
    ],
)
def test_a_directory_that_is_not_what_was_written_is_refused(change, message, fused):
    change(fused)
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(fused)


def edit(directory, **facts):
    table = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**table, **facts}))


def test_another_models_weights_are_refused(fused, tmp_path):
    other, rules = build(write(tmp_path / "other", config_of("tiny-qwen3-8b")))
    with pytest.raises(BadCheckpoint, match="it lacks blocks.0.attn.k_norm.weight"):
        load_weights(other, open_checkpoint(fused), rules)


def test_a_source_that_does_not_fit_leaves_nothing(tmp_path):
    tensors = tensors_of(config_of())
    tensors["model.norm.weight"][0] = float("nan")
    source = write(tmp_path / "source", config_of(), tensors)
    with pytest.raises(BadCheckpoint, match="model.norm.weight"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_target_may_not_be_the_source(source, fused, tmp_path):
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inside", source.parent, tmp_path / "link"):
        with pytest.raises(UsageError):
            convert(source, out, overwrite=True)
    with pytest.raises(UsageError, match="fused directory already"):
        convert(fused, tmp_path / "again")
    assert contents(source) == before


def test_only_a_converted_directory_is_overwritten(source, fused, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        convert(source, fused)
    convert(source, fused, torch.float32, overwrite=True)
    assert open_checkpoint(fused).dtype == torch.float32
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="other files"):
        convert(source, tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "mine", "source"]


@pytest.fixture
def short_disk():
    """No file may grow beyond 100 KB: the kernel's own refusal in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_changes_nothing(source, fused, short_disk):
    before = contents(source), contents(fused)
    for out, overwrite in ((fused, True), (source.parent / "other", False)):
        with pytest.raises(SourceProblem) as error:
            convert(source, out, overwrite=overwrite)
        assert error.value.exit_code == 6
    assert (contents(source), contents(fused)) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["fused", "source"]


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_cannot_sync_changes_nothing(fault, source, fused, monkeypatch):
    def broken(file):
        raise OSError(fault, os.strerror(fault))

    before = contents(source), contents(fused)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SourceProblem, match=os.strerror(fault)):
        convert(source, fused, overwrite=True)
    assert (contents(source), contents(fused)) == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["fused", "source"]


def test_a_full_disk_is_seen_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(SourceProblem, match="free"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_place_that_cannot_be_written_is_an_error(source):
    with pytest.raises(SourceProblem):
        convert(source, Path("/proc/fused"))
    with pytest.raises(UsageError, match="create it first"):
        convert(source, source.parent / "nowhere" / "out")


def test_a_source_that_changes_is_noticed(source, tmp_path):
    def touch(done, total):
        os.utime(source / "config.json")

    with pytest.raises(BadCheckpoint, match="changed during the conversion"):
        convert(source, tmp_path / "out", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


PEAK = """
import re, sys
import torch
from tests.weights.test_fused import Path, convert

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
small, source, out = map(Path, sys.argv[1:])
convert(small, out)  # pages in the code
before = memory("VmRSS")
convert(source, out, overwrite=True)
print(memory("VmHWM") - before)
"""


def test_a_model_larger_than_the_memory_is_streamed(tmp_path):
    config = config_of(hidden_size=1024, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in hf_shapes(config).items()}
    source = write(tmp_path / "source", config, tensors, shards=2)
    small = write(tmp_path / "small", config_of())
    run = subprocess.run(
        [sys.executable, "-c", PEAK, small, source, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    biggest = max(entry.nbytes for entry in checkpoint.entries.values())
    assert checkpoint.nbytes > 4 * (3 * biggest + 30e6)
    assert int(run.stdout) < 3 * biggest + 30e6  # on top of Python and torch


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bits(source, fused):
    models = []
    for directory in (source, fused):
        model, rules = build(directory, device="cuda")
        load_weights(model, open_checkpoint(directory), rules)
        models.append(bits(model.cpu()))
    assert same(*models)


@pytest.mark.gpu
def test_a_gpu_refuses_what_is_not_finite(tmp_path):
    tensors = tensors_of(config_of())
    tensors["model.norm.weight"][3] = float("nan")
    source = write(tmp_path / "source", config_of(), tensors)
    model, rules = build(source, device="cuda")
    with pytest.raises(BadCheckpoint, match="model.norm.weight: 1 of"):
        load_weights(model, open_checkpoint(source), rules)
