"""A step recorded as a CUDA graph is the step: bit for bit, at every context, batch and mix of wishes."""

import dataclasses
import random

import pytest
import torch

from lite_llm.config import EngineConfig, ModelConfig
from lite_llm.engine import runner
from lite_llm.engine.build import Blueprint
from lite_llm.engine.draft import Lookup
from lite_llm.engine.engine import Flight
from lite_llm.engine.request import Request, SamplingParams
from lite_llm.engine.runner import Piece, Shape
from lite_llm.rope import Rope
from tests.engine.models import Rig, alone, fill_, tiny_config

WISHES = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logprobs": 3, "logit_bias": {5: 2.0}},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": tuple(range(40))},
)


def test_every_filled_plan_fits_the_smallest_shape_that_holds_it():
    for most, budget in ((1, 1), (1, 2048), (64, 64), (64, 2048), (200, 512), (256, 8192)):
        fixed = runner.shapes(most, budget)
        assert len(set(fixed)) == len(fixed) and max(s.decodes for s in fixed) == most
        chooser = runner.Runner.__new__(runner.Runner)
        chooser.fixed = fixed
        draw = random.Random(most)
        for _ in range(300):
            decodes = draw.randint(0, most)
            prompts = draw.randint(0, min(most - decodes, runner.PROMPTS))
            tokens = draw.randint(prompts, budget - decodes) if prompts and budget - decodes >= prompts else 0
            prompts = prompts if tokens else 0
            if decodes + prompts:
                tokens = chooser.fill(decodes, tokens) if tokens else 0
                assert not prompts or tokens > 0
                shape = chooser.fit(decodes, prompts, tokens)
                assert shape.decodes >= decodes and shape.prompts >= prompts and shape.tokens >= tokens
                assert prompts or shape == Shape(shape.decodes, 0, 0)


def test_prompts_beside_decodes_take_what_timed_shapes_allow():
    chooser = runner.Runner.__new__(runner.Runner)
    chooser.fixed = runner.shapes(64, 2048)
    chooser.seconds = {shape: 1.0 + 0.01 * shape.decodes + 0.005 * shape.tokens for shape in chooser.fixed}
    for decodes, slowdown, tokens in ((1, 2.0, 128), (1, 1.6, 64), (8, 2.0, 128), (64, 2.0, 256), (64, 100.0, 1984)):
        assert chooser.beside(decodes, slowdown) == tokens
        alone, mixed = chooser.fit(decodes, 0, 0), chooser.fit(decodes, 1, tokens)
        assert chooser.seconds[mixed] <= slowdown * chooser.seconds[alone]
    assert chooser.beside(8, 1.0) == 64  # none is that fast


def test_a_prompt_alone_takes_a_shape_without_decodes_if_that_is_as_small():
    chooser = runner.Runner.__new__(runner.Runner)
    chooser.fixed = runner.shapes(256, 2048)
    assert chooser.fit(0, 1, 1856) == Shape(0, 32, 2048)
    assert chooser.fit(192, 1, 1856) == Shape(192, 32, 1856)


def test_tokens_of_prompts_wait_where_that_saves_pads():
    chooser = runner.Runner.__new__(runner.Runner)
    chooser.fixed = runner.shapes(256, 8192)
    for decodes, tokens, now in (
        (1, 1, 1), (1, 64, 64), (1, 100, 100), (1, 129, 128), (100, 280, 256), (100, 380, 380), (100, 1100, 896),
        (0, 70, 70), (0, 280, 280), (0, 1030, 1030), (0, 1100, 1100), (0, 2100, 2048), (0, 8000, 8000),
        (256, 8192, 7936),
    ):  # fmt: skip
        assert chooser.fill(decodes, tokens) == now
    draw = random.Random(0)
    for _ in range(2000):
        decodes, tokens = draw.choice((0, draw.randint(1, 256))), draw.randint(1, 8192)
        left, computed, steps = tokens, 0, 0
        while left:
            now = chooser.fill(decodes, left)
            left, computed, steps = left - now, computed + chooser.fit(decodes, 1, now).computed, steps + 1
        if tokens <= max(s.tokens for s in chooser.fixed if s.decodes >= decodes):
            whole = chooser.fit(decodes, 1, tokens).computed
            assert computed + (steps - 1) * (-decodes if decodes else runner.ANOTHER) <= whole


