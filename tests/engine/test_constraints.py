"""Constrained answers in the engine, beside free ones: what is allowed is sampled, and nobody else notices."""

import itertools
import random

import numpy as np
import pytest

from lite_llm.engine.request import Request
from lite_llm.errors import UsageError
from tests.engine.models import NAN, Rig, alone, ask, logits_of, prefix_hash
from tests.engine.test_engine import disorder
from tests.engine.test_sampling import PROMPTS, WISHES

VOCAB, STOP = 40, 39  # two words of a mask; the last token of the model ends answers
SIZE = 6  # of an answer, without its end


class Hashed:
    """Allows a few tokens that follow from all before; after SIZE of them, with odd seeds sometimes sooner, the end.

    Unlike the model it keeps its own history, so that a token it was not told of shows.
    """

    def __init__(self, seed: int):
        self.seed, self.said = seed, []
        self.allowed = masked(tokens_after(seed, []))

    def advance(self, token: int) -> None:
        assert token in tokens_after(self.seed, self.said), "a token that was not allowed"
        self.said.append(token)
        self.allowed = masked(tokens_after(self.seed, self.said))


class HashedGrammar:
    def __init__(self, seed: int):
        self.seed = seed

    def start(self) -> Hashed:
        return Hashed(self.seed)


def tokens_after(seed: int, said: list[int]) -> list[int]:
    if len(said) >= SIZE:
        return [STOP]
    draw = random.Random(prefix_hash([seed, *said]))
    return sorted(draw.sample(range(STOP), draw.randint(1, 5)) + [STOP] * (seed % 2 and draw.random() < 0.6))


def masked(tokens: list[int]) -> np.ndarray:
    mask = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask.view(np.int32)


def held(prompt: list[int], rule: int = 2, **wishes) -> Request:
    """A constrained request."""
    return ask(prompt, (STOP,), **{"max_tokens": 12, "grammar": HashedGrammar(rule), **wishes})


def expected(request: Request) -> tuple[list[int], str]:
    """The answer of a greedy constrained request, worked out token by token."""
    ids, prompt_len, seed = list(request.ids[: request.prompt_len]), request.prompt_len, request.params.grammar.seed
    while True:
        tokens = tokens_after(seed, ids[prompt_len:])
        if len(ids) - prompt_len < request.params.min_tokens:
            tokens = [token for token in tokens if token not in request.stop_ids] or tokens
        logits = logits_of(ids, VOCAB)
        ids.append(max(tokens, key=lambda token: (logits[token], -token)))
        if ids[-1] in request.stop_ids:
            return ids[prompt_len:], "stop"
        if len(ids) >= request.max_len:
            return ids[prompt_len:], "length"


def check(*requests: Request) -> None:
    for request in requests:
        answer = (request.output, request.finish_reason)
        assert answer == (expected(request) if request.constraint is not None else alone(request, VOCAB))


def everybody() -> list[Request]:
    """Constrained and free requests of all kinds, by turns."""
    free = [ask(PROMPTS[i % 4], **{"max_tokens": 12, **wish}) for i, wish in enumerate(WISHES.values())]
    bound = [held(PROMPTS[i % 4], rule=i, min_tokens=4 * (i % 4 == 1)) for i in range(len(free))]
    return [request for pair in zip(free, bound, strict=True) for request in pair]


@pytest.mark.parametrize("ahead, padded", [(0, False), (2, True), (3, False)])
@pytest.mark.parametrize("slots, rows, budget", [(60, 6, 9), (25, 4, 4), (700, 60, 200)])
def test_a_constraint_holds_and_changes_nobody_else(slots, rows, budget, ahead, padded):
    requests = everybody()
    Rig(slots, rows, budget, vocab=VOCAB, ahead=ahead, padded=padded).answers(*requests)
    check(*requests)
    assert (sum(request.preemptions for request in requests) > 0) == (rows < 60)
    ends = [request.output_len for request in requests if request.constraint]
    assert SIZE + 1 in ends and min(ends) < SIZE


@pytest.mark.parametrize("ahead, padded", [(0, False), (2, True)])
@pytest.mark.parametrize("seed", range(12))
def test_cancels_and_preemptions_at_random_moments(seed, ahead, padded):
    draw = random.Random(seed)
    requests = draw.sample(everybody(), 14)
    rig = Rig(draw.randint(30, 60), 5, 5 + draw.randint(0, 8), vocab=VOCAB, ahead=ahead, padded=padded)
    disorder(rig, draw, requests)
    for request in requests:
        if request.finish_reason == "abort":
            whole = expected(request) if request.constraint is not None else alone(request, VOCAB)
            assert request.output == whole[0][: request.output_len]
        else:
            check(request)


@pytest.mark.parametrize("ahead", [0, 2])
def test_preemption_in_every_step(ahead):
    requests = [held(PROMPTS[i], rule=i) for i in range(4)]
    rig = Rig(slots=200, step_tokens=40, vocab=VOCAB, ahead=ahead)
    for request in requests:
        rig.add(request)
    for turn in itertools.count():
        if rig.engine.idle:
            break
        rig.step()
        if rig.scheduler.running:
            rig.preempt(rig.scheduler.running[turn % len(rig.scheduler.running)])
    check(*requests)
    assert sum(request.preemptions for request in requests) > 5


