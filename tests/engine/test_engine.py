"""The whole engine under disorder: arrivals, cancels, preemptions, faults, tiny pools (SCH-05, FLT-01, 02, 10)."""

import contextlib
import functools
import random

import pytest
import torch

from lite_llm.batch import KVPool
from lite_llm.errors import ContextExceeded
from lite_llm.layers import LayerFactory
from lite_llm.llm import DEMO, LLM
from lite_llm.models.llama import Llama
from tests.engine.models import Rig, alone, ask, check_batch, fill_, tiny_config
from tests.engine.test_sampling import WISHES, check

COPY = DEMO.parent / "copy"


def disorder(rig: Rig, draw: random.Random, requests: list, cancels: float = 0.05, preemptions: float = 0.08) -> None:
    """Add the requests at random moments, cancel and preempt some, and run until all have ended."""
    todo = list(requests)
    while todo or not rig.engine.idle:
        while todo and draw.random() < 0.4:
            rig.add(todo.pop(0))
        if draw.random() < cancels:
            rig.abort(draw.choice(requests[: len(requests) - len(todo)] or [ask([1])]))
        if rig.scheduler.running and draw.random() < preemptions:
            rig.preempt(draw.choice(rig.scheduler.running))
        rig.step()
        assert rig.steps < 3000, "no end in sight"


