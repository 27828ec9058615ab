"""LDR-01, LDR-02: no malformed file is accepted, crashes or hangs; what the library lets through is refused too."""

import json
import pickle
import random
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lite_llm.errors import BadCheckpoint
from lite_llm.weights.files import open_checkpoint
from lite_llm.weights.header import read_header

W = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


def file_of(header, data=bytes(64), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return file_of({"w": {**W, **changes}})


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header length 0": bytes(80),
    "header longer than the file": file_of({"w": W}, length=10_000),
    "header of 200 MB": file_of({"w": W}, length=200_000_000),
    "header of 2**64 - 1": file_of({"w": W}, length=2**64 - 1),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "not JSON": file_of(b"{hello}"),
    "a list": file_of([W]),
    "deep": file_of(b'{"a":' * 50_000),
    "a key twice": file_of(b'{"w":%s,"w":%s}' % (json.dumps(W).encode(), json.dumps(W).encode())),
    "NaN": file_of(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,64]}}'),
    "metadata is no table": file_of({"__metadata__": [1], "w": W}),
    "metadata is nested": file_of({"__metadata__": {"a": {}}, "w": W}),
    "a tensor is a number": file_of({"w": 3}),
    "no offsets": file_of({"w": {"dtype": "F32", "shape": [4, 4]}}),
    "a stray key": entry(strides=[4, 1]),
    "unknown dtype": entry(dtype="F33"),
    "dtype is a list": entry(dtype=["F32"]),
    "shape with a minus": entry(shape=[-4, -4]),
    "shape with a boolean": entry(shape=[True, 16]),
    "shape with a fraction": entry(shape=[4.0, 4]),
    "shape that overflows": entry(shape=[2**33, 2**33]),
    "shape of 1000 dims": entry(shape=[1] * 1000),
    "too many bytes": entry(shape=[4, 3]),
    "offsets backwards": entry(data_offsets=[64, 0]),
    "three offsets": entry(data_offsets=[0, 64, 64]),
    "beyond the end": entry(shape=[4, 5], data_offsets=[0, 80]),
    "truncated": file_of({"w": W}, data=bytes(63)),
    "trailing bytes": file_of({"w": W}, data=bytes(65)),
    "overlap": file_of({"w": W, "v": W}),
    "hole": file_of({"w": W, "v": {**W, "data_offsets": [72, 136]}}, data=bytes(136)),
    "50,000 empty tensors": file_of(
        {f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}, data=b""
    ),
    "a name with an escape code": file_of({"\x1b[2J": W}),
    "an empty name": file_of({"": W}),
    "a pickle": pickle.dumps({"w": 1}, protocol=2),
    "a zip": b"PK\x03\x04" + bytes(1000),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[case])
    with pytest.raises(BadCheckpoint, match="model.safetensors"):
        read_header(path)


def test_the_valid_file_beside_them_is_accepted(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"__metadata__": {"format": "pt"}, "w": W}))
    entries, metadata = read_header(path)
    assert metadata == {"format": "pt"} and entries["w"].shape == (4, 4) and entries["w"].nbytes == 64


def test_mutated_files_are_refused_or_wholly_valid(tmp_path):
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.ones(2, 2, 2)}
    whole, dice, accepted = save(tensors, {"format": "pt"}), random.Random(0), 0
    path = tmp_path / "model.safetensors"
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            spot = dice.randrange(len(data))
            match dice.randrange(4):
                case 0:
                    data[spot] ^= 1 << dice.randrange(8)
                case 1:
                    data[spot : spot + dice.randint(0, 8)] = dice.randbytes(dice.randint(0, 8))
                case 2:
                    del data[max(spot, 1) :]
                case 3:
                    data[spot] = dice.choice(b'0129{}[]",:-')
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(tmp_path)
        except BadCheckpoint:
            continue
        accepted += 1
        for name, tensor in checkpoint.tensors():
            assert name.isprintable() and tensor.shape == checkpoint.shapes[name]
            assert tensor.dtype == checkpoint.dtypes[name] and tensor.clone().numel() > 0
    assert 0 < accepted < 2000  # flips in the data and in names leave a valid file


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "w", "shape", "data_offsets"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(header=JSON)
def test_any_json_is_an_answer_or_a_refusal(header, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(file_of(header))
    try:
        entries, _ = read_header(path)
    except BadCheckpoint:
        return
    assert sum(e.nbytes for e in entries.values()) == 64