def test_others_take_part_in_every_step_and_a_constrained_one_when_its_token_is_read():
    rig = Rig(slots=400, rows=3, step_tokens=30, vocab=VOCAB, ahead=2)
    free, bound = rig.add([1, 2], max_tokens=30), rig.add(held([1, 2]))
    steps, plan = [], rig.scheduler.plan

    def planned():
        steps.append([request for request, _ in plan()])
        return [(request, request.pending) for request in steps[-1]]

    rig.scheduler.plan = planned
    for _ in range(12):
        rig.step()
    assert all(free in step for step in steps)
    assert [bound in step for step in steps] == [True, False, False] * 4


def test_constrained_requests_alone_share_every_step():
    """However they arrived: what would fly apart would read the weights once for each."""
    rig = Rig(slots=400, rows=4, step_tokens=40, vocab=VOCAB, ahead=2)
    requests = [rig.add(held(PROMPTS[i], rule=2 * i)) for i in range(2)]
    rig.step()
    requests += [rig.add(held(PROMPTS[i], rule=2 * i)) for i in range(2, 4)]
    rig.run()
    check(*requests)
    assert rig.engine.launched == 1 + SIZE + 1


def test_all_parameters_hold_within_what_is_allowed():
    """Greedy among what is left; filters, penalties, biases and heat see nothing else."""
    for name, wish in WISHES.items():
        request = held([1, 2], **{"max_tokens": 12, **wish})
        Rig(vocab=VOCAB).answers(request)
        said = []
        for token in request.output:
            banned = request.stop_ids if len(said) < request.params.min_tokens else ()
            allowed = tokens_after(2, said)
            assert token in ([one for one in allowed if one not in banned] or allowed), name
            said.append(token)
        if "top_k of one" in name:
            assert (request.output, request.finish_reason) == expected(request)
    banned = held([1, 2], logit_bias={token: -1e9 for token in range(VOCAB)})
    Rig(vocab=VOCAB).answers(banned)
    assert banned.finish_reason == "stop"  # a ban is a bias, and the constraint is not


def test_logprobs_are_those_of_the_model():
    request = held([5, 6], logprobs=3, grammar=HashedGrammar(4))
    Rig(vocab=VOCAB).answers(request)
    ids = [5, 6]
    for entry in request.logprobs:
        logits = logits_of(ids, VOCAB).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(logprobs[entry.token], abs=1e-5)
        assert [token for token, _ in entry.top] == list(np.argsort(-logprobs, kind="stable")[:3])
        ids.append(entry.token)
    assert ids[2:] == request.output


def test_min_tokens_gives_way_to_a_constraint_that_must_end():
    request = held([1], rule=2, min_tokens=9, max_tokens=20)
    Rig(vocab=VOCAB).answers(request)
    assert (request.output, request.finish_reason) == expected(request)
    assert (request.output_len, request.output[-1]) == (SIZE + 1, STOP)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_constraint_that_allows_nothing_ends_its_request_alone(ahead):
    class Stuck(Hashed):
        def advance(self, token: int) -> None:
            super().advance(token)
            self.allowed = self.allowed * (len(self.said) < 3)

    stuck, other, free = held([1]), held([1, 2]), ask([3, 1], max_tokens=9)
    stuck.constraint = Stuck(2)
    Rig(vocab=VOCAB, ahead=ahead).answers(stuck, other, free)
    assert (stuck.finish_reason, stuck.output_len) == ("grammar", 3)
    check(other, free)


def test_padding_of_the_vocabulary_is_not_sampled_even_if_a_constraint_allows_it():
    class Loose(Hashed):
        def advance(self, token: int) -> None:
            assert token < 35
            self.allowed = masked([2, 36, 37])

    request = held([1], temperature=100.0, logit_bias={36: 1e9})
    request.constraint = Loose(1)
    request.constraint.advance(0)
    Rig(vocab=VOCAB, usable_vocab=35).answers(request)
    assert set(request.output) == {2} and request.finish_reason == "length"


def test_an_unusable_row_ends_a_constrained_request():
    def hook(call, batch, logits):
        logits[:, 3] = NAN if call > 2 else logits[:, 3]

    request = held([1])
    Rig(vocab=VOCAB, hook=hook).answers(request)
    assert (request.finish_reason, request.output_len) == ("error", 2)


def test_a_grammar_of_another_model_is_refused():
    with pytest.raises(UsageError, match="another vocabulary"):
        Rig(vocab=VOCAB + 32).add(held([1]))
    with pytest.raises(UsageError, match="grammar is a str; expected what LLM.grammars makes"):
        ask([1], grammar="a*")
    with pytest.raises(UsageError, match="ignore_eos = True"):
        ask([1], grammar=HashedGrammar(1), ignore_eos=True)
