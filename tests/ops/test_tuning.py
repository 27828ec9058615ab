"""Tables of tiles: what a table says is chosen, shapes without rows take the nearest, and no wrong file is believed."""

import json

import pytest
import torch

from lite_llm.errors import EnvironmentProblem
from lite_llm.ops.triton import gemv, skinny, tuning, wide
from lite_llm.ops.triton.tuning import CUBLAS, Choice, Row
from tests.ops.tables import fresh_tables

NOWHERE = torch.device("cpu")  # takes the default table
GOOD = {
    "op": "add",
    "in": 2048,
    "out": 512,
    "tokens": 4,
    "kernel": "gemv",
    "tile": {"rows": 2, "columns": 512, "warps": 1},
}


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_we_ship(path, tmp_path):
    rows = tuning.read(path)
    assert {row.op for row in rows} - {"attend", "decode"} == set(tuning.OPS)
    tuning.write(tmp_path / "again.json", json.loads(path.read_text())["gpu"], rows)
    assert (tmp_path / "again.json").read_text() == path.read_text()
    matmuls = [row for row in rows if isinstance(row, Row)]
    for row in matmuls:
        if row.choice.kernel == "gemv" and row.choice.tile:
            assert gemv.fits(row.choice.tile, row.in_features, row.tokens, row.op in ("gated", "qkv")), row
    shapes = [tokens for op in tuning.by_shape(matmuls).values() for tokens in op.values()]
    for mine in shapes if path.stem != "default" else []:  # a shape with a row of its own needs all of them
        assert mine[0].tokens == 1 and mine[-1].tokens >= 64, mine


@pytest.mark.parametrize("op", tuning.OPS)
@pytest.mark.parametrize("shape", [(896, 1152), (4864, 896), (8, 1), (2048, 128256), (18944, 3584), (8192, 151936)])
def test_a_gpu_without_a_table_runs_every_shape(op, shape):
    many = "hopper" if op == "gated" and shape[1] % 16 == 0 else "cublas"
    for tokens, kernel in [(1, "gemv"), (4, "gemv"), (5, "skinny"), (64, "skinny"), (65, many), (9000, "cublas")]:
        chosen, tile = tuning.choose(torch.device("meta"), op, *shape, tokens)
        assert chosen == kernel
        if kernel == "gemv":
            assert gemv.fits(tile, shape[0], tokens, op in ("gated", "qkv"))
        if kernel == "skinny":
            assert skinny.fits(tile, *shape, tokens, 2, op == "gated", 90)


def test_the_next_row_above_of_the_nearest_shape_is_taken(tmp_path, monkeypatch):
    small, large = gemv.Tile(2, 256, 1), gemv.Tile(4, 1024, 4)
    some, many = skinny.Tile(16, 64, 64), wide.Tile(128, 64, 64)
    rows = [
        Row("add", 1024, 1024, 1, Choice("gemv", small)), Row("add", 1024, 1024, 16, Choice("skinny", some)),
        Row("add", 1024, 1024, 128, Choice("wide", many)),
        Row("add", 1024, 1024, 256, Choice("wide", many._replace(splits=16))),
        Row("add", 8192, 1024, 2, Choice("gemv", large)), Row("add", 8192, 1024, 32, CUBLAS),
    ]  # fmt: skip
    tuning.write(tmp_path / "default.json", "some GPU", rows)
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    with fresh_tables():
        for shape, tokens, want in [
            ((1024, 1024), 1, Choice("gemv", small)),
            ((1024, 1024), 2, Choice("skinny", some)),
            ((1024, 1024), 17, Choice("wide", many)),
            ((1024, 1024), 200, Choice("wide", wide.default("add", 1024, 1024, 200, 90))),  # for 16 splits do not fit
            ((1024, 1024), 257, CUBLAS),
            ((2048, 900), 1, Choice("gemv", small)),
            ((4096, 1024), 2, Choice("gemv", large)),
            ((8192, 1024), 3, CUBLAS),
            ((100_000, 1), 1, Choice("gemv", large)),
        ]:
            assert tuning.choose(NOWHERE, "add", *shape, tokens) == want, (shape, tokens)
        assert tuning.choose(NOWHERE, "gated", 1024, 1024, 1) == CUBLAS  # the table has no row of this op


