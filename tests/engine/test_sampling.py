"""The sampler in the engine: each row by its own parameters, whoever shares the batch (SMP-02 to 04, 06 to 12)."""

import itertools
import math

import pytest
import torch

from lite_llm.errors import UsageError
from tests.engine.models import Rig, alone, ask, logits_of

WISHES = {
    "greedy": dict(),
    "heat": dict(temperature=1.0, seed=3),
    "hot": dict(temperature=100.0, seed=-(2**63)),
    "cold": dict(temperature=0.5, seed=2**63 - 1, top_p=0.9),
    "frozen": dict(temperature=1e-7),
    "top_k": dict(temperature=2.0, seed=5, top_k=3),
    "top_k of one": dict(temperature=2.0, seed=5, top_k=1),
    "top_k of all": dict(temperature=2.0, seed=5, top_k=2**31 - 1),
    "top_p": dict(temperature=2.0, seed=6, top_p=0.4),
    "top_p of nothing": dict(temperature=2.0, seed=6, top_p=0.0),
    "min_p": dict(temperature=2.0, seed=6, min_p=0.3),
    "all filters": dict(temperature=3.0, seed=8, top_k=5, top_p=0.8, min_p=0.1),
    "repetition": dict(repetition_penalty=1.37),
    "reward": dict(repetition_penalty=0.61, presence_penalty=-0.3),
    "presence": dict(presence_penalty=1.9),
    "frequency": dict(frequency_penalty=0.77),
    "all penalties": dict(
        repetition_penalty=1.37, presence_penalty=0.7, frequency_penalty=0.31, temperature=1.5, seed=9
    ),
    "bias": dict(logit_bias={3: 5, 4: -2.25, 0: -(10**9)}),
    "forced": dict(logit_bias={11: 1e9}, temperature=1.0),
    "stop token": dict(stop_token_ids=(2, 5, 6)),
    "late stop": dict(stop_token_ids=(2, 5, 6, 7, 8), min_tokens=5),
    "later than its end": dict(stop_token_ids=(2, 5), min_tokens=50),
    "one token": dict(max_tokens=1),
    "logprobs": dict(logprobs=3, temperature=0.8, seed=4),
}
PROMPTS = [[1, 2, 3], [5], [0, 0, 0, 0, 0, 0, 0, 15, 15], [7, 7, 7, 1, 2]]


def requests_of(names=WISHES):
    wishes = [WISHES[name] for name in names]
    return [ask(PROMPTS[i % 4], **{"max_tokens": 12, **wish}) for i, wish in enumerate(wishes)]


def check(requests, vocab: int = 16, usable: int | None = None) -> None:
    for request in requests:
        assert (request.output, request.finish_reason) == alone(request, vocab, usable), request.params


@pytest.mark.parametrize("name", WISHES)
def test_a_request_alone_is_what_its_parameters_say(name):
    requests = requests_of([name])
    Rig().answers(*requests)
    check(requests)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("slots, rows, budget", [(25, 4, 4), (33, 4, 9), (400, 24, 200), (19, 1, 3)])
def test_a_batch_of_different_wishes_changes_nobody(slots, rows, budget, cache):
    """SMP-06, SMP-08: rows are reused by requests with other settings; small pools preempt."""
    requests = requests_of()
    Rig(slots, rows, budget, prefix_cache=cache).answers(*requests)
    check(requests)
    assert (sum(r.preemptions for r in requests) > 0) == (rows == 4)


