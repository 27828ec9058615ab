"""tools/tune_attention.py: attention in the chain runs as told and is checked; the search finds what is fastest."""

import time

import pytest

from lite_llm.ops.triton.attention_tiles import Decode
from lite_llm.ops.triton.launch import AT_ONCE, LAST
from lite_llm.ops.triton.tuning import CUBLAS, Choice
from tests.close import DEVICE, assert_close
from tests.tools.test_tune import FAR, FakeTimer, model, weights
from tools import chain as chains
from tools import tune_attention
from tools.chain import PARTS, Chain
from tools.tune_attention import NONE, PART

TILE = Decode(32, 4, 2, 2)


def test_attention_of_a_chain_runs_as_it_is_told():
    chain = Chain(weights("llama-3.2-1b"), 2, context=70, width=300)
    assert chain.table.shape == (2, 300) and not chain.table[:, 70:].any()
    usual = chain.once(PART, tune_attention.start(chain.weights, 2))
    assert_close(usual, chain.attend(None, chain._queries(), 0), *chain._expected(PART))
    for tile in (TILE, TILE._replace(release=AT_ONCE, asked=0), TILE._replace(release=LAST, asked=8, least=8)):
        assert chain.right(PART, Choice("decode", tile))
    assert not chain.right(PART, NONE)
    found = []
    for choice in (None, tune_attention.start(chain.weights, 2), NONE):
        choices = {part: CUBLAS for part in PARTS} | ({PART: choice} if choice else {})
        chain.run(choices, head=False)
        found.append(chain.x.float())
    assert (found[1] - found[0]).norm() < 0.05 * (found[2] - found[0]).norm()


def test_a_wrong_answer_of_attention_is_found(monkeypatch):
    chain, right = Chain(weights("llama-3.2-1b"), 1, context=20), chains.decode.decode

    def wrong(*args, **kwargs):
        right(*args, **kwargs)
        args[3][-1, -1, -1] += 0.5

    monkeypatch.setattr(chains.decode, "decode", wrong)
    assert not chain.right(PART, Choice("decode", TILE))


def cost(choice: Choice) -> float:
    """Best: 32 keys, 8 warps, one program, released last, 4 tiles asked, at least 4 in a share."""
    t = choice.tile
    off = (t.block_n != 32) + (t.num_warps != 8) + (t.programs != 1) + (t.release != LAST) + (t.asked != 4)
    return 1e-4 * (1 + 0.01 * (off + (t.least != 4) + (t.num_stages != 3)))


def test_the_search_finds_the_best_tile(monkeypatch):
    timer = FakeTimer(model(), cost)
    monkeypatch.setattr(timer.chain, "right", lambda part, choice: True)
    begin = Choice("decode", TILE)
    assert tune_attention.search(timer, {PART: begin}, FAR) == Choice("decode", Decode(32, 8, 3, 1, LAST, 4, 4))
    assert len(set(timer.tried)) < 150
    assert tune_attention.search(timer, {PART: begin}, time.monotonic() - 1) == begin


@pytest.mark.cpu
def test_without_a_gpu_it_says_so(capsys):
    assert tune_attention.main([]) == 3
    assert capsys.readouterr().err == "error: no GPU that torch can use\n"


@pytest.mark.gpu
def test_a_short_run_prints_what_attention_adds(capsys):
    assert DEVICE == "cuda"
    begin = time.monotonic()
    assert tune_attention.main(["--shape", "qwen2.5-0.5b", "--tokens", "1", "--minutes", "0.2"]) == 0
    assert time.monotonic() - begin < 40
    told = capsys.readouterr().out
    assert told.count("attention adds") == 2 and "WRONG" not in told