def test_large_steps_fill_the_tiles_of_matmuls():
    for shape in runner.shapes(256, 8192):
        total = shape.decodes + shape.tokens
        if shape.decodes and shape.tokens > max(2 * shape.decodes, runner.LARGE // 2):
            assert total in runner.TOKENS
        assert shape.tokens == 0 or total <= 8192


def test_a_runner_without_shapes_leaves_nothing_to_the_next_step():
    chooser = runner.Runner.__new__(runner.Runner)
    chooser.fixed = []  # every step has its own size
    assert chooser.fill(3, 1100) == 1100


@pytest.mark.parametrize(
    "slowdown, step_tokens, length, most",
    [(None, 256, 200, 200), (2.0, 256, 200, 64), (None, 256, 1200, 256), (None, 2048, 1200, runner.LARGE - 4)],
)
def test_an_engine_that_knows_its_shapes_holds_prompts_back_beside_decodes(slowdown, step_tokens, length, most):
    rig = Rig(slots=3000, rows=4, step_tokens=step_tokens, max_len=1500, padded=True)
    rig.engine.max_slowdown = slowdown
    rig.engine.runner.seconds = {s: 1.0 + 0.01 * s.tokens for s in rig.engine.runner.fixed}
    first = rig.add([1, 2], max_tokens=50)
    rig.step()
    second = rig.add([i % 16 for i in range(length)], max_tokens=2)
    rig.step()
    assert first.decoding and second.cached == most
    rig.run()
    assert (second.output, second.finish_reason) == alone(second, 16)


def test_an_engine_leaves_to_the_next_step_what_would_be_computed_among_pads():
    rig = Rig(slots=900, rows=4, step_tokens=512, max_len=400, padded=True)
    first = rig.add([1, 2], max_tokens=50)
    rig.step()
    second = rig.add([i % 16 for i in range(280)], max_tokens=2)
    rig.step()
    assert first.decoding and second.cached == 256
    rig.step()
    assert second.cached == 280
    rig.run()
    assert (second.output, second.finish_reason) == alone(second, 16)


def config_of(max_len: int) -> ModelConfig:
    return dataclasses.replace(tiny_config(200, max_len), hidden=64, head_dim=16, rope=Rope(theta=100.0, rotary=16))


def answers(seed: int, graphs: bool) -> list[tuple]:
    """Of thirty requests that come in at random. An engine that nobody warmed pads its steps but records nothing."""
    draw = random.Random(seed)
    config = EngineConfig(
        device="cuda", dtype="bfloat16", kv_tokens=1500, context=500, max_requests=12, step_tokens=96, drafts=3 * seed
    )
    engine = Blueprint(config_of(600), config).build(lambda model: fill_(model, seed))
    if graphs:
        engine.warm(lambda *_: None)
    assert bool(engine.runner.graphs) == graphs
    requests = []
    for i in range(30):
        ids = [draw.randrange(200) for _ in range(draw.choice((1, 2, 17, 60, 300)))]
        wish = SamplingParams(max_tokens=draw.randint(1, 40), seed=i, **draw.choice(WISHES)).resolved({})
        requests.append(Request(ids, wish, frozenset(wish.stop_token_ids), max_len=len(ids) + wish.max_tokens))
    todo = list(requests)
    while todo or not engine.idle:
        for _ in range(draw.randint(0, 3)):
            if todo:
                engine.add(todo.pop())
        engine.step()
        engine.scheduler.check()
    return [(r.output, r.finish_reason, r.logprobs) for r in requests]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_graphs_and_eager_steps_say_the_same(seed, monkeypatch):
    monkeypatch.setattr(Flight, "is_here", False)  # else the clock decides what is in a batch, and so which kernels run
    assert answers(seed, graphs=True) == answers(seed, graphs=False)


@pytest.mark.gpu
def test_no_step_waits_for_the_device(monkeypatch):
    """Whoever asks for logprobs, joins, gets slots or drafts: a step only sends; its tokens are read once they are
    here."""
    monkeypatch.setattr(Lookup, "guess", lambda self, ids, most, missing: [1] * most)
    config = EngineConfig(
        device="cuda", dtype="bfloat16", kv_tokens=1500, context=500, max_requests=4, step_tokens=96, drafts=4
    )
    engine = Blueprint(config_of(600), config).build(fill_)
    engine.warm(lambda *_: None)
    requests = []
    ran, run = [], engine.runner.run
    monkeypatch.setattr(
        engine.runner, "run", lambda shape, *rest, **more: (ran.append(shape), run(shape, *rest, **more))
    )
    for i, wish in enumerate((*WISHES * 2, *WISHES[:1] * 4)):
        params = SamplingParams(max_tokens=20 + i, seed=i, **wish).resolved({})
        requests.append(Request(list(range(30 + i)), params, frozenset(params.stop_token_ids), max_len=50 + 2 * i))
        engine.add(requests[-1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not engine.idle:
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {request.finish_reason for request in requests} <= {"length", "stop"}
    assert any(request.logprobs for request in requests) and max(shape.samples for shape in ran) == 5


@pytest.mark.gpu
def test_steady_steps_allocate_nothing():
    """But for those that tell the device of new slots, one in thirty or so."""
    config = EngineConfig(device="cuda", dtype="bfloat16", kv_tokens=1500, context=300, max_requests=4, step_tokens=96)
    engine = Blueprint(config_of(600), config).build(fill_)
    engine.warm(lambda *_: None)
    params = SamplingParams(max_tokens=200, temperature=0.0).resolved({})
    requests = [Request(list(range(20 + i)), params, max_len=220 + i) for i in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(10):
        engine.step()
    steady = 0
    for _ in range(150):
        slots, before = sum(len(r.slots) for r in requests), torch.cuda.memory_stats()["allocation.all.allocated"]
        engine.step()
        if sum(len(r.slots) for r in requests) == slots:
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
            steady += 1
    assert steady > 100


@pytest.mark.gpu
@torch.inference_mode()
def test_a_replay_gives_the_bits_of_an_eager_step():
    torch.manual_seed(0)
    config = EngineConfig(
        device="cuda", dtype="bfloat16", kv_tokens=3000, context=1000, max_requests=8, step_tokens=64, drafts=3
    )
    engine = Blueprint(config_of(1000), config).build(fill_)
    engine.warm(lambda *_: None)
    run, state, i = engine.runner, engine.state, engine.runner._inputs
    table = 1 + torch.randperm(2999, device="cuda")[: 8 * 300].int().view(8, 300)
    for tensor in (engine.kv.k, engine.kv.v):
        tensor.normal_()
    pool = [engine.kv.k.clone(), engine.kv.v.clone()]
    for shape, adjusted in run._variants():
        seen = []
        for replay in (False, True):
            engine.kv.k.copy_(pool[0]), engine.kv.v.copy_(pool[1])
            state.table[:8, :300] = table
            state.last[:8] = torch.arange(8, device="cuda", dtype=torch.int32)
            state.length[:8] = torch.tensor([0, 1, 5, 77, 128, 129, 250, 299], device="cuda", dtype=torch.int32)
            state.ended[:8], state.max_len[:8], state.counting[:8] = 0, 1000, 1
            state.counts.zero_(), state.step.zero_(), state.ring.zero_()
            prompts = [Piece(7, 0, [1, 2, 3], [2901, 2902, 2903], True)] if shape.prompts else []
            run._sent = None
            run.send(shape, list(range(min(shape.decodes, 7))), prompts)
            torch.cuda.synchronize()
            with torch.cuda.stream(engine.stream):
                run.run(shape, adjusted) if replay else run._step(shape, adjusted)
            torch.cuda.synchronize()
            state_now = [state.last, state.length, state.ended, state.counts, state.ring, i["tokens"]]
            seen.append([t.clone() for t in (*state_now, run.raw, engine.kv.k[:, 1:], engine.kv.v[:, 1:])])
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), shape
