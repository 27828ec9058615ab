"""What fits (KVP-06): tiny, exact and huge memory; wishes that cannot be met are refused with numbers."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from lite_llm.config import EngineConfig, HFConfig
from lite_llm.engine import build, memory, runner, vision
from lite_llm.engine.build import Blueprint
from lite_llm.engine.memory import GIB, plan_memory, size
from lite_llm.engine.request import Part, Tiles
from lite_llm.errors import DoesNotFit, EnvironmentProblem, LiteLLMError, UnsupportedModel, UsageError
from lite_llm.layers import LayerFactory
from lite_llm.models import registry, shapes, tiling
from lite_llm.ops.triton import decode, launch, skinny, tuning
from tests.engine.models import Rig, fill_, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CFG = dataclasses.replace(tiny_config(vocab=1000, max_len=4096), hidden=64, ffn=128)
TOKEN = 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head_dim, fp32
WEIGHTS = 50 << 20


@pytest.fixture
def plan(monkeypatch):
    def planned(free: int, device: torch.device = CPU, **wishes) -> memory.MemoryPlan:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        return plan_memory(CFG, EngineConfig(memory_fraction=1.0, **wishes), device, torch.float32, WEIGHTS)

    return planned


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("free", [0, 1 << 20, 64 << 20, 1 << 28, 1 << 30, 1 << 34, 1 << 40])
def test_a_plan_never_spends_more_than_there_is(plan, device, free):
    try:
        got = plan(free, device)
    except DoesNotFit as error:
        assert free < 1 << 30 and size(WEIGHTS) in str(error) and size(free) in str(error)
        return
    assert got.weights + got.workspace + got.kv + got.kv_token <= got.limit <= got.free == free
    assert got.left == free - got.weights - got.workspace - got.kv >= 0
    assert 1 <= got.context <= min(got.kv_tokens, 4096) and got.kv_token == TOKEN
    assert got.context == 4096 or free < 1 << 30
    assert got.kv_tokens <= 64 * 4096


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("wish", [dict(context=2000), dict(kv_tokens=2000), dict(context=1500, kv_tokens=2000)])
def test_wishes_that_fit_exactly_are_met_and_one_byte_less_is_refused(plan, device, wish):
    with pytest.raises(DoesNotFit) as error:
        plan(1 << 20, device, **wish)
    low, high = 1 << 20, 1 << 34
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(middle, device, **wish)
            high = middle
        except DoesNotFit:
            low = middle
    got = plan(high, device, **wish)
    assert got.kv_tokens == 2000 and got.context == wish.get("context", 2000)
    assert got.weights + got.workspace + got.kv + got.kv_token <= high
    assert "2,000 KV tokens" in str(error.value) and f"{size(1 << 20)} of {size(1 << 20)} free" in str(error.value)
    with pytest.raises(DoesNotFit) as error:
        plan(low, device, **wish)
    assert re.search(r"needs [\d.]+ [MG]iB \(50.0 MiB weights", str(error.value))


def test_a_wish_is_never_cut_in_silence(plan):
    assert plan(1 << 40, kv_tokens=100_000).kv_tokens == 100_000, "more than all requests can use: the cache can"
    assert plan(1 << 40, kv_tokens=100_000, max_requests=1).kv_tokens == 100_000
    assert plan(1 << 40, context=100).context == 100
    assert plan(1 << 40, kv_tokens=100).context == 100, "the context was left open"
    with pytest.raises(DoesNotFit, match="context = 200.*kv_tokens = 100"):
        plan(1 << 40, context=200, kv_tokens=100)
    with pytest.raises(LiteLLMError, match="context = 4,?097.* 4,?096"):
        plan(1 << 40, context=4097)


def test_a_refusal_says_numbers_that_agree(plan):
    """What is needed is more than what may be used; on a CPU too, where only the default leaves half to others."""
    assert plan(1 << 30, CPU, kv_tokens=2_500_000).kv_tokens == 2_500_000
    for device in (CPU, CUDA):
        with pytest.raises(DoesNotFit) as error:
            plan(1 << 30, device, kv_tokens=4_000_000)
        need, _, _, kv, limit, _ = (
            float(n) for n in re.findall(r"([\d.]+) GiB|([\d.]+) MiB", str(error.value)) for n in n if n
        )
        assert need > limit and kv == pytest.approx(4_000_000 * TOKEN / GIB, abs=0.01)


def test_a_cut_context_is_reported(plan):
    small = plan(WEIGHTS + plan(1 << 34, context=16).workspace + (3 << 20))
    assert small.context < 4096 and "4,096 do not fit" in str(small)
    assert "do not fit" not in str(plan(1 << 34))


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_counts_the_bytes_of_the_real_model(tied):
    cfg = dataclasses.replace(CFG, tied_head=tied, qkv_bias=True, mlp_bias=True, qk_norm=True)
    blueprint = Blueprint(cfg, EngineConfig(device="cpu", kv_tokens=50, context=40))
    engine = blueprint.build(fill_)
    storages = {p.data_ptr(): p.numel() * p.element_size() for p in engine.model.parameters()}
    assert blueprint.plan.weights == sum(storages.values())
    assert engine.kv.k.shape == engine.kv.v.shape == (2, 51, 2, 8)
    assert (engine.kv.k.nbytes + engine.kv.v.nbytes) == blueprint.plan.kv + blueprint.plan.kv_token
    assert engine.scheduler.capacity == 50 and engine.cfg.max_len == 40 and engine.state.table.shape == (65, 40)


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_the_plan_has_room_for_the_partial_sums_of_every_kernel_in_the_tables(path, monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda device: tuning.by_shape(tuning.read(path)))
    meta = torch.device("meta")
    for name in shapes.shape_names():
        cfg = registry.parse(HFConfig(shapes.shape_config(name)))
        q, qkv = cfg.heads * cfg.head_dim, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
        sizes = [("qkv", cfg.hidden, qkv), ("add", q, cfg.hidden), ("gated", cfg.hidden, 2 * cfg.ffn)]
        sizes += [("add", cfg.ffn, cfg.hidden), ("linear", cfg.hidden, cfg.vocab)]
        most = 0
        for (op, width, rows), tokens in itertools.product(sizes, (1, 2, 4, 8, 16, 32, 64, 128)):
            kernel, tile = tuning.choose.__wrapped__(CPU, op, width, rows, tokens)
            if kernel == "skinny" and (tile.splits > 1 or op == "qkv"):
                x = torch.empty(tokens, width, device=meta)
                blocks = -(-rows // min(tile.rows, cfg.head_dim)) if op == "qkv" else -(-rows // tile.rows)
                most = max(most, sum(t.nbytes for t in skinny.workspace(x, rows, blocks, 0, tile)))
        for requests, context in ((1, 1), (64, 1000), (256, cfg.max_len)):
            segments = min(-(-context // decode.SEGMENT), decode.max_segments(cfg.kv_heads))
            partial = decode.workspace(requests, cfg.heads, segments, cfg.head_dim, meta)
            assert most + sum(t.nbytes for t in partial) <= memory.partial_sums(cfg, requests, context), name


def test_flash_decoding_is_given_what_it_takes_and_no_more():
    for kv_heads in (1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 256, 512):
        cfg = dataclasses.replace(CFG, heads=2 * kv_heads, kv_heads=kv_heads)
        alone = memory.partial_sums(cfg, 0, 1 << 20)
        taken = decode.workspace(7, cfg.heads, decode.max_segments(kv_heads), cfg.head_dim, torch.device("meta"))
        assert memory.partial_sums(cfg, 7, 1 << 20) - alone == sum(t.nbytes for t in taken)


def test_the_plan_counts_partial_sums_on_a_gpu_alone(plan):
    few, many = (plan(1 << 40, CUDA, max_requests=n, cuda_graphs=False).workspace for n in (1, 200))
    rest = many - few - (memory.partial_sums(CFG, 200 + runner.PROMPTS, 4096) - memory.partial_sums(CFG, 2, 4096))
    few, many = (plan(1 << 40, CPU, max_requests=n).workspace for n in (1, 200))
    assert many - few == rest


def test_the_plan_counts_what_drafts_take(plan):
    """Each token that is verified has logits, and its own part of attention."""
    for requests, rows, entries in ((1, 4, 16), (4, 10, 4 + 4 * 16), (64, 130, 8 + 8 * 16)):
        sizes = dict(max_requests=requests, step_tokens=200)
        for device in (CPU, CUDA):
            more, plain = (plan(1 << 40, device, drafts=drafts, **sizes).workspace for drafts in (15, 0))
            logits = (entries - rows) * CFG.vocab * (2 * 4 + 4 * 2)
            before = max(shape.requests for shape in runner.shapes(requests, 200))
            partial = memory.partial_sums(CFG, max(entries, before), 4096) - memory.partial_sums(CFG, before, 4096)
            graphs = len(runner.verifying(requests, 15)) * (9 * CFG.num_layers + 16) * 8192
            assert more - plain == logits + (partial + graphs if device == CUDA else 0)


@pytest.mark.parametrize("drafts", [0, 5])
def test_the_plan_counts_every_graph_that_is_recorded(plan, drafts):
    """Each shape has two, with logits adjusted and not; those that verify drafts one."""
    sizes = dict(max_requests=20, step_tokens=200)
    more, plain = (plan(1 << 40, CUDA, drafts=drafts, cuda_graphs=on, **sizes).workspace for on in (True, False))
    rig = Rig(rows=20, step_tokens=200, drafts=drafts, padded=True)
    recorded = list(rig.engine.runner._variants())
    assert len({shape for shape, _ in recorded}) < len(recorded) == len(set(recorded))
    assert more - plain == len(recorded) * (9 * CFG.num_layers + 16) * 8192


def test_more_requests_than_there_are_tickets_are_refused():
    wish = EngineConfig(max_requests=1, step_tokens=1 << 20)
    for kv_heads, device in itertools.product((2, 1024, 2048), (CPU, CUDA)):
        cfg = dataclasses.replace(CFG, heads=kv_heads, kv_heads=kv_heads)
        most = most_requests(kv_heads)
        with pytest.raises(UsageError, match=f"^max_requests = {most + 1}; with the {kv_heads} KV .* at most {most} "):
            plan_memory(cfg, dataclasses.replace(wish, max_requests=most + 1), device, torch.float32, WEIGHTS)


def most_requests(kv_heads: int) -> int:
    """Whose steps with most requests, prompts beside decodes, have a ticket for each KV head of each."""
    needed = lambda n: max(shape.requests for shape in runner.shapes(n, 1 << 20)) * kv_heads  # noqa: E731
    return next(n for n in range(launch.TICKETS // kv_heads, 0, -1) if needed(n) <= launch.TICKETS)


def test_as_many_requests_as_there_are_tickets_are_planned(plan):
    assert plan(1 << 50, max_requests=most_requests(CFG.kv_heads), step_tokens=1 << 20).left > 0


@pytest.mark.parametrize("shape", ["tiny-llava-1.5-7b", "llava-1.5-7b", "llava-1.6-mistral-7b"])
def test_the_plan_counts_what_pictures_take(shape, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
    text = dataclasses.replace(cfg, vision=None)
    for device in (CPU, CUDA):
        more, plain = (
            plan_memory(c, EngineConfig(max_requests=4, step_tokens=96), device, torch.float32, 0).workspace
            for c in (cfg, text)
        )
        tile = cfg.vision.tile_features * cfg.hidden * 4
        buffers = 100 * cfg.hidden * 4 + 8 * tile  # what a step reads, and what the tower's graphs write to
        assert more - plain > vision.kept_bytes(cfg, 4) + buffers >= (32 + 8) * tile


@pytest.mark.gpu
@pytest.mark.parametrize("shape, size", [("llava-1.5-7b", (336, 336)), ("llava-1.6-mistral-7b", (672, 672))])
@torch.inference_mode()
def test_pictures_take_no_more_than_was_planned(shape, size):
    cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
    cfg = dataclasses.replace(cfg, num_layers=1, windows=cfg.windows[:1])
    model = registry.find(cfg.architecture)[1](LayerFactory(torch.bfloat16, "cuda"), cfg)
    fill_(model)
    count = tiling.tiles(cfg.vision, size)
    parts = []
    for i in range(40):
        pixels = np.full((count, 3, 336, 336), i / 40, np.float32)
        parts.append(Part(Tiles(pixels, size, tiling.tokens(cfg.vision, size)), 0, 16, 16 * i))
    with torch.cuda.stream(torch.cuda.Stream()):
        model.encode_tiles(torch.zeros(1, 3, 336, 336, device="cuda", dtype=torch.bfloat16))  # libraries want some too
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        encoder = vision.Encoder(model, cfg, 640, torch.device("cuda"), torch.bfloat16)
        encoder.rehearse()
        encoder.capture(torch.cuda.graph_pool_handle(), lambda *_: None)
        encoder.show_(parts)
    taken = torch.cuda.max_memory_allocated() - before
    assert sum(kept.nbytes for kept in encoder._kept.values()) <= vision.kept_bytes(cfg, 2) < taken
    assert taken <= vision.workspace(cfg, 2, 640)


def test_a_tower_that_no_kernel_serves_is_refused_on_a_gpu():
    cfg = registry.parse(HFConfig(shapes.shape_config("tiny-llava-1.5-7b")))
    odd = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, heads=cfg.vision.hidden // 8))
    build._require_kernels(cfg, CUDA)
    build._require_kernels(odd, CPU)
    with pytest.raises(UnsupportedModel, match="vision tower's head_dim = 8; .* 16, 32"):
        build._require_kernels(odd, CUDA)


def test_devices_and_dtypes_that_do_not_exist():
    for name in ("cuda:99", "tpu", "meta", "mps", "", "cuda:x"):
        with pytest.raises(EnvironmentProblem, match="device = "):
            build.pick_device(EngineConfig(device=name))
    with pytest.raises(UnsupportedModel, match="dtype = 'int8'"):
        build.pick_dtype(EngineConfig(), dataclasses.replace(CFG, dtype="int8"), CPU)
    assert build.pick_dtype(EngineConfig(), dataclasses.replace(CFG, dtype="bfloat16"), CPU) is torch.float32
    assert build.pick_dtype(EngineConfig(dtype="float16"), CFG, CPU) is torch.float16


def test_memory_that_is_free_is_a_positive_number():
    assert memory.free_memory(CPU) > 1 << 20
