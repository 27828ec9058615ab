"""Drafts change no answer, only the number of steps: whoever shares the batch, gives way, ends or leaves in between."""

import random

import pytest

from lite_llm import LLM, SamplingParams
from lite_llm.engine import runner
from lite_llm.engine.draft import Lookup
from lite_llm.engine.prefix import NoPrefix, PrefixCache
from lite_llm.engine.scheduler import FEW, Scheduler
from lite_llm.engine.slots import SlotPool
from lite_llm.llm import DEMO
from tests.engine.models import HashModel, Rig, alone, ask
from tests.engine.test_constraints import held
from tests.engine.test_engine import disorder
from tests.engine.test_sampling import WISHES

COPY = DEMO.parent / "copy"
VOCAB, MEMORY = 6, 3
"""Of a model that says one thing behind three tokens: what it has said once it says again."""


def repeating(drafts: int, **more) -> Rig:
    """An engine whose model repeats itself, and whose verifying steps are noted: those with drafts, and all."""
    rig = Rig(vocab=VOCAB, oracle=HashModel(VOCAB, memory=MEMORY), drafts=drafts, **more)
    rig.shapes, run = [], rig.engine.runner.run

    def noted(shape, adjusted, reveal=False):
        assert shape.samples == 1 or not (adjusted or reveal), "a step that no graph was recorded of"
        rig.shapes.append(shape)
        run(shape, adjusted, reveal)

    rig.engine.runner.run = noted
    return rig


def expected(request):
    return alone(request, VOCAB, memory=MEMORY)


def check(requests) -> None:
    for request in requests:
        assert (request.output, request.finish_reason) == expected(request), request.params


@pytest.mark.parametrize("ahead, padded", [(0, False), (1, True), (2, False), (3, True)])
@pytest.mark.parametrize("seed", range(20))
def test_disorder_changes_no_answer(seed, ahead, padded):
    draw = random.Random(seed)
    rows = draw.randint(1, 10)
    rig = repeating(
        draw.choice((1, 2, 4, 7, 15)), slots=draw.randint(40, 120), rows=rows, step_tokens=rows + draw.randint(0, 8),
        prefix_cache=draw.random() < 0.8, ahead=ahead, padded=padded,
    )  # fmt: skip
    plain = ("greedy", "greedy", "greedy", "heat", "top_k of one", "one token", "stop token")
    names = plain if seed % 2 else (*plain, "all penalties", "late stop", "logprobs")
    requests = []
    for _ in range(10):
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 8))]
        wish = {"max_tokens": draw.randint(1, 30), **WISHES[draw.choice(names)]}
        wish["stop_token_ids"] = tuple(t for t in wish.get("stop_token_ids", ()) if t < VOCAB)
        requests.append(ask(prompt, **wish))
    disorder(rig, draw, requests, cancels=0.03, preemptions=0.05)
    for request in requests:
        tokens, reason = expected(request)
        if request.finish_reason == "abort":
            assert request.output == tokens[: request.output_len]
        else:
            assert (request.output, request.finish_reason) == (tokens, reason)
    prefix = rig.scheduler.prefix
    assert prefix.protected == 0 and prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity
    assert not any(request.drafts for request in requests)


@pytest.mark.parametrize("ahead, padded", [(0, False), (0, True), (2, False), (2, True)])
@pytest.mark.parametrize("batch", [1, 3, FEW])
def test_text_that_repeats_itself_takes_fewer_steps(batch, ahead, padded):
    rig = repeating(7, slots=900, rows=batch, step_tokens=64, max_len=128, ahead=ahead, padded=padded)
    requests = [ask([i % VOCAB, 1, 2], max_tokens=100) for i in range(batch)]
    rig.answers(*requests)
    check(requests)
    assert rig.engine.launched < 60 and all(request.stood > 40 for request in requests)
    assert rig.scheduler.made == 100 * batch
    assert any(shape.samples > 1 for shape in rig.shapes)


@pytest.mark.parametrize("ahead", [0, 2])
def test_every_end_in_the_middle_of_drafts(ahead):
    """At every number of tokens, and at every token of the vocabulary; what follows in the pool is the prefix's."""
    counted = 0
    for most in range(1, 60):
        rig = repeating(5, slots=200, max_len=100, ahead=ahead)
        (request,) = requests = [ask([1, 2], max_tokens=most)]
        rig.answers(*requests)
        check(requests)
        counted += request.stood
        follow = ask([*request.ids, 3], max_tokens=4)
        rig.answers(follow)
        check([follow])
        assert follow.prefix_hit >= len(request.ids) - 1
    assert counted > 300
    ends = set()
    for stop in range(VOCAB):
        for first in range(VOCAB):
            rig = repeating(5, slots=200, max_len=100, ahead=ahead)
            requests = [ask([first, 2, 4, 5, 1], (stop,), max_tokens=60, min_tokens=n) for n in (0, 9, 20)]
            rig.answers(*requests)
            check(requests)
            ends |= {(request.finish_reason, request.stood > 0) for request in requests}
    assert ("stop", True) in ends


