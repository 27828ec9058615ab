"""The config.json of public checkpoints, as published, give the facts that their authors meant."""

import json

import pytest

from lite_llm.config import HFConfig
from lite_llm.models import registry
from lite_llm.rope import Linear, Llama3, Yarn


def real(**facts):
    return dict(
        attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, use_cache=True, torch_dtype="bfloat16",
        transformers_version="4.40.1", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    ) | facts  # fmt: skip


def shape(hidden, ffn, layers, heads, kv_heads, vocab, positions, eps):
    return dict(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=positions, rms_norm_eps=eps,
    )  # fmt: skip


def llama(*sizes, **more):
    return real(architectures=["LlamaForCausalLM"], model_type="llama", **shape(*sizes), **more)


def mistral(*sizes, **more):
    return real(architectures=["MistralForCausalLM"], model_type="mistral", **shape(*sizes), **more)


def qwen2(*sizes, **more):
    return real(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **shape(*sizes), **more)


def qwen3(*sizes, **more):
    return real(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, attention_bias=False,
        use_sliding_window=False, sliding_window=None, rope_scaling=None, rope_theta=1000000, **shape(*sizes), **more,
    )  # fmt: skip


def llama3_rope(factor):
    return dict(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
        rope_type="llama3",
    )  # fmt: skip


