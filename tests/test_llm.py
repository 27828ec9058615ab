"""Text in, text out, over a tiny random checkpoint that `transformers` wrote and the bundled copy model."""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers

from lite_llm import SamplingParams
from lite_llm.errors import BadCheckpoint, ContextExceeded, DoesNotFit, LiteLLMError, UsageError
from lite_llm.llm import DEMO, LLM
from tests.text.build import byte_level, write

COPY = DEMO.parent / "copy"
OPTIONS = dict(device="cpu", dtype="float32", kv_tokens=300, max_requests=8, step_tokens=24)
PROMPTS = ["Hello world", "the quick brown fox", "你好，世界", "x", "def f(x):\n    return x"]
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random Llama, sharpened so that the best token is best by far; it has a tokenizer, a template and three EOS."""
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    tokenizer = byte_level()
    torch.manual_seed(3)
    vocab = tokenizer.get_vocab_size() + 5  # padding that must never be sampled
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
        if name == "lm_head.weight":
            parameter.data[-5:] = 0
    model.save_pretrained(folder)
    write(folder, tokenizer)
    eos = [tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<|eot_id|>"), 9999]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture(scope="module")
def opened(checkpoint):
    with LLM(checkpoint, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(opened):
    yield opened
    scheduler = opened.engine.scheduler
    scheduler.check()
    assert opened.engine.idle and not opened._streams, "something is left behind"
    assert scheduler.prefix.protected == 0
    assert scheduler.prefix.size + scheduler.slots.free_count == scheduler.capacity
    scheduler.slots.free(scheduler.prefix.evict(scheduler.capacity))


def params(**wishes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "seed": 1, "ignore_eos": True, **wishes})


def joined(deltas, index: int = 0):
    mine = [delta for delta in deltas if delta.index == index]
    assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
    return "".join(d.text for d in mine), tuple(t for d in mine for t in d.token_ids), mine[-1].finish_reason


# ---- answers


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


# ---- leaving, failing, closing


def test_leaving_a_stream_early_frees_its_slots(llm):
    for taken in range(1, 6):
        stream = llm.stream("Hello world", params(max_tokens=50, n=2))
        for _ in range(taken):
            next(stream)
        assert not llm.engine.idle
        stream.close()
        assert llm.engine.idle and llm.engine.scheduler.running == []


def test_streams_that_run_at_the_same_time_lose_nothing(llm):
    wishes = [params(temperature=1.0, seed=i, n=1 + i % 3, max_tokens=6 + 5 * (i % 2)) for i in range(4)]
    want = [llm.generate(PROMPTS[i], wish) for i, wish in enumerate(wishes)]
    for pace in (1, 3):
        streams = [llm.stream(PROMPTS[i], wish) for i, wish in enumerate(wishes)]
        got = [[] for _ in streams]
        open_streams = set(range(4))
        while open_streams:
            for i in sorted(open_streams):
                for _ in range(pace if i else 1):
                    delta = next(streams[i], None)
                    if delta is None:
                        open_streams.discard(i)
                        break
                    got[i].append(delta)
        for deltas, output in zip(got, want, strict=True):
            for choice in output.choices:
                assert joined(deltas, choice.index) == (choice.text, choice.token_ids, choice.finish_reason)


def test_the_step_interface(llm):
    free = llm.generate("Hello", params())
    name, other = llm.add_request("Hello", params()), llm.add_request("x", params(max_tokens=2), id="mine")
    assert other == "mine" and not llm.finished(name)
    deltas = []
    while not (llm.finished(name) and llm.finished(other)):
        deltas += llm.step()
    assert joined([d for d in deltas if d.id == name])[0] == free.text == llm.result(name).text
    assert llm.result(other).usage.completion_tokens == 2 and llm.step() == []
    llm.abort(name)
    assert llm.result(name).choices == free.choices, "a finished answer does not change"
    for each in (name, other):
        llm.forget(each)
        llm.forget(each)
        with pytest.raises(UsageError, match="no request"):
            llm.result(each)
    llm.abort("never heard of")


def test_an_aborted_answer_keeps_what_it_said(llm):
    free = llm.generate("Hello", params(max_tokens=30))
    for steps in (0, 1, 2, 7, 15):
        name = llm.add_request("Hello", params(max_tokens=30))
        for _ in range(steps):
            llm.step()
        llm.abort(name)
        llm.abort(name)
        output = llm.result(name)
        assert output.finish_reason == "abort" and llm.finished(name) and llm.engine.idle
        assert output.token_ids == free.token_ids[:steps]
        assert output.text == llm.tokenizer.decode(output.token_ids)
        llm.forget(name)


def test_an_id_in_use_is_refused_and_its_owner_untouched(llm):
    """SCH-09."""
    want = llm.generate("Hello", params()).text
    llm.add_request("Hello", params(), id="a")
    llm.step()
    with pytest.raises(UsageError, match="'a' is in use"):
        llm.add_request("x", params(), id="a")
    while not llm.finished("a"):
        llm.step()
    assert llm.result("a").text == want
    llm.forget("a")


BAD = {
    "too long": ([5] * 500, ContextExceeded),
    "not in the vocabulary": ([5, 10**6], UsageError),
    "negative": ([5, -1], UsageError),
    "nothing": ([], UsageError),
    "a wrong role": ([{"role": "nobody", "content": "x"}], UsageError),
    "text of another kind": ([{"role": "user", "content": 5}], UsageError),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_prompt_in_a_list_leaves_nothing_behind(llm, name):
    prompt, error = BAD[name]
    running = llm.add_request("Hello", params())
    llm.step()
    with pytest.raises(error) as caught:
        llm.generate(["x", prompt, "y"], params(n=2))
    assert caught.value.exit_code == 2 and len(llm.engine.scheduler.running) == 1 and not llm.engine.scheduler.waiting
    while not llm.finished(running):
        llm.step()
    assert llm.result(running).text == llm.generate("Hello", params()).text
    llm.forget(running)


def test_parameters_and_prompts_must_be_as_many(llm):
    with pytest.raises(UsageError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [params(), params()])


@pytest.mark.parametrize("k", range(1, 12))
def test_a_failing_forward_pass_tells_its_requests_and_the_next_one_works(llm, monkeypatch, k):
    """FLT-01 through the public interface."""
    want = [llm.generate(prompt, params(max_tokens=4)) for prompt in PROMPTS]
    forward, calls = llm.engine.model.forward, itertools.count(1)

    def failing(batch, kv):
        logits = forward(batch, kv)
        if next(calls) == k:
            raise torch.OutOfMemoryError("no memory")
        return logits

    monkeypatch.setattr(llm.engine.scheduler, "max_requests", 2)  # so that some wait
    monkeypatch.setattr(llm.engine.scheduler, "free_rows", [1, 0])
    monkeypatch.setattr(llm.engine.model, "forward", failing)
    names, failures = [llm.add_request(prompt, params(max_tokens=4)) for prompt in PROMPTS], 0
    while not all(llm.finished(name) for name in names):
        try:
            llm.step()
        except torch.OutOfMemoryError:
            failures += 1
        llm.engine.scheduler.check()
    results = [llm.result(name) for name in names]
    assert failures == 1 and 1 <= sum(r.finish_reason == "error" for r in results) <= 2
    for result, good in zip(results, want, strict=True):
        whole = result.finish_reason != "error"
        assert result.choices == good.choices or not whole
        assert result.token_ids == good.token_ids[: len(result.token_ids)]
    for name in names:
        llm.forget(name)
    assert llm.generate(PROMPTS[0], params(max_tokens=4)).choices == want[0].choices


def test_a_failure_inside_generate_and_stream_cleans_up(llm, monkeypatch):
    forward = llm.engine.model.forward
    monkeypatch.setattr(llm.engine.model, "forward", lambda batch, kv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, params())
    with pytest.raises(ZeroDivisionError):
        next(llm.stream("x", params()))
    monkeypatch.setattr(llm.engine.model, "forward", forward)
    assert llm.engine.idle and llm.generate("x", params()).finish_reason in ("length", "stop")


def test_a_closed_llm_says_so(checkpoint):
    llm = LLM(checkpoint, **OPTIONS)
    running = llm.stream("x", params())
    next(running)
    llm.close()
    llm.close()
    uses = [
        lambda: llm.generate("x"), lambda: llm.chat(CHAT), lambda: next(llm.stream("x")), llm.step,
        lambda: llm.add_request("x"), lambda: llm.engine, lambda: llm.generate(["x", "y"]),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(UsageError, match="closed"):
            use()
    with pytest.raises(LiteLLMError):
        list(running)
    llm.abort("x")
    llm.forget("x")


def test_the_context_manager_closes(checkpoint):
    with LLM(checkpoint, **OPTIONS) as llm:
        assert llm.generate("x", params(max_tokens=1)).finish_reason == "length"
    with pytest.raises(UsageError, match="closed"):
        llm.generate("x")


# ---- opening


def test_unknown_options_and_contradictions_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="unknown option 'max_batch'; known: .*max_requests"):
        LLM(checkpoint, max_batch=3)
    with pytest.raises(UsageError, match="max_requests = 0"):
        LLM(checkpoint, max_requests=0)
    with pytest.raises(UsageError, match="step_tokens = 4 is less than max_requests = 8"):
        LLM(checkpoint, step_tokens=4, max_requests=8)
    with pytest.raises(UsageError, match="random_weights"):
        LLM(shape="tiny-llama-3.2-1b")
    with pytest.raises(UsageError, match="random_weights"):
        LLM(checkpoint, random_weights=True)
    with pytest.raises(UsageError, match="has no files"):
        LLM(checkpoint, shape="tiny-llama-3.2-1b", random_weights=True)
    with pytest.raises(UsageError, match="not known"):
        LLM(shape="nothing", random_weights=True)
    with pytest.raises(LiteLLMError):
        LLM(tmp_path / "nothing here")


def test_memory_that_does_not_suffice_is_refused_before_loading(checkpoint):
    with pytest.raises(DoesNotFit, match="100,000,000,000,000 KV tokens.*may be used"):
        LLM(checkpoint, **{**OPTIONS, "kv_tokens": 10**14})
    with pytest.raises(LiteLLMError, match="context = 129.* 128"):
        LLM(checkpoint, device="cpu", context=129)


def test_the_plan_is_told_and_counts_what_is_there(checkpoint):
    said = []
    with LLM(checkpoint, **OPTIONS, say=said.append) as llm:
        assert said[0] == str(llm.plan) and "300 tokens" in said[0]
        assert llm.plan.weights == sum(p.numel() * 4 for p in llm.engine.model.parameters())
        assert llm.engine.kv.k.nbytes + llm.engine.kv.v.nbytes == llm.plan.kv + llm.plan.kv_token
        assert llm.plan.context == llm.cfg.max_len == 128


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    extra = [{**raw["added_tokens"][-1], "id": 10_000 + i, "content": f"<extra{i}>"} for i in range(20)]
    raw["added_tokens"] += extra
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(BadCheckpoint, match=f"tokens, the model {config['vocab_size']}"):
        LLM(tmp_path, **OPTIONS)


def test_random_weights_take_token_ids_only():
    with LLM(shape="tiny-llama-3.2-1b", random_weights=True, **OPTIONS) as llm:
        output = llm.generate([1, 2, 3], params(max_tokens=5))
        assert len(output.token_ids) == 5 and output.text == ""
        with pytest.raises(UsageError, match="no tokenizer"):
            llm.generate("x")


# ---- the copy model


def test_copies_are_right_in_any_company():
    symbols = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    texts = [symbols[i : i + 3 + i % 17] for i in range(40)]
    with LLM(COPY, device="cpu", kv_tokens=120, max_requests=6, step_tokens=40) as llm:
        ask = [f"{' '.join(text)} <sep>" for text in texts]
        outputs = llm.generate(ask, SamplingParams(max_tokens=25, temperature=0.0))
        for text, output in zip(texts, outputs, strict=True):
            assert output.text.replace(" ", "") == text and output.finish_reason == "stop"
