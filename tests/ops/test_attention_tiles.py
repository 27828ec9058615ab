"""Tiles of attention: what an H200 takes, what a table says and what it may not, and that all of them fit."""

import json
from itertools import product

import pytest
import torch

from lite_llm.errors import EnvironmentProblem
from lite_llm.ops.reference.attention import HEAD_DIMS
from lite_llm.ops.triton import attention, decode, tuning
from lite_llm.ops.triton.aot import SHARED
from lite_llm.ops.triton.attention_tiles import (
    MANY,
    Decode,
    Flash,
    decode_default,
    decode_fits,
    flash_default,
    flash_fits,
)
from lite_llm.ops.triton.gpu import capability
from lite_llm.ops.triton.tuning import ANY, AttendRow, Choice, DecodeRow
from tests.close import DEVICE
from tests.ops.attention import case, check
from tests.ops.tables import fresh_tables

HERE = torch.device(DEVICE)

# Of an H200: prompts by (head_dim, itemsize), without a window and with one; flash-decoding up to MANY requests and
# above.
BY_HEAD_DIM = {
    (16, 2): (("flash", (128, 64, 8, 2)), ("flash", (128, 64, 8, 2)), (64, 2, 3, 3), (64, 2, 3, 3)),
    (32, 2): (("flash", (128, 64, 8, 2)), ("flash", (128, 64, 8, 2)), (64, 2, 3, 3), (64, 2, 3, 3)),
    (64, 2): (("flash", (128, 64, 8, 3)), ("flash", (128, 64, 8, 3)), (128, 4, 2, 3), (64, 2, 3, 4)),
    (80, 2): (("flash", (128, 64, 8, 3)), ("flash", (128, 64, 8, 3)), (64, 4, 3, 2), (64, 4, 3, 2)),
    (96, 2): (("flash", (128, 64, 8, 3)), ("flash", (128, 64, 8, 3)), (64, 4, 3, 2), (64, 4, 3, 2)),
    (112, 2): (("flash", (128, 64, 8, 3)), ("flash", (128, 64, 8, 3)), (64, 4, 3, 2), (64, 4, 3, 2)),
    (128, 2): (("hopper", (128, 128, 8, 3)), ("hopper", (128, 64, 8, 3)), (64, 4, 3, 2), (64, 4, 3, 2)),
    (256, 2): (("flash", (128, 32, 8, 2)), ("flash", (128, 32, 8, 2)), (64, 8, 3, 1), (64, 8, 3, 1)),
    (16, 4): (("flash", (16, 16, 4, 1)), ("flash", (16, 16, 4, 1)), (32, 4, 3, 2), (32, 4, 3, 2)),
    (32, 4): (("flash", (16, 16, 4, 1)), ("flash", (16, 16, 4, 1)), (32, 4, 3, 2), (32, 4, 3, 2)),
    (64, 4): (("flash", (16, 16, 4, 1)), ("flash", (16, 16, 4, 1)), (32, 4, 3, 2), (32, 4, 3, 2)),
    (80, 4): (("flash", (16, 16, 8, 1)), ("flash", (16, 16, 8, 1)), (16, 8, 2, 2), (16, 8, 2, 2)),
    (96, 4): (("flash", (16, 16, 8, 1)), ("flash", (16, 16, 8, 1)), (16, 8, 2, 2), (16, 8, 2, 2)),
    (112, 4): (("flash", (16, 16, 8, 1)), ("flash", (16, 16, 8, 1)), (16, 8, 2, 2), (16, 8, 2, 2)),
    (128, 4): (("flash", (16, 16, 8, 1)), ("flash", (16, 16, 8, 1)), (16, 8, 2, 2), (16, 8, 2, 2)),
    (256, 4): (("flash", (16, 16, 4, 2)), ("flash", (16, 16, 4, 2)), (16, 4, 2, 2), (16, 4, 2, 2)),
}

