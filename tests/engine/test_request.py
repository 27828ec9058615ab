"""What may be asked for: every parameter, in range, out of range and of a wrong type (SMP-01)."""

import dataclasses
import math

import pytest

from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError

NAN, INF = math.nan, math.inf
NEVER = [NAN, INF, -INF, 2**64, 10**400, -(10**400), True, False, "7", "", [], {}, (1,), 1j, b"1"]
WHOLE = {
    "max_tokens": ([1, 7, 2**31], [0, -1, 1.0, 2**31 + 1]),
    "min_tokens": ([0, 2**31], [-1, 1.5, 2**31 + 1, None]),
    "top_k": ([0, 1, 2**31 - 1], [-1, 2.0, 2**31]),
    "seed": ([-(2**63), 0, 2**63 - 1], [2**63, -(2**63) - 1, 0.0]),
    "logprobs": ([0, 20], [-1, 21, 1.0]),
    "n": ([1, 64], [0, -1, 65, 1.0, None]),
}
NUMBERS = {
    "temperature": ([0, -0.0, 1e-45, 1e-7, 1, 100.0], [-1, -1e-9, 100.1, 1e308]),
    "top_p": ([0, 1e-9, 1], [-0.1, 1.0001, 2]),
    "min_p": ([0, 1e-45, 1], [-0.1, 1.0001, 2]),
    "repetition_penalty": ([1e-3, 1, 100], [0, -1, 1e-4, 101, 1e308]),
    "presence_penalty": ([-100, 0, 100], [-101, 100.5, None]),
    "frequency_penalty": ([-100, 0, 100], [-101, 100.5, None]),
}


@pytest.mark.parametrize("name", WHOLE | NUMBERS)
def test_a_number_out_of_range_is_refused_by_name(name):
    good, bad = (WHOLE | NUMBERS)[name]
    for value in good:
        kept = getattr(SamplingParams(**{name: value}), name)
        assert kept == value and type(kept) is (float if name in NUMBERS else int)
    for value in bad + NEVER:
        with pytest.raises(UsageError, match=rf"^{name} = ") as error:
            SamplingParams(**{name: value})
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("value", [*NEVER[:-2], 0, 1, None])
def test_ignore_eos_is_a_truth_value(value):
    if type(value) is bool:
        assert SamplingParams(ignore_eos=value).ignore_eos is value
    else:
        with pytest.raises(UsageError, match="^ignore_eos = "):
            SamplingParams(ignore_eos=value)


@pytest.mark.parametrize("value", ["", [""], ("a", ""), ["a"] * 17, 5, None, True, {"a": 1}, [1], [None], b"a", NAN])
def test_bad_stop_strings_are_refused(value):
    with pytest.raises(UsageError, match="^stop = "):
        SamplingParams(stop=value)


def test_stop_strings_come_as_one_or_many():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=["a"] * 16).stop == ("a",) * 16
    assert SamplingParams(stop=[]).stop == ()


@pytest.mark.parametrize("value", [5, None, True, "12", "", [True], [1.0], ["1"], [None], {"a": 1}, NAN, [[1]]])
def test_bad_stop_tokens_are_refused(value):
    with pytest.raises(UsageError, match="^stop_token_ids"):
        SamplingParams(stop_token_ids=value)


def test_stop_tokens_are_never_lost():
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)
    assert set(SamplingParams(stop_token_ids={3, 1}).stop_token_ids) == {1, 3}
    with pytest.raises(UsageError, match="^stop_token_ids"):
        SamplingParams(stop_token_ids=(token for token in [3, 1]))  # could be read once only


@pytest.mark.parametrize("bias", [NAN, INF, -INF, 1e308, -1e30, 10**400, True, "1", None, []])
def test_a_bias_is_a_moderate_number(bias):
    with pytest.raises(UsageError, match=r"^logit_bias\[3\] = "):
        SamplingParams(logit_bias={3: bias})


@pytest.mark.parametrize("value", [None, [], [1], "a", 5, True, (1, 2), NAN])
def test_biases_are_a_mapping(value):
    with pytest.raises(UsageError, match="^logit_bias = "):
        SamplingParams(logit_bias=value)


@pytest.mark.parametrize("token", ["3", 3.0, True, None])
def test_a_biased_token_is_an_id(token):
    with pytest.raises(UsageError, match=r"^logit_bias\["):
        SamplingParams(logit_bias={token: 1.0})


def test_biases_are_copied_and_numbers_become_floats():
    mine = {3: 5, 4: -2.5}
    params = SamplingParams(logit_bias=mine)
    mine[99] = 1.0
    assert params.logit_bias == {3: 5.0, 4: -2.5} and type(params.logit_bias[3]) is float


def test_unset_parameters_come_from_the_generation_config_when_it_samples():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1, 2], "min_p": None}
    params = SamplingParams(top_k=3).resolved(config)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.9, 3, 0.0)
    assert SamplingParams().resolved({"do_sample": True}).temperature == 1.0
    assert SamplingParams().resolved({"temperature": 0.6}).greedy, "without do_sample a checkpoint is greedy"
    assert SamplingParams(temperature=0.3).resolved({"temperature": 0.6}).temperature == 0.3
    assert SamplingParams().resolved({"repetition_penalty": 1.1}).penalized


def test_resolved_leaves_nothing_open_and_fresh_seeds_differ():
    seeds = set()
    for _ in range(20):
        params = SamplingParams().resolved({})
        left = [f.name for f in dataclasses.fields(params) if getattr(params, f.name) is None]
        assert left == ["max_tokens", "logprobs", "prompt_logprobs", "grammar"]
        seeds.add(params.seed)
    assert len(seeds) > 15
    assert SamplingParams(seed=0).resolved({}).seed == 0