def test_a_stop_token_that_was_drafted_ends_the_answer():
    rig = repeating(5, slots=200, step_tokens=64, max_len=100)
    tokens, _ = expected(ask([1, 2], max_tokens=60))
    follow = ask([1, 2, *tokens[:40], *tokens[30:33]], max_tokens=20)
    answer, _ = expected(follow)
    request = ask(follow.ids, (answer[2],), max_tokens=20)
    rig.answers(request)
    check([request])
    assert request.finish_reason == "stop" and request.stood > 0 and rig.engine.launched < 1 + len(request.output)


@pytest.mark.parametrize("padded", [False, True])
def test_a_tiny_pool(padded):
    """Fewer slots than drafts want, and not enough for all."""
    gave_way = 0
    for slots in range(24, 60, 3):
        rig = repeating(7, slots=slots, rows=4, step_tokens=8, ahead=1, padded=padded)
        requests = [ask([i, 1, 2, 3], max_tokens=slots // 2 - 6) for i in range(4)]
        rig.answers(*requests)
        check(requests)
        gave_way += sum(request.preemptions for request in requests)
    assert gave_way > 5


def test_a_pool_that_is_almost_full_takes_shorter_drafts():
    """And nobody gives way for them."""
    for slots, taken in ((14, 1), (15, 2), (17, 4), (40, 4)):
        scheduler = Scheduler(SlotPool(slots), 2, 30, NoPrefix(), 2, drafts=4)
        request, other = requests = [ask([1, 2, 3, 1, 2, 3, 1, 2], max_tokens=20), ask([5, 6])]
        for one in requests:
            scheduler.add(one)
        scheduler.launched(scheduler.plan())
        scheduler.commit(requests, [[3], [7]])
        assert scheduler.plan() == [(other, 1), (request, 1 + taken)]
        assert request.drafts == [1, 2, 3, 1][:taken] and len(scheduler.running) == 2
        scheduler.check()


def test_an_answer_may_fill_the_pool_to_the_last_slot():
    rig = repeating(7, slots=42, rows=1, step_tokens=8, prefix_cache=False)
    (request,) = requests = [ask([1, 2], max_tokens=60)]
    rig.answers(*requests)
    assert (request.output, request.finish_reason) == (expected(request)[0][: request.output_len], "length")
    assert len(request.ids) == 42 and request.stood > 10


@pytest.mark.parametrize("ahead, padded", [(0, False), (2, True)])
def test_text_that_never_repeats_takes_the_steps_that_it_took(ahead, padded):
    """Nobody waits, and nothing is verified."""
    steps = []
    for drafts in (0, 7):
        rig = Rig(slots=900, rows=3, vocab=5000, max_len=128, step_tokens=64, ahead=ahead, padded=padded, drafts=drafts)
        requests = [ask([i, 1, 2], max_tokens=60) for i in range(3)]
        rig.answers(*requests)
        steps.append((rig.engine.launched, rig.steps, [request.output for request in requests]))
    assert steps[0] == steps[1]


@pytest.mark.parametrize("ahead", [0, 2])
def test_text_that_only_looks_repetitive_is_rarely_held_up(ahead):
    """Of four tokens, all pairs and most triples stood before, but nothing follows from that."""
    rig = Rig(slots=900, rows=1, vocab=4, max_len=500, step_tokens=64, ahead=ahead, drafts=3)
    verified, run = [], rig.engine.runner.run

    def noted(shape, adjusted, reveal=False):
        verified.append(shape.samples > 1)
        run(shape, adjusted, reveal)

    rig.engine.runner.run = noted
    request = ask([1, 2], max_tokens=400)
    rig.answers(request)
    assert (request.output, request.finish_reason) == alone(request, 4)
    assert 20 < sum(verified) < 100 and rig.engine.launched <= 401


def test_nothing_is_verified_beside_prompts_adjusted_logits_or_many():
    for others, wish in ((3, {"logprobs": 1}), (3, {"min_tokens": 90}), (3, {"presence_penalty": 0.5}), (FEW, {})):
        rig = repeating(4, slots=2000, rows=FEW + 2, step_tokens=64, max_len=128)
        long = [ask([i % VOCAB, 1, 2], max_tokens=90, **wish) for i in range(others)]
        for request in long:
            rig.add(request)
        rig.add([1, 2, 3], max_tokens=90)
        while all(request.finish_reason is None for request in long):
            rig.step()
        assert all(shape.samples == 1 for shape in rig.shapes)
    rig = repeating(4, slots=2000, rows=2, step_tokens=4, max_len=256)
    first = rig.add([1, 2, 3], max_tokens=120)
    while not first.stood:
        rig.step()
    second, seen = rig.add([1, 2, 3] * 30, max_tokens=2), len(rig.shapes)
    while second.output_len == 0:
        rig.step()
    assert len(rig.shapes) > seen + 20 and all(shape.samples == 1 for shape in rig.shapes[seen:])


def test_a_constrained_request_shares_an_engine_with_drafts():
    rig = Rig(slots=400, rows=3, vocab=40, max_len=128, ahead=2, drafts=4)
    bound, free = held([1, 2, 3]), ask([1, 2, 1, 2, 1, 2], max_tokens=40)
    rig.answers(bound, free)
    alone_rig = Rig(slots=400, rows=3, vocab=40, max_len=128)
    again = held([1, 2, 3])
    alone_rig.answers(again)
    assert bound.output == again.output and (free.output, free.finish_reason) == alone(free, 40)
    assert bound.stood == 0


def test_while_drafts_are_under_way_a_request_is_left_out_and_may_leave():
    """As it is when a step was interrupted before it landed."""
    for leave in ("cancel", "preempt", "nothing"):
        pool = SlotPool(60)
        scheduler = Scheduler(pool, 2, 30, PrefixCache(pool.mark), 2, drafts=4)
        request = ask([1, 2, 3, 1, 2, 3, 1, 2], max_tokens=20)
        scheduler.add(request)
        scheduler.launched(scheduler.plan())
        scheduler.commit([request], [[3]])
        plan = scheduler.plan()
        assert plan == [(request, 5)] and request.drafts == [1, 2, 3, 1]
        scheduler.launched(plan)
        request.lookup.pause(request.ids)  # with nothing to draft it is left out as well
        assert scheduler.plan() == [] and request.cached == 13
        scheduler.check()
        if leave == "cancel":
            scheduler.cancel(request, "abort")
        elif leave == "preempt":
            scheduler._preempt(request)
            assert scheduler.plan() == []
        scheduler.check()
        assert scheduler.prefix.size == (8 if leave != "nothing" else 0), "what was drafted is not known to be right"
        scheduler.commit([request], [[1, 2, 0]])
        scheduler.check()
        if leave == "cancel":
            assert request.output == [3] and not scheduler.running
            continue
        assert request.output == [3, 1, 2, 0] and request.stood == 2 and not request.drafts
        if leave == "nothing":
            assert request.cached == request.held == 11 and request.decoding
        ((_, n),) = scheduler.plan()
        assert n == (1 if leave == "nothing" else 4)


def test_a_step_that_fails_while_it_verifies_ends_its_requests(monkeypatch):
    for k in range(4, 14):
        rig = repeating(4, slots=60, rows=2, step_tokens=8)
        run, calls = rig.engine.runner.run, []

        def failing(shape, *rest, run=run, calls=calls, k=k, **more):
            calls.append(shape)
            run(shape, *rest, **more)
            if len(calls) == k:
                raise RuntimeError("boom")

        monkeypatch.setattr(rig.engine.runner, "run", failing)
        requests = [rig.add([i, 2, 3], max_tokens=25) for i in range(2)]
        with pytest.raises(RuntimeError, match="boom"):
            rig.run()
        assert {request.finish_reason for request in requests} == {"error"} or calls[-1].prompts
        after = ask([3, 1, 0, 1, 3], max_tokens=20)
        rig.answers(after)
        check([after])
        assert rig.scheduler.prefix.size + rig.scheduler.slots.free_count == rig.scheduler.capacity


# ---- what is guessed


def last_place(ids: list[int], most: int) -> list[int]:
    """Without an index."""
    for size in (3, 2):
        for at in range(len(ids) - 1, size - 1, -1):
            if ids[at - size : at] == ids[-size:] and len(ids) > size:
                return [ids[at + i % (len(ids) - at)] for i in range(most)]
    return []


@pytest.mark.parametrize("seed", range(30))
def test_what_is_guessed_followed_at_the_last_place(seed):
    draw, lookup, ids = random.Random(seed), Lookup(), []
    for _ in range(60):
        ids += [draw.randrange(4) for _ in range(draw.randint(1, 6))]
        if draw.random() < 0.6:
            most = draw.randint(1, 7)
            assert lookup.guess(list(ids), most, 0) == last_place(ids, most)


def test_a_long_prompt_is_read_in_several_calls():
    ids, lookup = [1, 2, 3, *range(10, 5000), 1, 2, 3], Lookup()
    assert [lookup.guess(ids, 2, 0) for _ in range(3)] == [[], [], [10, 11]]


def test_after_a_guess_of_which_nothing_stood_there_is_a_pause():
    ids, lookup = [1, 2] * 5, Lookup()
    assert lookup.guess(ids, 3, 0) == [1, 2, 1]
    lookup.pause(ids)
    lengths = []
    for _ in range(12):
        ids.append(1 + len(ids) % 2)
        if lookup.guess(ids, 3, 0):
            lengths.append(len(ids))
    assert lengths == [18, 19, 20, 21, 22]


def test_who_has_waited_for_nothing_does_not_wait_again_soon():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 1, 2], 3, 2) == [3, 1, 2]  # worth waiting for two tokens
    assert lookup.guess([1, 2, 3, 1, 2, 5], 3, 1) == []
    assert lookup.guess([1, 2, 3, 1, 2, 3, 1], 3, 1) == [2, 3, 1]
    assert lookup.guess([1, 2, 3, 1, 2, 3, 1, 9], 3, 0) == []
    assert lookup.guess([1, 2, 3, 1, 2, 3, 1, 9, 1, 2, 3], 3, 0) == []
    assert lookup.guess([1, 2, 3, 1, 2, 3, 1, 9, 1, 2, 3, 7, 7, 7, 1, 2, 3], 3, 0) == [7, 7, 7]


