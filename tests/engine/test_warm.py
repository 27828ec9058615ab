"""After "ready" nothing compiles, whatever is asked: 500 requests of random lengths, batches and parameters."""

import random
from types import SimpleNamespace

import pytest
import torch
import triton

from lite_llm.config import EngineConfig
from lite_llm.engine import warm as warming
from lite_llm.engine.build import Blueprint
from lite_llm.engine.request import Request, SamplingParams
from lite_llm.llm import DEMO, LLM
from lite_llm.ops import warm
from tests.engine.models import tiny_config
from tests.engine.test_engine import copies

COPY = DEMO.parent / "copy"
WISHES = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.0001},
    {"temperature": 0.0, "presence_penalty": 0.01, "frequency_penalty": 0.01},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.0, "logprobs": 7, "logit_bias": {5: -0.01}},
    {"temperature": 0.0, "min_tokens": 2},
    {"temperature": 0.05},
    {"temperature": 0.05, "top_k": 3},
    {"temperature": 0.05, "top_p": 0.9},
    {"temperature": 0.05, "top_k": 7, "top_p": 0.8, "min_p": 0.1},
)
"""Ways to ask that leave every copy right: its symbols win by several units of the logits."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_compiles_after_ready_and_every_copy_is_exact(dtype):
    draw = random.Random(5)
    with LLM(COPY, device="cuda", dtype=dtype, max_requests=40, step_tokens=300, drafts=5) as llm:
        pairs = copies(llm.tokenizer, draw, 500, longest=20)
        todo = []
        for i, (asked, answer) in enumerate(pairs):
            wish = SamplingParams(max_tokens=len(answer) + 8, seed=i, **draw.choice(WISHES)).resolved({})
            todo.append((Request(asked.ids, wish, asked.stop_ids, max_len=asked.max_len), answer))
        left, largest = list(todo), 0
        with warm.counting() as counter:
            while left or not llm.engine.idle:
                if draw.random() < 0.1:  # a crowd, or one at a time
                    crowd = draw.choice((1, 1, 2, 7, 40, 80))
                    for request, _ in left[:crowd]:
                        llm.engine.add(request)
                    del left[:crowd]
                llm.engine.step()
                largest = max(largest, len(llm.engine.scheduler.running))
        assert (counter.compiled, counter.loaded) == ([], [])
        assert largest > 30 and llm.engine.scheduler.prefix.size > 0
        for request, answer in todo:
            assert (request.output, request.finish_reason) == (answer, "stop")


@pytest.mark.gpu
def test_long_prompts_compile_nothing_either():
    """Beyond what the copy model knows, of a model that says anything, with steps filled to their budget."""
    draw = random.Random(3)
    with LLM(shape="tiny-llama-3.2-1b", random_weights=True, device="cuda", max_requests=8, drafts=7) as llm:
        with warm.counting() as counter:
            for _ in range(6):
                lengths = [draw.choice((1, 3, 16, 100, 511, 700, 960)) for _ in range(draw.randint(1, 8))]
                prompts = [[draw.randrange(100) for _ in range(n)] for n in lengths]
                llm.generate(prompts, SamplingParams(max_tokens=draw.randint(1, 60), ignore_eos=True))
        assert counter.count == 0


def test_on_a_cpu_nothing_is_ever_new_and_for_a_gpu_triton_is_asked():
    with warming.counting(torch.device("cpu")) as counter:
        with LLM(COPY, device="cpu") as llm:
            llm.generate("abc<sep>", SamplingParams(max_tokens=2))
    assert (counter.compiled, counter.loaded, counter.count) == ([], [], 0)
    source = SimpleNamespace(name="attend")
    with warming.counting(torch.device("cuda")) as counter:  # counts without a GPU too
        for known in (True, False, True):
            triton.knobs.compilation.listener(src=source, cache_hit=known)
    assert (len(counter.compiled), len(counter.loaded)) == (1, 2)


def test_warming_up_a_cpu_builds_nothing():
    blueprint = Blueprint(tiny_config(20, 40), EngineConfig(device="cpu"))
    blueprint.build = lambda *_: pytest.fail("it was built")
    found = warming.warm_up(blueprint, None, lambda *_: pytest.fail("nothing is done"))
    assert (found.compiled, found.loaded, found.directory) == (0, 0, None)