def test_padding_of_the_vocabulary_is_never_sampled():
    requests = requests_of([name for name in WISHES if name != "forced"])
    rig = Rig(usable_vocab=12)
    rig.answers(*requests)
    check(requests, usable=12)
    assert max(max(request.output) for request in requests) == 11
    hot = [ask([1], temperature=100.0, seed=i, logit_bias={15: 1e9}, max_tokens=20) for i in range(5)]
    rig.answers(*hot)
    assert max(max(request.output) for request in hot) == 11


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("names", [["all penalties", "logprobs", "late stop"], ["all filters", "reward", "bias"]])
def test_preemption_at_any_moment_changes_nothing(names, cache):
    """SCH-05: forced at every step, of every running request, with and without the cache and its remains."""
    answers = [alone(request, 16) for request in requests_of(names)]
    for moment, forget in itertools.product(range(13), (False, True)):
        requests = requests_of(names)
        rig = Rig(slots=64, prefix_cache=cache, step_tokens=5)
        for request in requests:
            rig.add(request)
        for _ in range(moment):
            rig.step()
        for victim in list(rig.scheduler.running)[::-1]:
            rig.preempt(victim)
        if forget:
            rig.scheduler.slots.free(rig.scheduler.prefix.evict(99))
            rig.after()
        rig.run()
        assert [(request.output, request.finish_reason) for request in requests] == answers
        for request in requests:
            wanted = request.params.logprobs is not None
            assert [entry.token for entry in request.logprobs] == request.output * wanted


def test_preemption_in_every_step():
    requests = requests_of(["all penalties", "heat", "late stop", "logprobs"])
    rig = Rig(slots=200, step_tokens=40)
    for request in requests:
        rig.add(request)
    for turn in itertools.count():
        if rig.engine.idle:
            break
        rig.step()
        if rig.scheduler.running:
            rig.preempt(rig.scheduler.running[turn % len(rig.scheduler.running)])
    check(requests)
    assert sum(request.preemptions for request in requests) > 10


def test_rows_keep_their_own_when_neighbours_end_in_any_order():
    """SCH-10: six requests end in all 720 orders; six such groups at a time, one after the other in the same rows."""
    names = ["greedy", "all penalties", "heat", "bias", "all filters", "repetition"]
    answers = [alone(ask(PROMPTS[i % 4], max_tokens=6, **WISHES[name]), 16)[0] for i, name in enumerate(names)]
    rig = Rig(slots=500, rows=36, step_tokens=200)
    orders = list(itertools.permutations(range(1, 7)))
    for group in range(120):
        requests = [
            [rig.add(PROMPTS[i % 4], max_tokens=order[i], **WISHES[name]) for i, name in enumerate(names)]
            for order in orders[group::120]
        ]
        rig.run(limit=10**9)
        for order, six in zip(orders[group::120], requests, strict=True):
            for i, request in enumerate(six):
                assert request.output == answers[i][: order[i]] and request.finish_reason == "length"


def test_a_plain_request_takes_the_row_of_a_heavy_one():
    """SMP-08."""
    rig = Rig(rows=1, slots=60)
    heavy = [name for name in WISHES if name not in ("greedy", "one token")]
    for turn in range(100):
        rig.answers(*requests_of([heavy[turn % len(heavy)]]))
        plain = ask([turn % 16, 1], max_tokens=3)
        rig.answers(plain)
        check([plain])


@pytest.mark.parametrize("token", [-1, 16, 2**31, 2**70, True, 1.0, "3", None])
def test_a_token_that_the_model_does_not_have_is_refused_and_neighbours_go_on(token):
    """SMP-02: in the prompt, in the stop tokens, in the biases. The width of the logits decides."""
    rig = Rig(rows=2)
    neighbour = rig.add([1, 2, 3], temperature=1.0, seed=5)
    rig.step()
    with pytest.raises(UsageError, match=r"prompt has token id .*; expected 0 to 15"):
        rig.add([1, token])
    with pytest.raises(UsageError, match=r"stop_token_ids has token id .*; expected 0 to 15"):
        rig.add([1], stop_ids=(token,))
    if type(token) is int:
        with pytest.raises(UsageError, match=r"logit_bias has token id .*; expected 0 to 15"):
            rig.add([1], logit_bias={token: 1.0})
    with pytest.raises(UsageError, match="empty"):
        rig.add([])
    last = rig.add([15], stop_ids=(15,), logit_bias={15: -1.0})
    rig.run()
    check([neighbour, last])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [1, 4])
