"""What is refused before loading, what the plan tells, and the copy model through the whole text path."""

import json

import pytest
import torch

from lite_llm import SamplingParams
from lite_llm.errors import BadCheckpoint, DoesNotFit, LiteLLMError, UsageError
from lite_llm.llm import LLM
from tests.llm.conftest import COPY, OPTIONS, params


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


def test_copies_are_right_in_any_company():
    symbols = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    texts = [symbols[i : i + 3 + i % 17] for i in range(40)]
    with LLM(COPY, device="cpu", kv_tokens=120, max_requests=6, step_tokens=40) as llm:
        ask = [f"{' '.join(text)} <sep>" for text in texts]
        outputs = llm.generate(ask, SamplingParams(max_tokens=25, temperature=0.0))
        for text, output in zip(texts, outputs, strict=True):
            assert output.text.replace(" ", "") == text and output.finish_reason == "stop"


@pytest.mark.gpu
def test_the_gpu_is_free_again_after_the_context_manager():
    with LLM(shape="tiny-llama-3.2-1b", random_weights=True, device="cuda"):
        pass  # cuBLAS and our kernels take a workspace once and keep it
    before = torch.cuda.memory_allocated()
    with LLM(shape="tiny-llama-3.2-1b", random_weights=True, device="cuda") as llm:
        assert len(llm.generate([1, 2, 3], params(max_tokens=4)).token_ids) == 4
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before
