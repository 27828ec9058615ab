"""LDR-04, -05, -06: what a directory may hold and may point to; nothing outside it is opened, nothing in it runs."""

import json
import os
import pickle
import shutil

import pytest
import torch

from lite_llm.errors import BadCheckpoint
from lite_llm.weights import load_weights, open_checkpoint
from lite_llm.weights.stream import BUFFERS, Range, stream
from tests.weights.tiny import bits, build, config_of, same, tensors_of, write

INDEX = "model.safetensors.index.json"


def refused(directory):
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(directory)
    return str(error.value)


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "model", config_of(), shards=3)


def reindex(directory, change):
    table = json.loads((directory / INDEX).read_text())
    change(table["weight_map"])
    (directory / INDEX).write_text(json.dumps(table))


def test_shards_and_one_file_load_the_same(tmp_path, sharded):
    single = write(tmp_path / "single", config_of())
    models = []
    for directory in (sharded, single):
        checkpoint = open_checkpoint(directory)
        assert not checkpoint.fused and checkpoint.names() == list(checkpoint.shapes)
        assert checkpoint.nbytes == sum(t.nbytes for t in tensors_of(config_of()).values())
        model, rules = build(directory)
        seen = []
        load_weights(model, checkpoint, rules, progress=lambda done, total: seen.append((done, total)))  # noqa: B023
        assert seen == sorted(seen) and seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
        models.append(bits(model))
    assert same(*models)


def test_the_tensors_are_those_that_were_saved(sharded):
    tensors, checkpoint = tensors_of(config_of()), open_checkpoint(sharded)
    assert same(dict(checkpoint.tensors()), tensors)
    assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])


def test_a_misfit_is_found_before_any_data_is_read(tmp_path):
    directory = write(tmp_path / "model", config_of())
    (directory / "config.json").write_text(json.dumps(config_of(num_hidden_layers=3)))
    model, rules = build(directory)
    with pytest.raises(BadCheckpoint, match="lacks 18 tensors"):
        load_weights(model, open_checkpoint(directory), rules)
    assert all(param.isnan().all() for param in model.parameters())  # the suite poisons fresh memory


def test_a_directory_without_weights_is_explained(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "no weights" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "abc.incomplete").write_text("")
    assert "incomplete" in refused(tmp_path)
    (tmp_path / "abc.incomplete").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    assert "not complete" in refused(tmp_path)


def test_a_fifo_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "regular file" in refused(tmp_path)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.safetensors"])
def test_a_pickle_never_runs(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    assert "pickle" in refused(tmp_path) and not (tmp_path / "ran").exists()


def test_a_pickle_in_the_index_never_runs(sharded, tmp_path):
    (sharded / "model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    reindex(sharded, lambda m: m.update({"model.norm.weight": "model.bin"}))
    assert "model.bin" in refused(sharded) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entry", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "", "a\nb.safetensors", 7]
)
def test_an_index_entry_outside_the_directory_is_refused(entry, sharded, tmp_path):
    write(tmp_path / "other", config_of())
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    reindex(sharded, lambda m: m.update({"model.norm.weight": entry}))
    assert "weight_map" in refused(sharded)


def test_all_missing_shards_are_listed(sharded):
    for i in (1, 3):
        (sharded / f"model-0000{i}-of-00003.safetensors").unlink()
    message = refused(sharded)
    assert "lacks 2 of 3" in message and "model-00001" in message and "model-00003" in message


def test_an_extra_shard_is_refused(sharded):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002" in refused(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    reindex(sharded, lambda m: m.update({"model.ghost": "model-00002-of-00003.safetensors"}))
    message = refused(sharded)
    assert "model.ghost" in message and "model-00002" in message
    reindex(sharded, lambda m: (m.pop("model.ghost"), m.pop("model.norm.weight")))
    assert "model.norm.weight" in refused(sharded)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = write(tmp_path / "model", config_of(), shards=2)
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors")
    reindex(directory, lambda m: [m.pop(name) for name in list(m)[1::2]])
    reindex(directory, lambda m: m.update({"x": "model-00002-of-00002.safetensors"}))
    assert "is in model-00001-of-00002.safetensors and in model-00002" in refused(directory)


def test_two_kinds_of_weights_are_a_contradiction(sharded):
    (sharded / "model.safetensors").write_bytes(b"")
    assert "both" in refused(sharded)


def test_links_may_not_leave_the_directory(tmp_path):
    directory = write(tmp_path / "model", config_of())
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (directory / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "outside the model directory" in refused(directory)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    model = tmp_path / "models--me--tiny"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots").mkdir()
    snapshot = write(model / "snapshots" / "abc", config_of())
    (snapshot / "model.safetensors").rename(model / "blobs" / "hash")
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert open_checkpoint(snapshot).names()
    (model / "blobs" / "hash").rename(tmp_path / "secret")
    (model / "blobs" / "hash").symlink_to(tmp_path / "secret")
    assert "outside" in refused(snapshot)
    (tmp_path / "secret").unlink()
    assert "broken link" in refused(snapshot)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    directory = write(tmp_path / "model", config_of())
    checkpoint = open_checkpoint(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="model.safetensors"):
        list(checkpoint.tensors())


def test_code_beside_a_checkpoint_never_runs(tmp_path):
    directory = write(tmp_path / "model", config_of(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}))
    (directory / "modeling_mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    model, rules = build(directory)
    load_weights(model, open_checkpoint(directory), rules)
    assert not (tmp_path / "ran").exists()


def test_a_stream_delivers_every_byte_in_order(tmp_path):
    data = torch.randint(256, (1000 * BUFFERS,), dtype=torch.uint8)
    (tmp_path / "data").write_bytes(data.numpy().tobytes())
    sizes = [1, 999, 64, 65, 2000, 500]
    ranges = [Range(str(i), tmp_path / "data", 3 * i, torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    assert list(stream(iter(ranges), torch.device("cpu"), chunk=64)) == [item.name for item in ranges]
    assert all(torch.equal(item.dest, data[item.start : item.start + len(item.dest)]) for item in ranges)


def test_a_stream_refuses_a_short_file(tmp_path):
    (tmp_path / "data").write_bytes(bytes(100))
    item = Range("w", tmp_path / "data", 0, torch.zeros(200, dtype=torch.uint8))
    with pytest.raises(BadCheckpoint, match="'w'.*byte 100"):
        list(stream([item], torch.device("cpu"), chunk=64))


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bits(sharded):
    models = []
    for device in ("cpu", "cuda"):
        model, rules = build(sharded, device=device)
        load_weights(model, open_checkpoint(sharded), rules)
        models.append(bits(model.cpu()))
    assert same(*models)
