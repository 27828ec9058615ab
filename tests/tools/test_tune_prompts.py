"""tools/tune_attention.py --prompts: candidates fit and are checked, what wins becomes a row, and no other is lost."""

import time
from types import SimpleNamespace

import pytest
import torch

from lite_llm.config import HFConfig
from lite_llm.models import registry, shapes
from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.attention_tiles import Flash, flash_fits
from lite_llm.ops.triton.tuning import ANY, AttendRow, Choice
from tests.close import DEVICE
from tests.ops.tables import fresh_tables
from tests.tools.test_tune import DTYPE, FAR, FakeTimer
from tools import prompts as tool
from tools import tune_attention
from tools.prompts import Prompts
from tools.tune_attention import PART

FLASH = Choice("flash", Flash(32, 32, 4, 2))
HERE = torch.device(DEVICE)


def config(shape: str):
    return registry.parse(HFConfig(shapes.shape_config(shape)))


@pytest.fixture
def small(monkeypatch):
    """Prompts of a tiny model; what is checked is short, for the interpreter is slow."""
    monkeypatch.setattr(tool, "CHECKED", ((40, 1, 33), (0, 50, 31)))
    return Prompts(config("tiny-llama-3.2-1b"), [24, 6], HERE, DTYPE, cold=1)


def test_every_length_has_about_as_much_work_and_all_together_are_cold(small):
    assert {n: len(inputs) for n, inputs in small.inputs.items()} == {6: 8, 24: 1}
    cold = Prompts(small.cfg, [24, 6], HERE, DTYPE, cold=1 << 20)
    tensors = [t for inputs in cold.inputs.values() for one in inputs for t in one[:3]]
    assert len(cold.inputs[6]) == 8 * len(cold.inputs[24])
    read_and_written = sum(t.nbytes for t in tensors) + sum(t.nbytes for t in tensors[::3])
    assert 1 << 20 <= read_and_written < 1.3 * (1 << 20)
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


def test_operations_are_those_that_the_mask_leaves(small):
    heads = 4 * small.cfg.heads * small.cfg.head_dim
    assert small.flops(6) == heads * (1 + 2 + 3 + 4 + 5 + 6)
    small.window = 4
    assert small.flops(6) == heads * (1 + 2 + 3 + 4 + 4 + 4)


@pytest.mark.parametrize("window", [None, 20])
def test_prompts_are_right_as_any_tile(small, window):
    small.window = window
    assert small.right(PART, FLASH) and small.right(PART, Choice("flash", Flash(64, 16, 4, 1)))
    small.run({PART: FLASH}, head=False)


@pytest.mark.parametrize("row", [0, 40, 73])
def test_one_wrong_row_is_found(small, monkeypatch, row):
    right = tool.attention.attend_flash

    def wrong(*args, shape):
        right(*args, shape=shape)
        args[3][row, -1] *= 1.05

    monkeypatch.setattr(tool.attention, "attend_flash", wrong)
    assert not small.right(PART, FLASH)
    monkeypatch.setattr(tool.attention, "attend_flash", lambda *args, shape: None)
    assert not small.right(PART, FLASH), "rows that nobody wrote"


def test_the_kernel_is_the_one_that_is_asked_for(small, monkeypatch):
    called = []
    monkeypatch.setattr(tool.hopper, "attend_hopper", lambda *args: called.append("hopper"))
    monkeypatch.setattr(tool.attention, "attend_flash", lambda *args, shape: called.append(shape))
    small.once(PART, Choice("hopper", FLASH.tile))
    small.once(PART, FLASH)
    assert called == ["hopper", FLASH.tile]


class Named(FakeTimer):
    """Of prompts of one head dimension, on a GPU that says what it is."""

    def __init__(self, head_dim, cost):
        cfg = SimpleNamespace(head_dim=head_dim)
        right = lambda part, choice: choice.kernel != "wrong"  # noqa: E731
        chain = SimpleNamespace(cfg=cfg, dtype=torch.bfloat16, device=HERE, right=right, tokens=8192)
        super().__init__(chain, cost)


def cost(choice: Choice) -> float:
    """Best: 64 rows, 128 keys, 4 warps, 2 stages; Hopper's kernel is faster by a fifth."""
    t = choice.tile
    off = (t.block_m != 64) + (t.block_n != 128) + (t.num_warps != 4) + (t.num_stages != 2)
    return 0.8e-4 if choice.kernel == "hopper" else 1e-4 * (1 + 0.01 * off)