@pytest.mark.parametrize("ahead, padded", [(0, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize("seed", range(25))
def test_disorder_changes_no_answer(seed, ahead, padded):
    draw = random.Random(seed)
    rows = draw.randint(1, 6)
    cache = draw.random() < 0.8
    rig = Rig(draw.randint(20, 60), rows, rows + draw.randint(0, 8), prefix_cache=cache, ahead=ahead, padded=padded)
    requests = []
    for _ in range(10):
        prompt = [draw.randint(0, 1) for _ in range(draw.randint(1, 8))]
        wish = {"max_tokens": draw.randint(1, 10), **WISHES[draw.choice(list(WISHES))]}
        requests.append(ask(prompt, **wish))
    disorder(rig, draw, requests)
    for request in requests:
        tokens, reason = alone(request, 16)
        if request.finish_reason == "abort":
            assert request.output == tokens[: request.output_len]
        else:
            assert (request.output, request.finish_reason) == (tokens, reason)
    prefix = rig.scheduler.prefix
    assert prefix.protected == 0 and prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("stage", ["prepare", "forward", "sample"])
def test_a_step_that_fails_ends_its_requests_and_nothing_else(stage, error, monkeypatch):
    """FLT-01, FLT-02: at step k those who were in it are told; all others are exact; the pool is whole."""
    for k in range(1, 16):
        rig = Rig(slots=30, rows=2, step_tokens=4)
        owner, name = {
            "prepare": (rig.engine.runner, "send"),
            "forward": (rig.model, "forward"),
            "sample": (rig.engine.runner, "_step"),
        }[stage]
        calls, whole = [], getattr(owner, name)

        @functools.wraps(whole)
        def failing(*args, calls=calls, whole=whole, k=k):
            calls.append(args)
            result = whole(*args)  # the harm is done when the error comes
            if len(calls) == k:
                raise error
            return result

        monkeypatch.setattr(owner, name, failing)
        requests = [ask([i, 1, 0, 1, i], max_tokens=4, **WISHES["all penalties"]) for i in range(5)]
        for request in requests:
            rig.add(request)
        hit: list = []
        while not rig.engine.idle:
            running = [r for r in requests if r.row is not None]
            try:
                rig.step()
            except type(error):
                hit = [r for r in requests if r.finish_reason == "error"]
                assert hit and set(running) <= set(hit)
        assert bool(hit) == (len(calls) >= k)
        check([request for request in requests if request not in hit])
        calls += [None] * k  # no more faults
        after = ask([3, 1, 0, 1, 3], max_tokens=5)
        rig.answers(after)
        check([after])
        assert rig.scheduler.prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_step_whose_tokens_are_lost_ends_those_who_should_have_got_one(ahead, monkeypatch):
    for k in range(1, 12):
        rig = Rig(slots=40, rows=3, step_tokens=5, ahead=ahead)
        calls, commit = [], rig.scheduler.commit

        def interrupted(requests, tokens, calls=calls, commit=commit, k=k):
            calls.append(requests)
            if len(calls) == k:
                raise KeyboardInterrupt
            commit(requests, tokens)

        monkeypatch.setattr(rig.scheduler, "commit", interrupted)
        requests = [ask([i, 1, 0, 1, i], max_tokens=4) for i in range(5)]
        for request in requests:
            rig.add(request)
        while not rig.engine.idle:
            with contextlib.suppress(KeyboardInterrupt):
                rig.step()
        hit = [request for request in requests if request.finish_reason == "error"]
        assert set(hit) == set(calls[k - 1] if len(calls) >= k else ())
        check([request for request in requests if request not in hit])
        assert rig.scheduler.prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity


def test_damage_in_the_pool_is_seen_by_its_owner_alone():
    """FLT-10: the hash model would notice a foreign slot, and requests share no more than they should."""
    for at in range(5):
        rig = Rig(slots=60, rows=3, step_tokens=30)
        rig.answers(ask([1, 0, 1], max_tokens=1))
        sharer, mine, other = ask([1, 0, 1, 5]), ask([1, 0, 1, 6]), ask([2, 0, 1, 6])
        for request in (sharer, mine, other):
            rig.add(request)
        rig.step()
        rig.kv.v[0, mine.slots[at if at < 4 else mine.cached - 1]] += 1
        rig.run()
        check([other])
        assert (mine.finish_reason, mine.output_len) == ("error", 1)
        assert sharer.finish_reason == ("error" if at < 3 else "length")


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_token_that_ended_an_answer_on_the_device_counts_as_computed_nowhere(ahead):
    rig = Rig(slots=60, ahead=ahead)
    answer, _ = alone(ask([1, 0, 1]), 16)
    first = rig.add([1, 0, 1], stop_ids={answer[2]})
    rig.run()
    assert first.finish_reason == "stop"
    follow = rig.add([*first.ids, 5, 6])
    rig.run()
    check([first, follow])
    assert follow.prefix_hit == len(first.ids) - 1


def test_a_huge_min_tokens_harms_nobody():
    rig = Rig()
    neighbour, greedy = ask([1, 0]), ask([1, 2], max_tokens=5, min_tokens=2**31 - 2)
    rig.answers(neighbour, greedy)
    check([neighbour, greedy])


@pytest.mark.parametrize("ahead, padded", [(0, False), (1, True), (2, False), (3, True)])
def test_slots_taken_back_from_a_stock_are_forgotten_by_the_device(ahead, padded):
    """They go to another request; whoever had them goes on in others, while steps are under way."""
    rig = Rig(slots=150, step_tokens=150, max_len=150, prefix_cache=False, ahead=ahead, padded=padded)
    few = [rig.add([i, 1], max_tokens=30) for i in range(3)]
    for _ in range(3 + ahead):
        rig.step()
    stock = sum(len(request.slots) for request in few)
    big = rig.add([0] * (rig.scheduler.slots.free_count - 4), max_tokens=12)
    while sum(len(request.slots) for request in few) >= stock:
        rig.step()
    assert big.row is not None and not big.preemptions
    rig.run()
    check([*few, big])


def test_steps_are_counted_for_longer_than_int32_allows():
    rig = Rig(ahead=1)
    rig.engine.launched = 2**31 - 4
    rig.engine.state.step.fill_(rig.engine.launched % len(rig.engine.state.ring))
    requests = [ask([i, 1, 0], max_tokens=9) for i in range(4)]
    rig.answers(*requests)
    check(requests)
    assert rig.engine.launched > 2**31 and 0 <= rig.engine.state.step.item() < len(rig.engine.state.ring)


def test_no_step_is_launched_for_a_token_behind_the_last():
    rig = Rig(ahead=2)
    rig.answers(ask([1, 2], max_tokens=3))
    assert rig.model.calls == 3


def test_step_returns_who_got_a_token_and_an_idle_engine_does_nothing():
    rig = Rig(rows=2, step_tokens=4)
    assert rig.engine.idle and rig.step() == []
    long, short = rig.add([1] * 6, max_tokens=2), rig.add([2], max_tokens=1)
    assert rig.step() == [] and not rig.engine.idle
    assert set(rig.step()) == {long, short} and short.finish_reason == "length"
    assert rig.step() == [long] and rig.engine.idle and rig.step() == []
    assert rig.model.calls == 3


def test_the_context_bounds_a_request_before_the_pool_does():
    rig = Rig(slots=100, max_len=10, step_tokens=30)
    for length in (10, 11, 50):
        with pytest.raises(ContextExceeded, match=f"{length} tokens; with at least one for the answer 10 fit"):
            rig.add([1] * length)
    request = rig.add([1] * 4, max_tokens=99)
    rig.run()
    assert (request.output_len, request.finish_reason) == (6, "length")
    last = rig.add([1] * 9, max_tokens=99)
    rig.run()
    assert (last.output_len, last.finish_reason) == (1, "length")


def test_a_request_finished_by_somebody_else_is_not_touched_again():
    rig = Rig()
    request = rig.add([1, 2], max_tokens=3)
    rig.run()
    rig.abort(request)
    rig.abort(ask([1]))
    assert request.finish_reason == "length"


# ---- a real model


@pytest.fixture(scope="module")
def llama():
    cfg = tiny_config(vocab=24, max_len=64)
    model = Llama(LayerFactory(torch.float32), cfg).eval()
    fill_(model, seed=1)
    return model, cfg


@pytest.mark.parametrize("seed", range(12))
def test_a_llama_with_random_weights_says_what_one_forward_pass_says(llama, seed):
    """Each token is the best, up to rounding, after all tokens before it, computed in one go in a pool of its own."""
    model, cfg = llama
    draw = random.Random(seed)
    rows = draw.randint(1, 5)
    rig = Rig(draw.randint(24, 50), rows, rows + draw.randint(0, 9), model=model, cfg=cfg, prefix_cache=seed % 3 > 0)
    prompts = [[draw.randint(0, 1) for _ in range(draw.randint(1, 9))] for _ in range(8)]
    requests = [ask(prompt, max_tokens=draw.randint(1, 12)) for prompt in prompts]
    disorder(rig, draw, requests)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.ids[: len(prompt)] == prompt
        assert request.finish_reason == "length" or request.finish_reason == "abort"
        seen: list[torch.Tensor] = []
        whole = Rig(80, 1, 70, model=_Every(model, seen), cfg=cfg)
        whole.answers(ask(request.ids, max_tokens=1))
        for i, token in enumerate(request.output):
            logits = seen[0][len(prompt) + i - 1]
            assert logits[token] >= logits.max() - 1e-4


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_block_computes_one_token_of_each_prompt(llama, padded):
    """Or all of them, where its own logprobs are wanted."""
    model, cfg = llama
    seen = {}
    blocks = [model.blocks[0], model.blocks[-1]]
    hooks = [
        block.mlp.gate_up.register_forward_pre_hook(lambda _, given, b=b: seen.setdefault(b, []).append(len(given[0])))
        for b, block in enumerate(blocks)
    ]
    try:
        for revealed in (None, 0):
            seen.clear()
            rig = Rig(80, 2, 64, model=model, cfg=cfg, padded=padded)
            prompts = [ask([1] * n, max_tokens=2, prompt_logprobs=revealed) for n in (20, 9)]
            rig.answers(*prompts)
            first, last = seen[0], seen[1]
            assert first[0] == (32 if padded else 29) and first[1:] == last[1:] == [2]
            assert last[0] == (2 if revealed is None else first[0])
    finally:
        for hook in hooks:
            hook.remove()


class _Every(torch.nn.Module):
    """Notes the logits of all tokens, not only of those that are asked for."""

    def __init__(self, model, seen):
        super().__init__()
        self.model, self.seen = model, seen

    def forward(self, batch, kv: KVPool):
        check_batch(batch, kv)
        everything = type(batch)(**{**vars(batch), "logits_at": None})
        logits = self.model(everything, kv)
        self.seen.append(logits)
        return logits if batch.logits_at is None else logits[batch.logits_at]


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", "float32"),
        pytest.param(("cuda", "float32"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "bfloat16"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def copier(request):
    """The bundled model that repeats a string of distinct symbols: every request carries its own right answer."""
    device, dtype = request.param
    with LLM(COPY, device=device, dtype=dtype, kv_tokens=64, max_requests=4, step_tokens=64) as llm:
        yield llm.engine.model, llm.cfg, llm.tokenizer


def copies(tokenizer, draw: random.Random, number: int, longest: int) -> list:
    """Strings that begin alike, so that the prefix cache has something to mix up."""
    symbols = [t for t in range(tokenizer.vocab_size) if t not in tokenizer.special_ids]
    starts = [draw.sample(symbols, 4) for _ in range(2)]
    sep, eos = tokenizer.encode("<sep>")[-1], min(tokenizer.eos_ids)
    requests = []
    for _ in range(number):
        start = draw.choice(starts)[: draw.randint(0, 4)]
        rest = [symbol for symbol in symbols if symbol not in start]
        text = start + draw.sample(rest, draw.randint(1, longest))
        requests.append((ask([tokenizer.bos_id, *text, sep], stop_ids=(eos,), max_tokens=len(text) + 8), text + [eos]))
    return requests


@pytest.mark.parametrize("seed", range(10))
def test_every_copy_is_exact(copier, seed):
    """RDX-05, SCH-04, KRN-16: chunks, hits, cancels, preemptions, tiny pools; not one wrong symbol."""
    model, cfg, tokenizer = copier
    draw = random.Random(seed)
    rows = draw.randint(1, 8)
    rig = Rig(
        draw.randint(64, 160), rows, rows + draw.choice([0, 1, 16, 17, 64, 100]), max_len=64, model=model, cfg=cfg,
        prefix_cache=draw.random() < 0.8,
    )  # fmt: skip
    pairs = copies(tokenizer, draw, 14, longest=20)
    disorder(rig, draw, [request for request, _ in pairs], cancels=0.03)
    for request, answer in pairs:
        if request.finish_reason == "abort":
            assert request.output == answer[: request.output_len]
        else:
            assert (request.output, request.finish_reason) == (answer, "stop")


@pytest.mark.parametrize("victim", [0, 7, 15])
def test_cancelling_one_of_sixteen_that_share_a_prefix_leaves_fifteen_exact(copier, victim):
    """RDX-05 at every few steps, also between two chunks of a prompt."""
    model, cfg, tokenizer = copier
    for moment in range(1, 22, 4):
        pairs = copies(tokenizer, random.Random(moment), 16, longest=10)
        rig = Rig(400, 16, 24, max_len=64, model=model, cfg=cfg)
        for request, _ in pairs:
            rig.add(request)
        for _ in range(moment):
            rig.step()
        rig.abort(pairs[victim][0])
        rig.run()
        for request, answer in pairs:
            assert request.output == answer[: request.output_len]
            assert request.finish_reason == "stop" or request is pairs[victim][0]
