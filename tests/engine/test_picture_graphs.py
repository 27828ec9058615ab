"""On a GPU pictures are encoded by CUDA graphs: bit for bit the same, without waiting, and nothing compiles late."""

import random

import numpy as np
import pytest
import torch

from lite_llm.config import EngineConfig, HFConfig
from lite_llm.engine.build import Blueprint
from lite_llm.engine.engine import Engine, Flight
from lite_llm.engine.request import Request, SamplingParams, Tiles
from lite_llm.engine.vision import MOST_TILES
from lite_llm.models import registry, shapes, tiling
from lite_llm.ops import warm
from tests.engine.models import fill_

SHAPES = ["tiny-llava-1.5-7b", "tiny-llava-1.6-mistral-7b"]


def engine_of(shape: str, device: str = "cuda", warm: bool = True) -> Engine:
    cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
    config = EngineConfig(device=device, dtype="bfloat16", kv_tokens=1500, context=500, max_requests=6, step_tokens=96)
    engine = Blueprint(cfg, config).build(fill_)
    if warm:
        engine.warm(lambda *_: None)
    return engine


def request_of(engine: Engine, draw: random.Random, seed: int) -> Request:
    """With up to two of six pictures, and text around them."""
    cfg, ids, pictures = engine.cfg.vision, [5], []
    for _ in range(draw.randint(0, 2)):
        size = draw.choice(((56, 56), (100, 40), (30, 200)))
        which = np.random.default_rng(draw.randint(0, 1))
        pixels = which.normal(size=(tiling.tiles(cfg, size), 3, cfg.image_size, cfg.image_size)).astype(np.float32)
        pictures.append((len(ids), Tiles(pixels, size, tiling.tokens(cfg, size))))
        ids += [cfg.image_token] * pictures[-1][1].tokens + [draw.randrange(3, 500) for _ in range(draw.randint(0, 20))]
    wish = SamplingParams(max_tokens=draw.randint(1, 20), temperature=draw.choice((0.0, 0.8)), seed=seed).resolved({})
    return Request(ids, wish, max_len=len(ids) + wish.max_tokens, pictures=tuple(pictures))


def answers(engine: Engine, seed: int) -> list[tuple[list[int], str | None]]:
    """Of thirty requests that come in at random."""
    draw = random.Random(seed)
    requests = [request_of(engine, draw, i) for i in range(30)]
    todo = list(requests)
    while todo or not engine.idle:
        for _ in range(draw.randint(0, 3)):
            if todo:
                engine.add(todo.pop())
        engine.step()
        engine.scheduler.check()
    return [(request.output, request.finish_reason) for request in requests]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_and_eager_steps_say_the_same(shape, monkeypatch):
    monkeypatch.setattr(Flight, "is_here", False)  # else the clock decides what is in a batch, and so which kernels run
    assert answers(engine_of(shape), 1) == answers(engine_of(shape, warm=False), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_replay_gives_the_bits_of_an_eager_call(shape):
    engine = engine_of(shape)
    encoder, side = engine.runner.encoder, engine.cfg.vision.image_size
    assert sorted(encoder._graphs) == list(range(1, MOST_TILES + 1))
    with torch.cuda.stream(engine.stream):
        for tiles in range(MOST_TILES, 0, -1):
            pixels = torch.randn(tiles, 3, side, side, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(encoder._run(pixels), encoder.model.encode_tiles(pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_no_step_waits_for_the_device_and_nothing_compiles(shape):
    engine, draw = engine_of(shape), random.Random(2)
    requests = [request_of(engine, draw, i) for i in range(12)]
    for request in requests:
        engine.add(request)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warm.counting() as counter:
            while not engine.idle:
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {request.finish_reason for request in requests} == {"length"} and any(r.pictures for r in requests)
    assert (counter.compiled, counter.loaded) == ([], [])
