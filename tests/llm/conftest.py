"""A tiny random checkpoint that `transformers` wrote, opened once; every test must leave it idle and its pool whole."""

import json

import pytest
import torch
import transformers

from lite_llm import SamplingParams
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
