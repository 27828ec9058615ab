"""Logprobs of the prompt's own tokens: all of them, whatever is cached, cut into pieces, preempted or under way."""

import random

import pytest
import torch

from lite_llm.engine.scheduler import MOST_REVEALED
from tests.engine.models import Rig, alone, ask, logits_of

LONG = [(7 * i * i + 3) % 16 for i in range(150)]


def check(request, k):
    assert [entry.token for entry in request.prompt_logprobs] == request.ids[1 : request.prompt_len]
    for position, entry in enumerate(request.prompt_logprobs, start=1):
        exact = torch.tensor(logits_of(request.ids[:position], 16)).log_softmax(-1).tolist()
        assert entry.logprob == pytest.approx(exact[entry.token], abs=1e-6)
        best = sorted(range(16), key=lambda token: -exact[token])[:k]  # noqa: B023
        assert [token for token, _ in entry.top] == best
    assert (request.output, request.finish_reason) == alone(request, 16)


@pytest.mark.parametrize("ahead, padded", [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("cache", [True, False])
def test_every_token_of_a_prompt_is_told(ahead, padded, cache):
    rig = Rig(slots=800, rows=4, step_tokens=200, max_len=200, ahead=ahead, padded=padded, prefix_cache=cache)
    before = ask(LONG, max_tokens=3)
    rig.answers(before)
    told, short, one = ask(LONG, max_tokens=3, prompt_logprobs=3, logprobs=2), ask([5, 1], prompt_logprobs=16), ask([9])
    most = 0
    requests = [rig.add(request) for request in (told, short, one, ask([4], prompt_logprobs=0))]
    while any(request.finish_reason is None for request in requests):
        rig.step()
        most = max(most, len(rig.engine.runner.revealed))
    assert told.prefix_hit == 0 and 0 < most <= MOST_REVEALED
    check(told, 3), check(short, 16), check(one, 0), check(requests[3], 0)
    assert [entry.token for entry in told.logprobs] == told.output and one.prompt_logprobs == []
    after = ask(LONG, max_tokens=3)
    rig.answers(after)
    assert (after.prefix_hit > 0) == cache


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_give_way_tell_each_token_once(seed):
    draw = random.Random(seed)
    rig = Rig(slots=draw.randint(20, 60), rows=3, step_tokens=draw.choice((4, 8, 30)), ahead=draw.choice((0, 2)))
    requests = []
    for i in range(10):
        ids = [draw.randrange(16) for _ in range(draw.randint(1, 18))]
        wish = dict(prompt_logprobs=draw.choice((0, 2))) if draw.random() < 0.7 else {}
        requests.append(rig.add(ids, max_tokens=draw.randint(1, 6), **wish))
        for _ in range(draw.randint(0, 3)):
            rig.step()
            if rig.scheduler.running and draw.random() < 0.5:
                rig.preempt(draw.choice(rig.scheduler.running))
        if i == 5:
            rig.abort(requests[-1])
    rig.run()
    for request in requests:
        if request.finish_reason != "abort" and request.params.prompt_logprobs is not None:
            check(request, request.params.prompt_logprobs)
        elif request.params.prompt_logprobs is None:
            assert request.prompt_logprobs == []