DISTILLED = dict(sliding_window=4096, use_mrope=False, use_sliding_window=False, eos_token_id=151643)
QWEN25_7B = (3584, 18944, 28, 28, 4, 152064, 32768, 1e-6)
QWEN25_WINDOW = dict(rope_theta=1000000.0, sliding_window=131072, use_sliding_window=False)
REAL = {
    "Llama-2-7b": llama(
        4096, 11008, 32, 32, 32, 32000, 4096, 1e-5, _name_or_path="meta-llama/Llama-2-7b-hf", pretraining_tp=1,
        rope_scaling=None, torch_dtype="float16",
    ),
    "Llama-2-70b": llama(8192, 28672, 80, 64, 8, 32000, 4096, 1e-5, pretraining_tp=1, rope_scaling=None),
    "Llama-3.2-1B-Instruct": llama(
        2048, 8192, 16, 32, 8, 128256, 131072, 1e-5, attention_bias=False, bos_token_id=128000, head_dim=64,
        eos_token_id=[128001, 128008, 128009], mlp_bias=False, pretraining_tp=1, rope_scaling=llama3_rope(32.0),
        rope_theta=500000.0, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": llama(
        4096, 14336, 32, 32, 8, 128256, 131072, 1e-5, attention_bias=False, mlp_bias=False, pretraining_tp=1,
        rope_scaling=llama3_rope(8.0), rope_theta=500000.0,
    ),
    "TinyLlama-1.1B": llama(
        2048, 5632, 22, 32, 4, 32000, 2048, 1e-5, attention_bias=False, pretraining_tp=1, rope_scaling=None,
        rope_theta=10000.0,
    ),
    "Mistral-7B-v0.1": mistral(4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.3": mistral(4096, 14336, 32, 32, 8, 32768, 32768, 1e-5, rope_theta=1000000.0, sliding_window=None),
    "Mistral-Nemo": mistral(
        5120, 14336, 40, 32, 8, 131072, 131072, 1e-5, head_dim=128, rope_theta=1000000.0, sliding_window=None
    ),
    "Qwen2.5-0.5B": qwen2(
        896, 4864, 24, 14, 2, 151936, 32768, 1e-6, max_window_layers=24, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, use_mrope=False, use_sliding_window=False, bos_token_id=151643, eos_token_id=151643,
    ),
    "Qwen2.5-7B-Instruct": qwen2(*QWEN25_7B, max_window_layers=28, **QWEN25_WINDOW),
    "Qwen2.5-7B-Instruct with YaRN": qwen2(
        *QWEN25_7B, max_window_layers=28, **QWEN25_WINDOW,
        rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"),
    ),
    "Qwen2.5-72B": qwen2(8192, 29568, 80, 64, 8, 152064, 131072, 1e-5, max_window_layers=70, **QWEN25_WINDOW),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, 8, 151936, 40960, 1e-6, max_window_layers=28, tie_word_embeddings=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, 8, 151936, 40960, 1e-6, max_window_layers=36),
    "Vicuna-7b-v1.5-16k": llama(
        4096, 11008, 32, 32, 32, 32000, 4096, 1e-5, max_sequence_length=16384, pad_token_id=0, pretraining_tp=1,
        rope_scaling=dict(factor=4.0, type="linear"), torch_dtype="float16",
    ),
    "CodeLlama-7b": llama(
        4096, 11008, 32, 32, 32, 32016, 16384, 1e-5, pretraining_tp=1, rope_scaling=None, rope_theta=1000000
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen2(
        1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, max_window_layers=21, rope_theta=10000, **DISTILLED
    ),
    "DeepSeek-R1-Distill-Qwen-7B": qwen2(
        3584, 18944, 28, 28, 4, 152064, 131072, 1e-6, max_window_layers=28, rope_theta=10000, **DISTILLED
    ),
    "DeepSeek-R1-Distill-Llama-8B": llama(
        4096, 14336, 32, 32, 8, 128256, 131072, 1e-5, attention_bias=False, mlp_bias=False, pretraining_tp=1,
        rope_scaling=llama3_rope(8.0), rope_theta=500000.0,
    ),
    "Qwen2.5-1.5B saved by transformers 5": {
        **qwen2(
            1536, 8960, 28, 12, 2, 151936, 131072, 1e-6, max_window_layers=28, layer_types=["full_attention"] * 28,
            rope_parameters=dict(rope_theta=1000000.0, rope_type="default"), sliding_window=None, dtype="bfloat16",
            tie_word_embeddings=True, use_mrope=False, use_sliding_window=False, pad_token_id=None,
        ),
        "transformers_version": "5.17.0",
    },
}  # fmt: skip
FACTS = {  # head_dim, positions, theta, scaling, qkv bias, qk norm, tied, window
    "Llama-2-7b": (128, 4096, 1e4, None, False, False, False, None),
    "Llama-2-70b": (128, 4096, 1e4, None, False, False, False, None),
    "Llama-3.2-1B-Instruct": (64, 131072, 5e5, Llama3(32.0, 1.0, 4.0, 8192), False, False, True, None),
    "Llama-3.1-8B": (128, 131072, 5e5, Llama3(8.0, 1.0, 4.0, 8192), False, False, False, None),
    "TinyLlama-1.1B": (64, 2048, 1e4, None, False, False, False, None),
    "Mistral-7B-v0.1": (128, 32768, 1e4, None, False, False, False, 4096),
    "Mistral-7B-v0.3": (128, 32768, 1e6, None, False, False, False, None),
    "Mistral-Nemo": (128, 131072, 1e6, None, False, False, False, None),
    "Qwen2.5-0.5B": (64, 32768, 1e6, None, True, False, True, None),
    "Qwen2.5-7B-Instruct": (128, 32768, 1e6, None, True, False, False, None),
    "Qwen2.5-7B-Instruct with YaRN": (
        128, 131072, 1e6, Yarn(4.0, 32768, 1.1386294361119891, 32.0, 1.0, True), True, False, False, None,
    ),
    "Qwen2.5-72B": (128, 131072, 1e6, None, True, False, False, None),
    "Qwen3-0.6B": (128, 40960, 1e6, None, False, True, True, None),
    "Qwen3-8B": (128, 40960, 1e6, None, False, True, False, None),
    "Vicuna-7b-v1.5-16k": (128, 16384, 1e4, Linear(4.0), False, False, False, None),
    "CodeLlama-7b": (128, 16384, 1e6, None, False, False, False, None),
    "DeepSeek-R1-Distill-Qwen-1.5B": (128, 131072, 1e4, None, True, False, False, None),
    "DeepSeek-R1-Distill-Qwen-7B": (128, 131072, 1e4, None, True, False, False, None),
    "DeepSeek-R1-Distill-Llama-8B": (128, 131072, 5e5, Llama3(8.0, 1.0, 4.0, 8192), False, False, False, None),
    "Qwen2.5-1.5B saved by transformers 5": (128, 131072, 1e6, None, True, False, True, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_facts_of_public_files(name, tmp_path):
    raw, facts = REAL[name], FACTS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg = registry.parse(HFConfig.load(tmp_path))
    assert (cfg.num_layers, cfg.hidden, cfg.ffn) == tuple(
        raw[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    assert (cfg.heads, cfg.kv_heads, cfg.vocab, cfg.norm_eps) == tuple(
        raw[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
    )
    assert cfg.dtype == raw["torch_dtype"] and not (cfg.out_bias or cfg.mlp_bias)
    window = {cfg.windows[0]} if len(set(cfg.windows)) == 1 else set(cfg.windows)
    got = (cfg.head_dim, cfg.max_len, cfg.rope.theta, cfg.rope.scaling, cfg.qkv_bias, cfg.qk_norm, cfg.tied_head)
    assert (*got, *window) == facts and cfg.rope.rotary == cfg.head_dim