@pytest.fixture(params=[80, 90])
def gpu(request, monkeypatch):
    monkeypatch.setattr(tune_attention, "capability", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_search_finds_the_best_tile_and_the_faster_kernel(gpu, head_dim):
    timer = Named(head_dim, cost)
    begin = Choice("flash", Flash(128, 64, 8, 3))
    found = tune_attention.fastest_prompts(timer, begin, FAR)
    assert found == Choice("hopper" if (gpu, head_dim) == (90, 128) else "flash", Flash(64, 128, 4, 2))
    assert all(flash_fits(choice.tile, head_dim, 2, gpu) for choice in timer.tried)
    assert len(set(timer.tried)) < 60
    firsts = list(dict.fromkeys(timer.tried))[:5]
    assert firsts[0] == begin and all(tune_attention.distance(c.tile, begin.tile) <= 1 for c in firsts)


def test_a_slower_kernel_for_hopper_leaves_the_portable_one(monkeypatch):
    monkeypatch.setattr(tune_attention, "capability", lambda device: 90)
    timer = Named(128, lambda choice: 2e-4 if choice.kernel == "hopper" else cost(choice))
    found = tune_attention.fastest_prompts(timer, Choice("flash", Flash(128, 64, 8, 3)), FAR)
    assert found == Choice("flash", Flash(64, 128, 4, 2))


def test_a_fast_tile_that_is_wrong_does_not_win(monkeypatch, capsys):
    monkeypatch.setattr(tune_attention, "capability", lambda device: 90)
    timer, bad = Named(64, cost), Flash(64, 128, 4, 2)
    timer.chain.right = lambda part, choice: choice.tile != bad
    found = tune_attention.fastest_prompts(timer, Choice("flash", Flash(128, 64, 8, 3)), FAR)
    assert found.tile != bad and cost(found) < cost(Choice("flash", Flash(128, 64, 8, 3)))
    assert "WRONG: attention of 8192 tokens as flash(block_m=64" in capsys.readouterr().out


def test_without_time_nothing_is_tried(gpu):
    timer, begin = Named(128, cost), Choice("flash", Flash(128, 64, 8, 3))
    assert tune_attention.fastest_prompts(timer, begin, time.monotonic() - 1) == begin
    assert not timer.tried


def test_a_row_takes_the_place_of_its_like_alone(tmp_path):
    path = tmp_path / "gpu.json"
    rows = tuning.read(tuning.TABLES / "nvidia-h200.json")
    new = AttendRow("attend", 64, 2, False, ANY, False, Choice("flash", Flash(64, 64, 4, 2)))
    after, out = tune_attention.put(rows, new)
    tuning.write(path, "a GPU", after)
    after = tuning.read(path)
    assert new in after and len(after) == len(rows) and not out
    assert {row for row in rows if row[:-1] != new[:-1]} == set(after) - {new}
    more = AttendRow("attend", 64, 2, True, ANY, False, Choice("flash", None))
    assert len(tune_attention.put(after, more)[0]) == len(rows) + 1


def test_rows_for_few_pairs_go_if_they_have_other_keys(tmp_path):
    path = tmp_path / "gpu.json"
    rows = tuning.read(tuning.TABLES / "nvidia-h200.json")
    new = AttendRow("attend", 64, 2, False, ANY, False, Choice("flash", Flash(64, 128, 4, 2)))
    after, out = tune_attention.put(rows, new)
    few = {row for row in rows if row[:4] == new[:4] and row[:-1] != new[:-1]}
    assert set(out) == few and {(row.pairs, row.beside) for row in few} == {(16384, False), (16384, True)}
    tuning.write(path, "a GPU", after)
    assert set(tuning.read(path)) == {row for row in rows if row[:4] != new[:4]} | {new}


def test_tuning_begins_with_the_file_the_gpus_table_or_the_default(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    path, rows = tune_attention.target(HERE, out)
    used = tuning.TABLES / f"{tuning.file_name(HERE)}.json"
    assert path == out and rows == tuning.read(used if used.exists() else tuning.TABLES / "default.json")
    assert tune_attention.target(HERE, None)[0] == used
    row = AttendRow("attend", 64, 2, False, ANY, False, Choice("flash", Flash(64, 64, 4, 2)))
    tuning.write(out, "a GPU", [row])
    assert tune_attention.target(HERE, out) == (out, [row])


def test_a_run_prints_before_and_after_and_writes_a_table(tmp_path, monkeypatch, capsys, small):
    """With a clock that says what tiles cost, on whatever is here."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tuning, "file_name", lambda device: "nvidia-h200")
    for module in (tuning, tune_attention):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    monkeypatch.setattr(tune_attention, "Prompts", lambda *what: small)
    monkeypatch.setattr(tune_attention, "Timer", lambda prompts, choices, workers: FakeTimer(prompts, cost))
    monkeypatch.setattr(small, "right", lambda part, choice: True)
    monkeypatch.setattr(small, "seconds", lambda choice: {n: cost(choice) for n in small.inputs})
    out = tmp_path / "gpu.json"
    args = tune_attention._arguments(["--prompts", "6", "24", "--shape", "tiny-llama-3.2-1b", "--out", str(out)])
    with fresh_tables():
        tune_attention.tune_prompts.__wrapped__(args)
    row = AttendRow("attend", 64, 2, False, ANY, False, Choice("flash", Flash(64, 128, 4, 2)))
    assert row in tuning.read(out)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"Some GPU: 5 minutes; {out}"
    assert told[1].startswith("tiny-llama-3.2-1b, head_dim 64 (before): 6 tokens 104.0 us ")
    assert told[2].startswith("tiny-llama-3.2-1b, head_dim 64 (after): 6 tokens 100.0 us ")
    assert told[2].endswith("flash(block_m=64, block_n=128, num_warps=4, num_stages=2)")
    assert len(told) == 5
    assert all(": out goes, as it may not stand beside it, flash(block_m=64, block_n=64" in line for line in told[3:])


def test_a_prompt_has_a_token(capsys):
    with pytest.raises(SystemExit):
        tune_attention._arguments(["--prompts", "512", "0"])
    assert "--prompts 0: expected 1 token or more" in capsys.readouterr().err


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(capsys):
    assert tune_attention.main(["--prompts", "512"]) == 3
    assert capsys.readouterr().err == "error: no GPU that torch can use\n"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b"])
def test_a_short_run_writes_a_row(shape, tmp_path, capsys):
    target, cfg = tmp_path / "gpu.json", config(shape)
    begin = time.monotonic()
    options = ["--prompts", "512", "2048", "--minutes", "0.3", "--out", str(target)]
    assert tune_attention.main(["--shape", shape, *options]) == 0
    assert time.monotonic() - begin < 60
    assert ("attend", cfg.head_dim, 2, False) in {row[:4] for row in tuning.read(target)}
    told = capsys.readouterr().out
    assert "(before)" in told and "(after)" in told and "WRONG" not in told
