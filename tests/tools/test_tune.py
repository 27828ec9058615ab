"""tools/tune.py: every candidate can run and is checked, time is kept to, and a table never loses what it had."""

import time

import pytest
import torch

from lite_llm.config import HFConfig
from lite_llm.models import registry, shapes
from lite_llm.ops.triton import gemv, skinny, tuning, wide
from lite_llm.ops.triton.tuning import CUBLAS, Choice, Row
from tests.close import DEVICE
from tools import chain as chains
from tools import tune
from tools.chain import PARTS, Chain, Weights

FAR = 1e12  # seconds
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def weights(shape: str) -> Weights:
    return Weights(registry.parse(HFConfig(shapes.shape_config(f"tiny-{shape}"))), torch.device(DEVICE), DTYPE, cold=1)


def small(w: Weights, part: str, kernel: str, tokens: int) -> Choice:
    key = w.key(part)
    if kernel == "gemv":
        return Choice("gemv", gemv.Tile(32, 256, 8))  # few programs, for the interpreter runs one after the other
    if kernel == "wide":
        return Choice("wide", wide.Tile(64, 64, 64, 4, 2, tma=DEVICE == "cpu"))
    return Choice("skinny", skinny.default(*key, tokens, 90)) if kernel == "skinny" else CUBLAS


@pytest.mark.parametrize("kernel, tokens", [("gemv", 2), ("skinny", 5), ("wide", 66), ("cublas", 5)])
@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-0.5b"])
def test_every_part_of_a_chain_is_right(shape, kernel, tokens):
    w = weights(shape)
    chain = Chain(w, tokens, context=20)
    choices = {part: small(w, part, kernel, tokens) for part in PARTS}
    assert all(chain.possible(part, choice) for part, choice in choices.items())
    assert all(chain.right(part, choice) for part, choice in choices.items())
    chain.run(choices, head=True)
    assert chain.x.isfinite().all() and not torch.equal(chain.x, chain.start)


def test_heads_with_a_norm_leave_few_tokens_to_skinny():
    w = weights("qwen3-0.6b")
    assert w.least("qkv") == 5 and w.least("out") == 1
    assert not Chain(w, 1, 8).possible("qkv", small(w, "qkv", "gemv", 1))
    assert Chain(w, 5, 8).right("qkv", small(w, "qkv", "skinny", 5))


def test_a_wrong_kernel_is_found(monkeypatch):
    w = weights("llama-3.2-1b")
    chain, right = Chain(w, 2, 8), gemv.gemv

    def wrong(*args):
        y = right(*args)
        y[-1, -1] += 0.5
        return y

    choice = small(w, "gate_up", "gemv", 2)
    assert chain.right("gate_up", choice)
    monkeypatch.setattr(chains.gemv, "gemv", wrong)
    assert not chain.right("gate_up", choice) and not chain.right("down", small(w, "down", "gemv", 2))


def model(tokens: int = 1) -> Chain:
    """What the search sees of a chain of Llama-3.2-1B, without weights."""
    w = Weights.__new__(Weights)
    w.cfg, w.device = registry.parse(HFConfig(shapes.shape_config("llama-3.2-1b"))), torch.device("cpu")
    chain = Chain.__new__(Chain)
    chain.weights, chain.tokens = w, tokens
    return chain


class FakeTimer(tune.Timer):
    """A graph is a set of choices; `cost` says how long it takes, by a clock that only graphs and samples move."""

    def __init__(self, chain, cost, workers=8):
        self.chain, self.workers, self.cost = chain, workers, cost
        self.tried: list[Choice] = []
        self.samples = 0

    def usable(self, part, candidates, until):
        return candidates if time.monotonic() < until else []

    def graph(self, choices, part):
        self.tried.append(choices[part])
        return choices[part]

    def sample(self, graph):
        self.samples += 1
        return self.cost(graph)


def gate_up_cost(choice: Choice) -> float:
    """Best: gemv, 2 rows, 512 columns, 2 warps, weights evicted first, 4 MB ahead."""
    if choice.kernel != "gemv":
        return 1.5e-4
    t = choice.tile
    off = abs(t.rows - 2) + abs(t.columns - 512) / 512 + abs(t.warps - 2)
    return 1e-4 * (1 + 0.02 * off + 0.01 * (not t.evict_first) + 0.01 * (t.ahead != 1 << 22))


def test_the_search_finds_the_best_tile(monkeypatch):
    timer = FakeTimer(model(), gate_up_cost)
    monkeypatch.setattr(timer.chain, "right", lambda part, choice: True)
    start = {"gate_up": Choice("gemv", gemv.Tile(8, 2048, 8))}
    found = tune.search(timer, "gate_up", start, None, FAR)
    assert found == Choice("gemv", gemv.Tile(2, 512, 2, evict_first=True, ahead=1 << 22))
    assert len(set(timer.tried)) < 120


@pytest.mark.parametrize("tokens, kernel", [(1, "gemv"), (16, "skinny"), (256, "wide")])
def test_every_candidate_fits(tokens, kernel, monkeypatch):
    timer = FakeTimer(model(tokens=tokens), lambda choice: 1e-4 + 1e-5 * (choice.kernel != kernel))
    monkeypatch.setattr(timer.chain, "right", lambda part, choice: True)
    for part in PARTS:
        found = tune.search(timer, part, {part: CUBLAS}, None, FAR)
        assert found.kernel == kernel
    assert all((choice.tile is None) == (choice.kernel in ("cublas", "hopper")) for choice in timer.tried)
    assert tokens > tune.WIDE or all(choice.kernel != "wide" for choice in timer.tried)
    assert all(timer.chain.tokens <= c.tile.tokens for c in timer.tried if c.kernel == "skinny")