def test_a_tile_too_large_for_the_shape_gives_way_to_the_default():
    assert gemv.fits(gemv.Tile(4, 2048, 4), 2048, 1, False)
    assert not gemv.fits(gemv.Tile(4, 2048, 4), 896, 1, False)
    assert not gemv.fits(gemv.Tile(32, 2048, 4), 2048, 1, False)
    for tile in (gemv.Tile(3, 512, 4), gemv.Tile(4, 500, 4), gemv.Tile(4, 512, 3), gemv.Tile(0, 512, 4)):
        assert not gemv.fits(tile, 2048, 1, False)
    assert not gemv.fits(gemv.Tile(4, 512, 4), 2048, 5, False)


def read(tmp_path, text):
    (tmp_path / "gpu.json").write_text(text)
    return tuning.read(tmp_path / "gpu.json")


def test_a_row_says_what_it_says(tmp_path):
    rows = [GOOD, {**GOOD, "tokens": 64, "kernel": "cublas"}]
    del rows[1]["tile"]
    want = [Row("add", 2048, 512, 4, Choice("gemv", gemv.Tile(2, 512, 1))), Row("add", 2048, 512, 64, CUBLAS)]
    assert read(tmp_path, json.dumps({"gpu": "x", "rows": rows})) == want


@pytest.mark.parametrize(
    "change, match",
    [
        ({"op": "mul"}, "op = 'mul'; expected add, gated"),
        ({"in": 0}, "in = 0; expected a whole number"),
        ({"out": 2.5}, "out = 2.5"),
        ({"tokens": True}, "tokens = True"),
        ({"tokens": 5}, "tokens = 5; gemv takes at most 4"),
        ({"kernel": "gemm"}, "kernel = 'gemm'; expected gemv, skinny, wide, hopper, cublas"),
        ({"kernel": "cublas"}, "cublas has no tile"),
        ({"kernel": "hopper", "tile": {"rows": 128}}, "op = add; hopper takes gated alone"),
        ({"kernel": "hopper", "op": "gated"}, "hopper has no tile"),
        ({"kernel": "wide"}, "tile has no tokens"),
        ({"kernel": "wide", "tokens": 1 << 15}, "tokens = 32768; wide takes at most 16384"),
        ({"kernel": "wide", "tile": {"tokens": 128, "rows": 64, "columns": 64, "tma": 1}}, "tma = 1; expected bool"),
        ({"kernel": []}, "kernel = "),
        ({"speed": 1}, "expected the keys"),
        ({"tile": [4]}, "expected an object of rows, columns"),
        ({"tile": {"rows": 4, "columns": 512}}, "tile has no warps"),
        ({"tile": {"rows": 4, "columns": 512, "warps": 1, "depth": 1}}, "expected an object of"),
        ({"tile": {"rows": -4, "columns": 512, "warps": 1}}, "rows = -4"),
        ({"tile": {"rows": 4, "columns": 512, "warps": 1, "evict_first": 1}}, "evict_first = 1; expected bool"),
    ],
    ids=str,
)
def test_a_wrong_row_is_named(tmp_path, change, match):
    with pytest.raises(EnvironmentProblem, match=f"gpu.json: row 1, .*{match}"):
        read(tmp_path, json.dumps({"rows": [{**GOOD, "tokens": 1}, {**GOOD, **change}]}))


def test_a_row_that_stands_there_twice(tmp_path):
    with pytest.raises(EnvironmentProblem, match="row 1, .* stands there twice"):
        read(tmp_path, json.dumps({"rows": [GOOD, GOOD]}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [}', "3"])
def test_a_file_that_is_no_table(tmp_path, text):
    with pytest.raises(EnvironmentProblem, match="gpu.json: no table of tiles"):
        read(tmp_path, text)
    with pytest.raises(EnvironmentProblem, match="nothing.json: no table"):
        tuning.read(tmp_path / "nothing.json")