def test_nothing_is_guessed_where_nothing_is_wanted():
    for most in (0, -3):
        assert Lookup().guess([1, 2, 1, 2, 1, 2], most, 0) == []


# ---- shapes


def test_every_plan_with_drafts_has_a_shape():
    draw = random.Random(0)
    for most in (1, 2, 4, 7, 8, 9, 64):
        for drafts in (1, 3, 15):
            chooser = runner.Runner.__new__(runner.Runner)
            chooser.fixed, chooser.verifying = runner.shapes(most, 64), runner.verifying(most, drafts)
            few = min(most, FEW)
            for _ in range(50):
                verified = draw.randint(1, few)
                lengths = [draw.randint(1, drafts + 1) for _ in range(verified)]
                shape = chooser.fit(draw.randint(0, few - verified), verified, sum(lengths), max(lengths) + 1)
                assert shape.samples == drafts + 1 and shape in chooser.verifying
                assert shape.tokens == shape.prompts * shape.samples
    assert runner.verifying(64, 0) == []
    assert runner.verifying(1, 4) == [(0, 1, 5, 5)] and runner.verifying(64, 4) == [(0, 1, 5, 5), (8, 8, 40, 5)]


def test_shapes_with_drafts_change_nothing_for_prompts():
    plain, drafting = (Rig(rows=16, slots=90, step_tokens=64, padded=True, drafts=drafts) for drafts in (0, 7))
    for decodes in range(1, 16):
        for tokens in range(1, 64):
            one, other = plain.engine.runner, drafting.engine.runner
            assert one.fill(decodes, tokens) == other.fill(decodes, tokens)
            assert one.fit(decodes, 1, tokens) == other.fit(decodes, 1, tokens)


