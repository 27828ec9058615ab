"""/why: the last answer against the limit, in words; the conversation and the engine are left alone."""

import dataclasses

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
    assert "reached:     25% of the limit" in text and "CPU's memory copies 10 GB/s" in text
    assert "first token: 12 ms; the 20 prompt tokens that were not cached" in text
    assert "MLP, gate and up" in text and "Python between the operations" in text


def test_a_draft_that_stood_took_no_step():
    roof = Ceilings(copy=1e10, matmul=1e11)
    last = answer(2 * limit(roof))
    drafted = dataclasses.replace(last, usage=dataclasses.replace(last.usage, drafted_tokens=40))
    text = explanation(CFG, PLAN, drafted, roof)
    assert "a step: 40 tokens were drafts that stood" in text and "reached:     40% of the limit" in text
    assert "50 answer (40 drafted), " in report.statistics(drafted, 80, 1000)
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