@pytest.mark.parametrize("wish", ["greedy", "all filters", "all penalties", "logprobs"])
def test_an_unusable_row_ends_its_request_alone(poison, wish, when):
    """SMP-07, FLT-09, RDX-07: it ends as "error", its KV is not cached, the neighbours do not notice."""

    def break_row(call, batch, logits):
        if victim.row is not None and call == when:
            logits[batch.rows.tolist().index(victim.row)] = poison

    rig = Rig(hook=break_row, slots=80, rows=4, step_tokens=40)
    before, victim, behind = requests_of(["heat", wish, "all penalties"])
    rig.answers(before, victim, behind)
    check([before, behind])
    assert victim.finish_reason == "error" and victim.output_len == when - 1
    assert victim.output == alone(victim, 16)[0][: when - 1]
    assert [entry.token for entry in victim.logprobs] == victim.output * (wish == "logprobs")
    again = rig.add(victim.ids[: victim.prompt_len], max_tokens=2)
    rig.run()
    assert again.prefix_hit == 0, "what a broken request computed was cached"
    check([again])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_one_bad_logit_is_enough(poison):
    def break_one(call, batch, logits):
        logits[0, 3] = poison

    request = ask([1, 2])
    Rig(hook=break_one).answers(request)
    assert (request.output, request.finish_reason) == ([], "error")


def test_minus_infinity_is_an_ordinary_logit():
    def forbid(call, batch, logits):
        logits[:, 3:] = -math.inf

    request = ask([1, 2], temperature=1.0, max_tokens=20)
    Rig(hook=forbid).answers(request)
    assert set(request.output) == {0, 1, 2} and request.finish_reason == "length"


def test_the_end_of_an_answer():
    """SMP-11. The stop token belongs to the ids; one in the prompt does not stop."""
    tokens = alone(ask([1, 2, 3], max_tokens=12), 16)[0]
    first = {token: tokens.index(token) for token in tokens}
    for token, at in first.items():
        request = ask([token, token], stop_ids=(token,), max_tokens=12)
        Rig().answers(request)
        check([request])
        request = ask([1, 2, 3], stop_ids=(token,), max_tokens=12)
        Rig().answers(request)
        assert (request.output, request.finish_reason) == (tokens[: at + 1], "stop")
    for limit in (1, 2, 5):
        request = ask([1, 2, 3], max_tokens=limit)
        Rig().answers(request)
        assert (request.output, request.finish_reason) == (tokens[:limit], "length")
    both = ask([1, 2, 3], stop_ids=(tokens[3],), max_tokens=first[tokens[3]] + 1)
    Rig().answers(both)
    assert both.finish_reason == "stop", "a stop token that is also the last token allowed is a stop"
    for least in range(1, 6):
        request = ask([1, 2, 3], stop_ids=range(14), min_tokens=least, max_tokens=9)
        Rig().answers(request)
        assert set(request.output[:least]) <= {14, 15}
        check([request])


@pytest.mark.parametrize("chosen", [0, 1, 4, 16, 20])
def test_logprobs_are_those_of_the_model(chosen):
    """SMP-12: log_softmax of the logits as the model gave them, whatever the sampler did to them afterwards."""
    wish = dict(logprobs=chosen, temperature=1.7, top_k=9, repetition_penalty=1.37, logit_bias={3: 1.5}, seed=2)
    mine, plain, other = ask([1, 2, 3], **wish), ask([1, 2, 3]), ask([5, 1], logprobs=2)
    Rig(step_tokens=4).answers(mine, plain, other)
    check([mine, plain, other])
    assert plain.logprobs == [] and len(mine.logprobs) == mine.output_len == 8
    for request, k in ((mine, min(chosen, 16)), (other, 2)):
        for i, entry in enumerate(request.logprobs):
            ids = request.ids[: request.prompt_len + i]
            exact = torch.tensor(logits_of(ids, 16)).log_softmax(-1).tolist()
            assert entry.token == request.output[i]
            assert entry.logprob == pytest.approx(exact[entry.token], abs=1e-6)
            best = sorted(range(16), key=lambda token: -exact[token])[:k]
            assert [token for token, _ in entry.top] == best
            assert [value for _, value in entry.top] == pytest.approx([exact[token] for token in best], abs=1e-6)


def test_whole_number_biases_do_not_break_the_step():
    request, neighbour = ask([1], logit_bias={3: 5}), ask([2])
    Rig().answers(request, neighbour)
    check([request, neighbour])
