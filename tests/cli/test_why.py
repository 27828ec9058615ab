"""/why: the last answer against the limit, in words; the conversation and the engine are left alone."""

import dataclasses
import re

import pytest

from lite_llm.cli import commands, report
from lite_llm.cli.session import Session
from lite_llm.cli.why import explanation
from lite_llm.config import EngineConfig, HFConfig
from lite_llm.engine.build import Blueprint
from lite_llm.engine.request import SamplingParams
from lite_llm.engine.roofline import Ceilings
from lite_llm.llm import LLM
from lite_llm.models import registry, shapes
from lite_llm.outputs import Choice, Output, Timings, Usage
from tests.cli.doubles import FakeLLM

CFG = registry.parse(HFConfig(shapes.shape_config("tiny-llama-3.2-1b")))
PLAN = Blueprint(CFG, EngineConfig(device="cpu")).plan
SPEEDS = re.compile(r"([\d,.]+) tok/s, ([\d.]+) (us|ms|s) a (\w+)")
ON_GPU = dataclasses.replace(PLAN, device="cuda:0")


def answer(speed: float, tokens: int = 50) -> Output:
    choice = Choice(0, "so", (1,) * tokens, "stop", None, 0)
    return Output("r", (0,) * 30, (choice,), Usage(30, 10, tokens), Timings(0.012, 1.0, speed, 0.0), SamplingParams())


def limit(roof: Ceilings) -> float:
    """Tokens per second at which an answer like `answer` is at the limit."""
    text = explanation(CFG, PLAN, answer(1.0), roof).splitlines()[1]
    return float(text.split()[2].replace(",", ""))


def test_it_names_the_limit_and_the_share():
    roof = Ceilings(copy=1e10, matmul=1e11)
    text = explanation(CFG, PLAN, answer(limit(roof) / 4), roof)
    assert "reached:     25% of the limit" in text
    assert "CPU's memory copies 10 GB/s, its matmuls do 0.1 TFLOP/s, now" in text
    assert "first token: 12 ms; the 20 prompt tokens that were not cached" in text
    assert "MLP, gate and up" in text and "Python between the operations" in text


def test_a_long_prompt_waits_for_its_matmuls():
    """Of 20 tokens that were not cached 19 need no more of the last layer than keys and values."""
    q, kv = CFG.heads * CFG.head_dim, CFG.kv_heads * CFG.head_dim
    rest = CFG.hidden * (2 * q + 3 * CFG.ffn)
    flops = 20 * CFG.num_layers * 2 * CFG.hidden * kv + (20 * (CFG.num_layers - 1) + 1) * rest + CFG.hidden * CFG.vocab
    text = explanation(CFG, PLAN, answer(1000.0), Ceilings(copy=1e15, matmul=2e9))
    found = re.search(r"not cached take ([\d.]+) ms at least", text)
    assert float(found[1]) == pytest.approx(2 * flops / 2e9 * 1e3, rel=0.01)


def with_drafts(last: Output, drafted: int) -> Output:
    return dataclasses.replace(last, usage=dataclasses.replace(last.usage, drafted_tokens=drafted))


DRAFTS = [(0, ""), (1, "of 1.02 tokens: 1 token was a draft that"), (40, "of 5.44 tokens: 40 tokens were drafts that")]


@pytest.mark.parametrize("drafted, words", DRAFTS)
def test_a_draft_that_stood_took_no_step(drafted, words):
    """So the limit counts the tokens that a step gave. The first of the 50 is none of them: the rate leaves it out."""
    roof, each = Ceilings(copy=1e10, matmul=1e11), 49 / (49 - drafted)
    text = explanation(CFG, PLAN, with_drafts(answer(limit(roof) / 3), drafted), roof)
    rate, most = (dict(zip(("tokens", "time", "unit", "per"), found)) for found in SPEEDS.findall(text))
    for line in (rate, most):
        line["tokens"] = float(line["tokens"].replace(",", ""))
        line["seconds"] = float(line["time"]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[line["unit"]]
        assert line["tokens"] * line["seconds"] == pytest.approx(each, rel=0.01)
    assert most["tokens"] == pytest.approx(each * limit(roof), rel=1e-3) and words in text
    assert f"reached:     {rate['tokens'] / most['tokens']:.0%} of the limit" in text
    unit = "step" if drafted else "token"
    assert rate["per"] == most["per"] == unit and f"\na {unit} reads " in text


def test_drafts_are_counted_behind_an_answer():
    last = answer(100.0)
    assert "50 answer (40 drafted), " in report.statistics(with_drafts(last, 40), 80, 1000)
    assert "drafted" not in report.statistics(last, 80, 1000)


def test_on_a_gpu_the_rest_is_the_kernels():
    text = explanation(CFG, ON_GPU, answer(1000.0), Ceilings(copy=4e12, matmul=8e14))
    assert "GPU's memory copies 4 TB/s" in text and "starting and ending 16 kernels" in text


def test_weights_in_the_cache_beat_the_memory():
    roof = Ceilings(copy=1e10, matmul=1e11)
    assert "stays in the cache" in explanation(CFG, PLAN, answer(limit(roof) * 2), roof)


@pytest.mark.parametrize("output", [answer(0.0, tokens=1), answer(50.0, tokens=3)])
def test_a_short_answer_says_nothing(output):
    assert "too short" in explanation(CFG, PLAN, output, Ceilings(1e10, 1e11))


def test_no_answer_yet():
    assert commands.run(Session(FakeLLM("x"), SamplingParams()), "/why") == "no answers yet"


def test_the_conversation_stays_as_it_is():
    with LLM(device="cpu") as llm:
        talk = Session(llm, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        talk.ask("What is the capital of France?", lambda text: None)
        before = list(talk.messages), talk.used, talk.totals.answers, talk.last
        text = commands.run(talk, "/why")
        assert "% of the limit" in text
        assert (list(talk.messages), talk.used, talk.totals.answers, talk.last) == before and llm.engine.idle