def test_slow_candidates_are_dropped_early_and_noise_changes_nothing(monkeypatch):
    timer = FakeTimer(model(), lambda choice: 1e-4 if choice == CUBLAS else 2e-4)
    tile = gemv.Tile(2, 512, 2)
    candidates = [Choice("gemv", tile._replace(rows=rows)) for rows in (1, 2, 4)]
    assert timer.better("gate_up", {"gate_up": CUBLAS}, candidates, FAR) == CUBLAS
    assert timer.samples == 3 + 2 * len(candidates)
    same = FakeTimer(model(), lambda choice: 1e-4)
    assert same.better("gate_up", {"gate_up": CUBLAS}, candidates, FAR) == CUBLAS


def test_a_fast_candidate_that_is_wrong_is_refused(monkeypatch, capsys):
    bad, good = (Choice("gemv", gemv.Tile(rows, 512, 2)) for rows in (1, 2))
    timer = FakeTimer(model(), lambda choice: {bad: 1e-5, good: 5e-5}.get(choice, 1e-4))
    monkeypatch.setattr(timer.chain, "right", lambda part, choice: choice != bad)
    assert timer.better("gate_up", {"gate_up": CUBLAS}, [bad, good], FAR) == good
    assert "WRONG: gate_up of 1 tokens as gemv(rows=1" in capsys.readouterr().out


def test_without_time_nothing_is_tried():
    timer = FakeTimer(model(), gate_up_cost)
    start = Choice("gemv", gemv.Tile(8, 2048, 8))
    assert tune.search(timer, "gate_up", {"gate_up": start}, None, time.monotonic() - 1) == start
    assert not timer.tried


def test_a_hint_from_fewer_tokens_grows():
    chain = model(tokens=16)
    hint = Choice("skinny", skinny.Tile(8, 64, 128))
    assert next(tune.others(chain, "out", CUBLAS, hint)).tile.tokens == 16


def test_a_hint_from_fewer_tokens_loses_splits():
    chain, hint = model(tokens=512), Choice("wide", wide.Tile(128, 128, 64, splits=8))
    assert not chain.possible("out", hint)
    smaller = next(tune.others(chain, "out", CUBLAS, hint))
    assert smaller.tile.splits == 2 and chain.possible("out", smaller)


def test_every_kernel_is_tried_with_its_default():
    for tokens, more in ((16, set()), (256, {"wide", "hopper"})):
        chain = model(tokens=tokens)
        kernels = {choice.kernel for choice in tune.others(chain, "out", CUBLAS, None)}
        assert kernels == {"cublas", "gemv", "skinny"} | more
        assert not chain.possible("out", Choice("hopper", None))


@pytest.mark.parametrize("gpu", [80, 90, 100])
def test_hoppers_kernel_is_for_gate_and_up_on_hopper(monkeypatch, gpu):
    monkeypatch.setattr(chains, "capability", lambda device: gpu)
    found = [part for part in PARTS if model(tokens=256).possible(part, Choice("hopper", None))]
    assert found == ["gate_up"] * (gpu == 90)


def test_a_new_shape_keeps_its_tiles_for_other_numbers_of_tokens(tmp_path):
    w = model().weights
    w.cfg = registry.parse(HFConfig(shapes.shape_config("llama-3.1-8b")))
    rows = tuning.read(tuning.TABLES / "default.json")
    key, won = w.key("down"), Choice("gemv", gemv.Tile(4, 1024, 4))
    grown = tune.put(rows, w, "down", 1, won)
    mine = {row.tokens: row.choice for row in grown if row[:3] == key}
    assert mine[1] == won and set(mine) == {1} | {row.tokens for row in rows if row.op == "add"}
    assert all(choice == tuning.choose(w.device, *key, n) for n, choice in mine.items() if n > 1)
    better = Choice("gemv", gemv.Tile(2, 1024, 4))
    assert len(tune.put(grown, w, "down", 1, better)) == len(grown)
    assert Row(*key, 1, better) in tune.put(grown, w, "down", 1, better)
    tuning.write(tmp_path / "gpu.json", "a GPU", grown)
    assert sorted(tuning.read(tmp_path / "gpu.json"), key=lambda row: row[:-1]) == sorted(
        grown, key=lambda row: row[:-1]
    )


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--shape", "llama-3.2-1b"]) == 3
    assert capsys.readouterr().err == "error: no GPU that torch can use\n"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", ["1", "16"])
def test_a_short_run_writes_a_table_and_keeps_to_its_time(tokens, tmp_path, capsys):
    target = tmp_path / "gpu.json"
    begin = time.monotonic()
    options = ["--tokens", tokens, "--minutes", "0.2", "--parts", "out", "qkv", "--out", str(target)]
    assert tune.main(["--shape", "qwen2.5-0.5b", *options]) == 0
    assert time.monotonic() - begin < 40
    found = {row[:4] for row in tuning.read(target)}
    assert {("add", 896, 896, int(tokens)), ("qkv", 896, 1152, int(tokens))} <= found
    assert "WRONG" not in capsys.readouterr().out