# Bytes of shared memory that Triton 3.6 gave some kernels: GPU, head_dim, itemsize, tile.
FLASH_BYTES = {
    (80, 64, 2, (64, 128, 8, 3)): 74240, (80, 64, 2, (16, 16, 4, 1)): 4608, (80, 128, 2, (64, 64, 8, 3)): 90112,
    (80, 128, 2, (128, 64, 8, 3)): 98560, (80, 256, 2, (64, 32, 8, 2)): 69632, (80, 256, 4, (16, 16, 4, 2)): 50240,
    (90, 64, 2, (64, 32, 4, 3)): 32896, (90, 64, 2, (64, 128, 4, 2)): 74752, (90, 64, 2, (128, 64, 8, 3)): 65792,
    (90, 80, 2, (128, 128, 8, 3)): 229888, (90, 256, 2, (64, 64, 8, 3)): 229632, (90, 64, 4, (32, 16, 4, 3)): 26624,
    (100, 64, 2, (64, 32, 8, 3)): 33824, (100, 80, 2, (64, 128, 8, 3)): 214032, (100, 128, 2, (64, 32, 8, 3)): 66592,
    (120, 64, 2, (64, 128, 8, 2)): 41472, (120, 128, 2, (64, 128, 8, 2)): 98304,
}  # fmt: skip
DECODE_BYTES = {
    (80, 64, 2, (64, 2, 3, 2)): 40960, (90, 64, 2, (128, 4, 2, 2)): 38912, (90, 16, 2, (64, 4, 4, 2)): 14848,
    (100, 128, 2, (64, 8, 4, 2)): 118784, (120, 256, 2, (32, 4, 3, 2)): 98304, (80, 256, 4, (32, 8, 3, 2)): 180224,
}  # fmt: skip


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A function that makes rows the table of the GPU at hand, whatever that is."""

    def use(*rows):
        tuning.write(tmp_path / f"{tuning.file_name(HERE)}.json", "some GPU", rows)
        monkeypatch.setattr(tuning, "TABLES", tmp_path)

    with fresh_tables():
        yield use


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(tuning, "file_name", lambda device: "nvidia-h200")
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    with fresh_tables():
        yield


@pytest.mark.parametrize("head_dim, itemsize", product(HEAD_DIMS, (2, 4)))
def test_what_an_h200_takes(on_an_h200, head_dim, itemsize):
    plain, windowed, few, many = BY_HEAD_DIM[head_dim, itemsize]
    for wanted, window in ((plain, False), (windowed, True)):
        assert tuning.choose_attend(HERE, head_dim, itemsize, window, ANY, False) == wanted
        assert tuning.choose_attend(HERE, head_dim, itemsize, window, ANY, True) == wanted
    for requests in (1, 2, 64, 127, 128):
        assert tuning.choose_decode(HERE, head_dim, itemsize, requests) == Decode(*few)
    for requests in (129, 256, 1024, tuning.REQUESTS[-1]):
        assert tuning.choose_decode(HERE, head_dim, itemsize, requests) == Decode(*many)


def test_few_pairs_and_prompts_beside_decodes_take_smaller_tiles_of_as_many_keys(on_an_h200):
    alone, beside = [Choice("flash", Flash(64, 64, 4, stages)) for stages in (4, 2)]
    large = Choice("flash", Flash(128, 64, 8, 3))
    for pairs, wanted in ((1, (alone, beside)), (16384, (alone, beside)), (16385, (large, large))):
        assert tuple(tuning.choose_attend(HERE, 64, 2, False, pairs, flag) for flag in (False, True)) == wanted
    assert tuning.choose_attend(HERE, 64, 2, True, 1, True) == large, "with a window nobody has measured"


@pytest.mark.parametrize("gpu", SHARED)
def test_defaults_and_our_rows_fit_their_gpus(gpu):
    for dim, itemsize, windowed in product(HEAD_DIMS, (2, 4), (False, True)):
        assert flash_fits(flash_default(dim, itemsize, windowed, gpu), dim, itemsize, gpu), (dim, itemsize, windowed)
        assert decode_fits(decode_default(dim, itemsize, gpu), dim, itemsize, gpu), (dim, itemsize)
    for row in tuning.shipped("attend", gpu):
        assert flash_fits(row.choice.tile, row.head_dim, row.itemsize, gpu), row
    for row in tuning.shipped("decode", gpu):
        assert decode_fits(row.choice.tile, row.head_dim, row.itemsize, gpu), row
    assert bool(tuning.shipped("attend", gpu)) == (gpu == 90)


def test_our_rows_are_compiled_for_their_gpu():
    """aot.py compiles these cases."""
    names = {case.name for module in (attention, decode) for case in module.aot_cases(90)}
    assert {f"attend-bf16-d64-g4-tile64x64w4s{stages}" for stages in (2, 4)} < names
    assert {"attend-bf16-d128-g4-tile128x128w8s3", "decode-bf16-d64-g4-tile64r1a2"} < names


@pytest.mark.parametrize("gpu, dim, itemsize, tile", [*FLASH_BYTES, *DECODE_BYTES])
def test_no_tile_fits_where_its_kernel_would_not(monkeypatch, gpu, dim, itemsize, tile):
    """The bound is none that refuses everything either."""
    of_flash = (gpu, dim, itemsize, tile) in FLASH_BYTES
    fits, tile, taken = (
        (flash_fits, Flash(*tile), FLASH_BYTES[gpu, dim, itemsize, tile])
        if of_flash
        else (decode_fits, Decode(*tile), DECODE_BYTES[gpu, dim, itemsize, tile])
    )
    monkeypatch.setitem(SHARED, gpu, taken - 1)
    assert not fits(tile, dim, itemsize, gpu)
    monkeypatch.setitem(SHARED, gpu, 1.8 * taken + 2048)
    assert fits(tile, dim, itemsize, gpu)


@pytest.mark.parametrize(
    "tile",
    [(96, 64, 8, 3), (128, 48, 8, 3), (128, 8, 8, 3), (8, 64, 8, 3), (128, 64, 6, 3), (128, 64, 16, 3), (128, 64, 8, 0),
     (128, 64, 8, 9), (128, 256, 4, 1), (512, 64, 8, 1), (0, 64, 8, 2), (64, 128, 8, 8)],
)  # fmt: skip
def test_flash_tiles_that_no_gpu_runs(tile):
    assert flash_fits(Flash(128, 64, 8, 3), 64, 2, 90)
    assert not flash_fits(Flash(*tile), 64, 2, 90)


@pytest.mark.parametrize(
    "change",
    [{"block_n": 96}, {"block_n": 8}, {"num_warps": 3}, {"num_warps": 16}, {"num_stages": 0}, {"num_stages": 9},
     {"programs": 0}, {"programs": 33}, {"release": 3}, {"asked": 3}, {"asked": 32}, {"least": 0},
     {"block_n": 512}, {"num_warps": 1}],
)  # fmt: skip
def test_decode_tiles_that_no_gpu_runs(change):
    tile = Decode(128, 4, 2, 3)
    assert decode_fits(tile, 64, 2, 90) and decode_fits(tile._replace(asked=0), 64, 2, 90)
    assert not decode_fits(tile._replace(**change), 64, 2, 90)


def test_a_gpu_of_another_capability_is_taken_for_the_smallest():
    assert flash_fits(Flash(128, 128, 8, 2), 64, 2, 80) and not flash_fits(Flash(128, 128, 8, 3), 64, 2, 121)
    assert not decode_fits(Decode(128, 8, 3, 1), 128, 2, 121)


def test_without_a_row_the_default_is_taken(table, monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    table(AttendRow("attend", 64, 2, False, ANY, False, Choice("flash", Flash(64, 32, 4, 2))))
    assert tuning.choose_attend(HERE, 64, 2, False, 512, False) == ("flash", (64, 32, 4, 2))
    assert tuning.choose_attend(HERE, 64, 2, True, 512, False) == ("flash", flash_default(64, 2, True, 90))
    assert tuning.choose_attend(HERE, 64, 4, False, 512, False) == ("flash", flash_default(64, 4, False, 90))
    assert tuning.choose_attend(HERE, 128, 2, False, 512, False) == ("hopper", flash_default(128, 2, False, 90))
    for requests in (1, MANY, MANY + 1):
        assert tuning.choose_decode(HERE, 64, 2, requests) == decode_default(64, 2, 90)


def test_a_row_without_a_tile_says_the_kernel_alone(table, monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    table(
        AttendRow("attend", 128, 2, False, ANY, False, Choice("flash", None)),
        DecodeRow("decode", 64, 2, MANY, Choice("decode", None)),
    )
    assert tuning.choose_attend(HERE, 128, 2, False, 512, False) == ("flash", flash_default(128, 2, False, 90))
    assert tuning.choose_decode(HERE, 64, 2, 1) == decode_default(64, 2, 90)


def test_the_next_row_above_serves_decodes(table, monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    few, many = Decode(32, 4, 3, 2), Decode(64, 2, 3, 4)
    most = tuning.REQUESTS[-1]
    table(
        DecodeRow("decode", 64, 2, most, Choice("decode", many)),
        DecodeRow("decode", 64, 2, MANY, Choice("decode", few)),
    )
    assert [tuning.choose_decode(HERE, 64, 2, n) for n in (1, MANY, MANY + 1, most)] == [few, few, many, many]
    with fresh_tables():
        table(DecodeRow("decode", 64, 2, most, Choice("decode", many)))
        assert [tuning.choose_decode(HERE, 64, 2, n) for n in (1, most)] == [many, many]


def test_a_row_that_does_not_fit_gives_way_to_the_default(table, monkeypatch):
    large, long = Flash(128, 128, 8, 3), Decode(128, 8, 3, 2)
    table(
        AttendRow("attend", 128, 2, False, ANY, False, Choice("hopper", large)),
        DecodeRow("decode", 128, 2, MANY, Choice("decode", long)),
    )
    for gpu, kernel, fitting in (
        (90, "hopper", True),
        (89, "flash", False),
        (100, "flash", True),
        (121, "flash", False),
    ):
        monkeypatch.setattr(tuning, "capability", lambda device, gpu=gpu: gpu)
        with fresh_tables():
            tile = large if fitting else flash_default(128, 2, False, gpu)
            assert tuning.choose_attend(HERE, 128, 2, False, 512, False) == (kernel, tile), gpu
            assert tuning.choose_decode(HERE, 128, 2, 1) == (long if fitting else decode_default(128, 2, gpu)), gpu


class Spy:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(options)
            return self.kernel[grid](*args, **options)

        return launch


def test_kernels_get_the_tiles_of_the_table(table, monkeypatch):
    table(
        AttendRow("attend", 16, 4, False, ANY, False, Choice("flash", Flash(32, 32, 4, 2))),
        AttendRow("attend", 16, 4, True, ANY, False, Choice("flash", Flash(16, 32, 4, 1))),
        DecodeRow("decode", 16, 4, MANY, Choice("decode", Decode(16, 2, 2, 1, asked=4))),
    )
    prompts, decodes = Spy(attention._attend_kernel), Spy(decode._decode_kernel)
    monkeypatch.setattr(attention, "_attend_kernel", prompts)
    monkeypatch.setattr(decode, "_decode_kernel", decodes)
    for window in (None, 20):
        check(case([40, 3, 35, 20], [1, 1, 30, 3], 2, 1, 16, window=window))
    assert [(k["BLOCK_M"], k["BLOCK_N"], k["num_stages"]) for k in prompts.launches] == [(32, 32, 2), (16, 32, 1)]
    assert [(k["BLOCK_N"], k["num_warps"], k["ASKED"]) for k in decodes.launches] == [(16, 2, 4)] * 2


def test_prompts_take_the_tile_of_their_number_and_of_what_is_beside_them(monkeypatch):
    """Two heads each; the kernel runs with the default, whatever was chosen."""
    asked = []
    monkeypatch.setattr(
        tuning,
        "choose_attend",
        lambda at, *what: asked.append((at.type, *what)) or Choice("flash", Flash(16, 16, 4, 1)),
    )
    for new in ([5], [1, 5], [1, 2, 3]):
        check(case([9] * len(new), new, 2, 1, 16, decodes=new.count(1)))
    wanted = [(10, False), (10, True), (10, True)]
    assert asked == [(DEVICE, 16, 4, False, *what) for what in wanted for _ in ("kernel", "tile")]


def test_rows_for_few_pairs_and_beside_decodes(table, monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    tiles = [Flash(128, 64, 8, stages) for stages in (1, 2, 3, 4)]
    facts = [(9, False), (90, False), (50, True), (ANY, False)]
    table(*(AttendRow("attend", 64, 2, False, *what, Choice("flash", tile)) for what, tile in zip(facts, tiles)))
    for pairs, alone, beside in ((9, 1, 3), (10, 2, 3), (50, 2, 3), (51, 2, 2), (91, 4, 4)):
        found = [tuning.choose_attend(HERE, 64, 2, False, pairs, flag).tile.num_stages for flag in (False, True)]
        assert found == [alone, beside], pairs


@pytest.mark.gpu
def test_an_answer_has_the_same_bits_with_every_row_of_its_head_dim():
    """Not so on a CPU: there matmuls are those of a library, which sums up large ones in other ways than small ones."""
    lengths, new = [700, 2100, 64, 65, 300, 31], [700, 129, 64, 1, 33, 31]
    rows = tuning.shipped("attend", capability(HERE))
    for row in rows:
        other = next(other for other in rows if other[:-1] == (*row[:4], ANY, False))
        for heads, kv_heads, causal in product((32, 14), (2,), (True, False)):
            c = case(lengths, new, heads, kv_heads, row.head_dim, torch.bfloat16, decodes=0)
            found = []
            for tile in (row.choice.tile, other.choice.tile):
                out, where = torch.empty_like(c.q), (c.table, c.rows, c.q_start, c.kv_len, 0, c.scale, None, causal)
                attention.attend_flash(c.q, c.k_pool, c.v_pool, out, *where, shape=tile)
                found.append(out)
            assert torch.equal(*found), row


def test_shape_overrides_the_table(monkeypatch):
    spy = Spy(attention._attend_kernel)
    monkeypatch.setattr(attention, "_attend_kernel", spy)
    c = case([70, 20], [70, 20], 2, 1, 16, decodes=0)
    out = torch.empty_like(c.q)
    given = (c.k_pool, c.v_pool, out, c.table, c.rows, c.q_start, c.kv_len, 0, c.scale, None, True)
    attention.attend_flash(c.q, *given, shape=Flash(64, 16, 4, 1))
    assert (spy.launches[0]["BLOCK_M"], spy.launches[0]["BLOCK_N"]) == (64, 16)
    assert (out - c.run()).abs().max() < 1e-5


ATTEND = {"op": "attend", "head_dim": 128, "itemsize": 2, "windowed": False, "pairs": ANY, "beside": False,
          "kernel": "flash", "tile": {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}}  # fmt: skip
DECODE = {"op": "decode", "head_dim": 64, "itemsize": 2, "requests": 128, "kernel": "decode",
          "tile": {"block_n": 128, "num_warps": 4, "num_stages": 2, "programs": 3}}  # fmt: skip


def read(tmp_path, *rows):
    (tmp_path / "gpu.json").write_text(json.dumps({"gpu": "x", "rows": rows}))
    return tuning.read(tmp_path / "gpu.json")


def test_a_row_says_what_it_says(tmp_path):
    bare = {name: value for name, value in ATTEND.items() if name != "tile"} | {"kernel": "hopper", "windowed": True}
    assert read(tmp_path, ATTEND, bare, DECODE) == [
        AttendRow("attend", 128, 2, False, ANY, False, Choice("flash", Flash(128, 64, 8, 3))),
        AttendRow("attend", 128, 2, True, ANY, False, Choice("hopper", None)),
        DecodeRow("decode", 64, 2, 128, Choice("decode", Decode(128, 4, 2, 3))),
    ]


@pytest.mark.parametrize(
    "row, change, match",
    [
        (ATTEND, {"head_dim": 48}, "head_dim = 48, itemsize = 2; expected 16, 32, 64, .*of 2 or 4 bytes"),
        (ATTEND, {"itemsize": 8}, "head_dim = 128, itemsize = 8; expected"),
        (ATTEND, {"itemsize": "2"}, "itemsize = '2'; expected a whole number"),
        (ATTEND, {"windowed": 0}, "windowed = 0; expected true or false"),
        (ATTEND, {"beside": 1}, "beside = 1; expected true or false"),
        (ATTEND, {"pairs": 0}, "pairs = 0; expected a whole number"),
        (ATTEND, {"pairs": ANY + 1}, "pairs = 1073741825; expected at most 1073741824"),
        (ATTEND, {"pairs": 9, "head_dim": 64}, "expected a row of its head_dim with pairs = 1073741824"),
        (ATTEND, {"pairs": 9, "tile": ATTEND["tile"] | {"block_n": 32}}, "expected .* one block_n, .* nor beside"),
        (ATTEND, {"pairs": 9, "tile": ATTEND["tile"] | {"block_m": 32}}, "expected .* block_m = 64 or more"),
        (ATTEND, {"beside": True, "kernel": "hopper"}, "expected .* kernel = flash"),
        (ATTEND, {"requests": 128}, "expected the keys beside, head_dim, itemsize, kernel, op, pairs, tile, windowed"),
        (ATTEND, {"kernel": "gemv"}, "kernel = 'gemv'; expected flash, hopper"),
        (ATTEND, {"kernel": "hopper", "head_dim": 64}, "hopper takes head_dim = 128, itemsize = 2 alone"),
        (ATTEND, {"kernel": "hopper", "itemsize": 4}, "hopper takes head_dim = 128"),
        (ATTEND, {"tile": {"block_m": 128}}, "tile has no block_n, num_stages, num_warps"),
        (ATTEND, {"tile": DECODE["tile"]}, "expected an object of block_m, block_n"),
        (ATTEND, {"tile": ATTEND["tile"] | {"block_m": True}}, "block_m = True; expected int"),
        (ATTEND, {"op": "attention"}, "op = 'attention'; expected add, gated, linear, qkv, attend, decode"),
        (ATTEND, {"op": ["attend"]}, "op = .*expected add"),
        (DECODE, {"requests": 8}, "requests = 8; expected 128 or 65536, for an answer's bits"),
        (DECODE, {"requests": 0}, "requests = 0; expected a whole number"),
        (DECODE, {"kernel": "flash"}, "kernel = 'flash'; expected decode"),
        (DECODE, {"tokens": 1}, "expected the keys head_dim, itemsize, kernel, op, requests, tile"),
        (DECODE, {"tile": DECODE["tile"] | {"asked": -1}}, "asked = -1; expected int of at least 0"),
        (DECODE, {"tile": ATTEND["tile"]}, "expected an object of block_n, num_warps"),
        (DECODE, {"tile": None}, "tile = None; expected an object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path, row, change, match):
    with pytest.raises(EnvironmentProblem, match=f"gpu.json: row 2, .*{match}"):
        read(tmp_path, ATTEND, DECODE, row | change)


def test_a_row_that_stands_there_twice(tmp_path):
    for row in (ATTEND, DECODE):
        with pytest.raises(EnvironmentProblem, match="row 1, .* stands there twice"):
            read(tmp_path, row, row | {"tile": row["tile"] | {"num_stages": 1}})