# ---- real models


def prompts_of(llm: LLM) -> list[str]:
    symbols = "abcdefghijklmnop"
    draw = random.Random(1)
    return ["".join(draw.sample(symbols, draw.randint(6, 14))) + "<sep>" for _ in range(8)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 8])
def test_copies_are_the_same_and_take_fewer_steps(batch, temperature):
    steps, answers = [], []
    for drafts in (0, 5):
        with LLM(COPY, device="cpu", drafts=drafts, max_requests=8) as llm:
            wishes = [SamplingParams(max_tokens=24, temperature=temperature, seed=i) for i in range(batch)]
            outputs = llm.generate(prompts_of(llm)[:batch], wishes)
            steps.append(llm.engine.launched)
            answers.append([(o.token_ids, o.text, o.finish_reason, o.usage.completion_tokens) for o in outputs])
            assert all(o.usage.completion_tokens == len(o.token_ids) for o in outputs)
            assert sum(o.usage.drafted_tokens for o in outputs) > 0 or not drafts
    assert answers[0] == answers[1]
    assert steps[1] < steps[0] - 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_chat_says_the_same_piece_by_piece(temperature):
    """Text, stop strings and token ids, when a step brings several tokens."""
    said = []
    for drafts in (0, 7):
        with LLM(drafts=drafts, device="cpu", max_requests=4) as llm:
            for stop in ((), ("e t", "zz")):
                wish = SamplingParams(max_tokens=60, temperature=temperature, seed=3, stop=stop, ignore_eos=True)
                pieces = list(llm.stream("the cat and the dog and the cat and the dog and the", wish))
                text = "".join(piece.text for piece in pieces)
                ids = [token for piece in pieces for token in piece.token_ids]
                said.append((text, len(ids) if not stop else None, pieces[-1].finish_reason))
                assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert said[:2] == said[2:]
