"""What `generate`, `chat` and `stream` answer."""

import dataclasses
import functools
import itertools

import pytest
import torch
import transformers

from lite_llm import SamplingParams
from lite_llm.engine import build
from lite_llm.engine.engine import Flight
from lite_llm.errors import ContextExceeded, UsageError
from lite_llm.llm import LLM
from tests.llm.conftest import CHAT, OPTIONS, PROMPTS, joined, params


def test_greedy_tokens_are_those_of_transformers(llm, checkpoint):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    outputs = llm.generate(PROMPTS, params(max_tokens=24, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([llm.encode(prompt)])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True, suppress_tokens=None,
        )  # fmt: skip
        best = torch.cat(want.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "no test: two tokens are equally likely"
        assert list(output.token_ids) == want.sequences[0, ids.shape[1] :].tolist()
        assert output.text == llm.tokenizer.decode(output.token_ids)


def test_a_list_is_answered_in_order_as_if_each_were_alone(llm):
    wishes = [params(temperature=1.0 * (i > 2), seed=i, max_tokens=5 + i) for i in range(5)]
    together = llm.generate(PROMPTS, wishes)
    for prompt, wish, output in zip(PROMPTS, wishes, together, strict=True):
        alone = llm.generate(prompt, wish)
        assert alone.choices == output.choices and alone.prompt_ids == output.prompt_ids
        assert output.usage.prompt_tokens == len(llm.encode(prompt))
        assert output.usage.completion_tokens == len(output.token_ids) <= wish.max_tokens
    assert llm.generate([]) == []


def test_the_first_step_does_not_wait_for_the_last_prompt(llm, monkeypatch):
    launched, read, before = [], llm.read, llm.engine.launched
    monkeypatch.setattr(llm, "read", lambda *args: launched.append(llm.engine.launched - before) or read(*args))
    prompts = [[i + 1] * 10 for i in range(2 * OPTIONS["step_tokens"] // 10 + 2)]
    outputs = llm.generate(prompts, params(max_tokens=3, ignore_eos=True))
    assert launched[0] == 0 < launched[-1]
    for prompt, output in zip(prompts[::3], outputs[::3], strict=True):
        assert output.token_ids == llm.generate(prompt, params(max_tokens=3, ignore_eos=True)).token_ids


def test_what_has_ended_is_forgotten_while_others_are_answered(llm, monkeypatch):
    held, step = [], llm.step

    def watched():
        held.append(len(llm.in_flight().requests))
        return step()

    monkeypatch.setattr(llm, "step", watched)
    asked = [SamplingParams(max_tokens=most, n=n, ignore_eos=True) for most, n in ((3, 2), (12, 1), (6, 1))]
    outputs = llm.generate([[70, 71], [72, 73], [74, 75]], asked)
    assert held[0] == 4 and held[-1] == 1 and sorted(held, reverse=True) == held
    assert [[len(c.token_ids) for c in o.choices] for o in outputs] == [[3, 3], [12], [6]]
    assert not llm.in_flight().requests


def test_a_bad_prompt_behind_answers_that_have_ended_leaves_no_step_under_way(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "ahead", 1)  # a step lands when the next one is launched, as on a GPU
    prompts = [[i + 1] * 10 for i in range(3 * OPTIONS["step_tokens"] // 10)]
    with pytest.raises(UsageError, match="empty"):
        llm.generate([*prompts, []], params(max_tokens=1))
    assert llm.engine.idle and not llm.in_flight().requests


def test_who_may_say_most_begins_first_and_answers_keep_the_order_of_prompts(llm, monkeypatch):
    order, read = [], llm.read
    monkeypatch.setattr(llm, "read", lambda prompt, *rest: order.append(prompt[0]) or read(prompt, *rest))
    prompts, most = [[i] * 3 for i in range(10, 16)], [2, 9, 5, None, 9, 4]
    outputs = llm.generate(prompts, [params(max_tokens=n, ignore_eos=n is not None, stop_token_ids=()) for n in most])
    assert order == [13, 11, 14, 12, 15, 10]
    assert [output.prompt_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert [len(output.token_ids) for output, n in zip(outputs, most, strict=True) if n] == [2, 9, 5, 9, 4]


def test_a_prompt_that_is_refused_late_leaves_nothing_under_way(checkpoint, monkeypatch):
    monkeypatch.setattr(build, "Engine", functools.partial(_late, build.Engine))
    monkeypatch.setattr(Flight, "is_here", property(lambda flight: False))
    with LLM(checkpoint, **OPTIONS) as llm:
        for wrong, error in (([], UsageError), ([1] * 200, ContextExceeded)):
            with pytest.raises(error):
                llm.generate([[1] * OPTIONS["step_tokens"], wrong], params())
            assert llm.engine.launched and llm.engine.idle and not llm._streams


def _late(engine, *args, ahead: int, **options):
    return engine(*args, ahead=2, **options)


def test_token_ids_are_a_prompt_too(llm):
    ids = llm.encode(PROMPTS[0])
    assert llm.generate(ids, params()).text == llm.generate(PROMPTS[0], params()).text
    assert [o.text for o in llm.generate([ids, PROMPTS[1]], params())] == [
        llm.generate(p, params()).text for p in PROMPTS[:2]
    ]


def test_chat_goes_through_the_template(llm):
    ids = llm.tokenizer.chat_ids(CHAT)
    alone = llm.chat(CHAT, params())
    assert alone.prompt_ids == tuple(ids) and alone.text == llm.generate(ids, params()).text
    both = llm.chat([CHAT, [{"role": "user", "content": "x"}]], params())
    assert both[0].text == alone.text and len(both) == 2


def test_the_same_prompt_again_is_cached(llm):
    prompt = llm.encode("Hello world, how are you today?")
    first, second = llm.generate(prompt, params()), llm.generate(prompt, params())
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, len(prompt) - 1)
    assert first.choices == second.choices
    answer = llm.generate(prompt + list(first.token_ids), params())
    assert answer.usage.cached_tokens == len(prompt) + len(first.token_ids) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_joins_to_the_text(llm, prompt, temperature):
    wish = params(temperature=temperature, max_tokens=40)
    whole = llm.generate(prompt, wish)
    assert joined(llm.stream(prompt, wish)) == (whole.text, whole.token_ids, whole.finish_reason)


@pytest.mark.parametrize("stop_length", [1, 2, 5])
def test_stop_strings_cut_exactly_and_never_leak(llm, stop_length):
    """SMP-10: also across the borders of tokens."""
    for prompt, seed in itertools.product(PROMPTS[1:4], range(2)):
        wish = params(temperature=1.0, seed=seed, max_tokens=25)
        free = llm.generate(prompt, wish)
        for at in range(0, len(free.text) - stop_length, 3):
            stop = free.text[at : at + stop_length]
            if "\ufffd" in stop:  # is held back for a token, as it may become a character
                continue
            wanted = free.text[: free.text.index(stop)]
            stopping = dataclasses.replace(wish, stop=("never in there", stop))
            deltas = list(llm.stream(prompt, stopping))
            text, tokens, reason = joined(deltas)
            assert (text, reason) == (wanted, "stop")
            assert tokens == free.token_ids[: len(tokens)] and stop in llm.tokenizer.decode(tokens)
            assert stop not in llm.tokenizer.decode(tokens[:-1])
            if at % 2 == 0:
                choice = llm.generate(prompt, stopping).choices[0]
                assert (choice.text, choice.token_ids, choice.stop, choice.finish_reason) == (
                    wanted,
                    tokens,
                    stop,
                    "stop",
                )


def test_stop_tokens_end_an_answer_and_are_not_text(llm):
    free = llm.generate("x", params(temperature=1.0, ignore_eos=True))
    token = free.token_ids[6]
    wish = params(temperature=1.0, ignore_eos=True, stop_token_ids=(token,))
    choice = llm.generate("x", wish).choices[0]
    first = free.token_ids.index(token)
    assert choice.token_ids == free.token_ids[: first + 1] and (choice.stop, choice.finish_reason) == (token, "stop")
    assert choice.text == llm.tokenizer.decode(free.token_ids[:first])
    late = llm.generate("x", dataclasses.replace(wish, min_tokens=first + 3)).choices[0]
    assert token not in late.token_ids[: first + 3] and len(late.token_ids) >= first + 3


def test_any_end_token_of_any_config_ends_an_answer(llm):
    names = ["</s>", "<|eot_id|>"]
    ids = {llm.tokenizer._backend.token_to_id(name) for name in names}
    assert llm.eos_ids == ids | {1}, "config.json, generation_config.json and the tokenizer; none that does not exist"
    for eos in ids | {1}:
        wish = params(logit_bias={eos: 1e6}, ignore_eos=False)
        choice = llm.generate("x", wish).choices[0]
        assert (choice.text, choice.token_ids, choice.stop) == ("", (eos,), eos)
        ignoring = llm.generate("x", dataclasses.replace(wish, ignore_eos=True, max_tokens=3)).choices[0]
        assert (ignoring.token_ids, ignoring.finish_reason) == ((eos,) * 3, "length")
        late = llm.generate("x", dataclasses.replace(wish, min_tokens=3)).choices[0]
        assert len(late.token_ids) == 4 and not set(late.token_ids[:3]) & llm.eos_ids


def test_padding_of_the_vocabulary_never_comes(llm):
    usable = llm.tokenizer.vocab_size
    assert llm.cfg.vocab == usable + 5
    wish = params(temperature=100.0, max_tokens=60, ignore_eos=True, logit_bias={usable + 2: 1e9})
    assert max(llm.generate("x", wish).token_ids) < usable


def test_several_answers_to_one_prompt(llm):
    wish = params(temperature=1.5, n=4, seed=10, max_tokens=12, logprobs=1)
    output = llm.generate("Hello", wish)
    assert [(c.index, c.seed) for c in output.choices] == [(0, 10), (1, 11), (2, 12), (3, 13)]
    assert len({c.token_ids for c in output.choices}) > 1
    for choice in output.choices:
        alone = llm.generate("Hello", dataclasses.replace(wish, n=1, seed=choice.seed)).choices[0]
        assert dataclasses.replace(alone, index=choice.index).token_ids == choice.token_ids
        assert alone.text == choice.text and [entry.token for entry in choice.logprobs] == list(choice.token_ids)
    deltas = list(llm.stream("Hello", wish))
    for choice in output.choices:
        assert joined(deltas, choice.index) == (choice.text, choice.token_ids, choice.finish_reason)
    assert output.usage.completion_tokens == sum(len(c.token_ids) for c in output.choices)
    assert llm.generate("x", params(n=2, seed=2**63 - 1, temperature=1.0)).choices[1].seed == -(2**63)


def test_logprobs_of_a_prompt_come_once_and_are_those_of_transformers(llm, checkpoint):
    ids = llm.encode("Hello there, how do you do")
    [output] = llm.generate([ids], SamplingParams(max_tokens=2, n=2, temperature=0.0, prompt_logprobs=1))
    assert output.prompt_ids == tuple(ids) and [entry.token for entry in output.prompt_logprobs] == ids[1:]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        exact = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for at, entry in enumerate(output.prompt_logprobs):
        assert entry.logprob == pytest.approx(exact[at, entry.token].item(), abs=1e-3)
        assert entry.top[0][1] == pytest.approx(exact[at].max().item(), abs=1e-3)


def test_a_seed_that_was_not_given_is_reported_and_repeats_the_answer(llm):
    first = llm.generate("Hello", SamplingParams(temperature=2.0, max_tokens=12))
    again = llm.generate("Hello", SamplingParams(temperature=2.0, max_tokens=12, seed=first.choices[0].seed))
    assert again.token_ids == first.token_ids and first.params.seed == first.choices[0].seed


def test_a_tiny_pool_gives_the_same_answers(llm, checkpoint):
    """SCH-04 and SCH-05 from the outside: preempted with seeds, penalties, stops, logprobs and n > 1."""
    wish = params(temperature=0.9, repetition_penalty=1.2, stop="the", logprobs=2, n=2, max_tokens=24, seed=5)
    want = llm.generate(PROMPTS, wish)
    for cache in (True, False):
        with LLM(checkpoint, **{**OPTIONS, "kv_tokens": 60}, prefix_cache=cache) as small:
            got = small.generate(PROMPTS, wish)
            assert small.cfg.max_len == 60
        for a, b in zip(want, got, strict=True):
            for one, other in zip(a.choices, b.choices, strict=True):
                assert (one.text, one.token_ids, one.stop, one.seed) == (
                    other.text,
                    other.token_ids,
                    other.stop,
                    other.seed,
                )
                for x, y in zip(one.logprobs, other.logprobs, strict=True):
                    assert x.token == y.token and x.logprob == pytest.approx(y.logprob, abs=1e-3)


def test_nothing_is_kept_of_what_is_forgotten(llm):
    llm.generate(["Hello", "What is 2 + 2?"], SamplingParams(max_tokens=4, n=2, temperature=1.0))
    next(llm.stream("Hello"))
    assert not llm._streams and not llm._answers
