"""Tiny random checkpoints of every architecture must give the logits of transformers, however requests are cut up.

The pool and the unused entries of the slot table are poisoned: a token that reads anything but its own request's
slots turns into NaN.
"""

import copy
import dataclasses
from collections.abc import Iterable

import pytest
import torch
import transformers
from torch import Tensor

from lite_llm import ops
from lite_llm.batch import PAD_SLOT, Batch, KVPool
from lite_llm.config import HFConfig, ModelConfig
from lite_llm.layers import LayerFactory
from lite_llm.models import registry
from lite_llm.weights.rules import load
from tests.close import DEVICE, assert_close, exact_float32

TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=64, rms_norm_eps=1e-2, rope_theta=500.0, hidden_act="silu",
    tie_word_embeddings=False,
)  # fmt: skip
LLAMA = TINY | dict(architectures=["LlamaForCausalLM"], model_type="llama")
MISTRAL = TINY | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
QWEN2 = TINY | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
QWEN3 = TINY | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32)
WINDOWS = dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=4)
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES = {
    "llama": LLAMA,
    "llama-one-kv-head-each": LLAMA | dict(num_key_value_heads=4),
    "llama-one-kv-head": LLAMA | dict(num_key_value_heads=1),
    "llama-wide-heads": LLAMA | dict(head_dim=32),
    "llama-attention-bias": LLAMA | dict(attention_bias=True),
    "llama-mlp-bias": LLAMA | dict(mlp_bias=True),
    "llama-tied": LLAMA | dict(tie_word_embeddings=True),
    "mistral": MISTRAL,
    "mistral-window": MISTRAL | dict(sliding_window=5),
    "mistral-window-of-one": MISTRAL | dict(sliding_window=1),
    "qwen2": QWEN2,
    "qwen2-seven-heads-a-kv-head": QWEN2 | dict(hidden_size=224, num_attention_heads=14, tie_word_embeddings=True),
    "qwen2-late-windows": QWEN2 | WINDOWS | dict(max_window_layers=1),
    "qwen2-listed-windows": QWEN2 | WINDOWS | dict(max_window_layers=3, layer_types=[SLIDING, FULL, SLIDING]),
    "qwen2-unused-window": QWEN2 | WINDOWS | dict(max_window_layers=1, use_sliding_window=False),
    "qwen3": QWEN3,
    "qwen3-attention-bias": QWEN3 | dict(attention_bias=True, tie_word_embeddings=True),
    "qwen3-listed-windows": QWEN3 | WINDOWS | dict(layer_types=[FULL, SLIDING, FULL]),
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "yarn": YARN,
    "yarn-own-length": dict(rope_type="yarn", factor=2.0),
    "yarn-attention-factor": YARN | dict(attention_factor=0.7),
    "yarn-mscale": YARN | dict(mscale=0.707, mscale_all_dim=1.3),
    "yarn-one-mscale": YARN | dict(mscale=0.707),
    "yarn-untruncated": YARN | dict(truncate=False, beta_fast=8, beta_slow=0.5),
    "yarn-no-ramp": YARN | dict(beta_fast=0.2, beta_slow=0.2, truncate=False),
}
PROMPTS = (13, 1, 7, 10)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are fifty times slower when threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_rope(raw: dict, rope: dict, spelling: str) -> dict:
    """A config.json with `rope`, as transformers 5 writes it or as 4 did."""
    raw = raw | dict(max_position_embeddings=8) if rope["rope_type"] == "dynamic" else dict(raw)
    theta = raw.pop("rope_theta")
    if spelling == "v5":
        return raw | dict(rope_parameters=rope | dict(rope_theta=theta))
    old = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    return raw | dict(rope_theta=theta, rope_scaling=None if rope["rope_type"] == "default" else old)


def their_model(raw: dict) -> transformers.PreTrainedModel:
    """A float32 model of transformers with random weights. No bias is 0 and no norm is 1: a dropped one would hide."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return theirs


def our_model(raw: dict, theirs: torch.nn.Module) -> tuple[torch.nn.Module, ModelConfig]:
    """The same weights in our model, in the dtype and on the device of theirs."""
    cfg = registry.parse(HFConfig(copy.deepcopy(raw)))
    module, cls = registry.find(cfg.architecture)
    ours = cls(LayerFactory(theirs.dtype, theirs.device), cfg)
    state = theirs.state_dict()
    if cfg.tied_head:  # as files have it
        del state["lm_head.weight"]
    load(ours, module.RULES, state.items())
    return ours, cfg


def prompts_of(lengths: Iterable[int], device: torch.device | str = "cpu") -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, TINY["vocab_size"], (n,)).to(device) for n in lengths]


@torch.no_grad()
def their_logits(theirs: torch.nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    """[n, vocab] of each prompt; token by token where the rotation depends on how long the sequence is (NTK)."""
    if theirs.config.rope_parameters["rope_type"] != "dynamic":
        return [theirs(prompt[None]).logits[0] for prompt in prompts]
    logits = []
    for prompt in prompts:
        cache = transformers.DynamicCache(config=theirs.config)
        logits.append(torch.cat([theirs(t[None, None], past_key_values=cache).logits[0] for t in prompt]))
    return logits


@torch.no_grad()
def our_logits(ours: torch.nn.Module, cfg: ModelConfig, prompts: list[Tensor], seed: int = 0) -> list[Tensor]:
    """[n, vocab] of each prompt, cut into random chunks, mixed with decodes, over slots and table rows in any order.

    The last token of each chunk has its logits from a forward pass for last tokens alone, whose keys and values stay.
    """
    draw = torch.Generator().manual_seed(seed)
    first, device = next(ours.parameters()), prompts[0].device
    width = max(map(len, prompts)) + 2
    slots = (torch.randperm(len(prompts) * width, generator=draw) + 1).int().view(len(prompts), width).to(device)
    shape = (cfg.num_layers, len(prompts) * width + 1, cfg.kv_heads, cfg.head_dim)
    kv = KVPool(*(torch.full(shape, float("nan"), dtype=first.dtype, device=device) for _ in "kv"))
    rows = torch.randperm(len(prompts) + 2, generator=draw)[: len(prompts)]
    table = torch.full((len(prompts) + 2, width), PAD_SLOT, dtype=torch.int32, device=device)
    done = [0] * len(prompts)
    got = [torch.full((len(p), cfg.vocab), float("nan"), dtype=first.dtype, device=device) for p in prompts]
    while any(n < len(p) for n, p in zip(done, prompts, strict=True)):
        unfinished = [b for b in torch.randperm(len(prompts), generator=draw).tolist() if done[b] < len(prompts[b])]
        plan = []
        for b in unfinished[: 1 + int(torch.randint(0, len(prompts), (), generator=draw))]:
            n = int(torch.randint(1, 6, (), generator=draw)) if torch.rand((), generator=draw) < 0.6 else 1
            plan.append((b, done[b], min(done[b] + n, len(prompts[b]))))
        plan.sort(key=lambda piece: piece[2] - piece[1] > 1)  # who advances by one comes first
        for b, start, end in plan:
            table[rows[b], start:end] = slots[b, start:end]
        batch = batch_of(plan, prompts, table, rows)
        every, at = ours(dataclasses.replace(batch, logits_at=None), KVPool(kv.k.clone(), kv.v.clone())), 0
        for (b, start, end), last in zip(plan, ours(batch, kv), strict=True):
            got[b][start:end] = every[at : at + end - start]
            got[b][end - 1] = last
            done[b], at = end, at + end - start
    return got


def batch_of(plan: list, prompts: list[Tensor], table: Tensor, rows: Tensor) -> Batch:
    """Request b advances from `start` to `end` for each (b, start, end)."""
    device = table.device
    lengths = torch.tensor([end - start for _, start, end in plan])
    positions = torch.cat([torch.arange(start, end) for _, start, end in plan]).to(device)
    mine = rows[torch.tensor([b for b, _, _ in plan])]
    return Batch(
        tokens=torch.cat([prompts[b][start:end] for b, start, end in plan]),
        positions=positions,
        slots=table[mine.repeat_interleave(lengths).to(device), positions].long(),
        q_start=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        kv_len=torch.tensor([end for _, _, end in plan], dtype=torch.int32, device=device),
        table=table,
        rows=mine.int().to(device),
        logits_at=(lengths.cumsum(0) - 1).int().to(device),
        decodes=int((lengths == 1).sum()),
    )


def parity_error(raw: dict, lengths: Iterable[int] = PROMPTS, device: str = "cpu", seed: int = 0) -> float:
    """The largest difference of a logit between transformers and us, in float32."""
    theirs = their_model(raw).to(device)
    ours, cfg = our_model(raw, theirs)
    prompts = prompts_of(lengths, device)
    want, got = torch.cat(their_logits(theirs, prompts)), torch.cat(our_logits(ours, cfg, prompts, seed))
    assert 1 < want.abs().max() < 20, "logits too small or too large for the tolerance to mean anything"
    return (got - want).abs().nan_to_num(nan=float("inf")).max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family):
    assert parity_error(FAMILIES[family]) <= 1e-4


@pytest.mark.parametrize("spelling", ["v5", "v4"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_matches_transformers(rope, spelling):
    assert parity_error(with_rope(LLAMA, ROPES[rope], spelling)) <= 1e-4


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-late-windows", "qwen3"])
def test_rope_scaling_matches_in_the_other_families(family):
    assert parity_error(with_rope(FAMILIES[family], YARN, "v4")) <= 1e-4
    assert parity_error(with_rope(FAMILIES[family], ROPES["dynamic"], "v5")) <= 1e-4


@pytest.mark.parametrize("seed", range(1, 7))
def test_no_way_of_cutting_requests_changes_the_logits(seed):
    assert parity_error(QWEN3 | WINDOWS | dict(max_window_layers=1), (17, 3, 1, 9, 6), seed=seed) <= 1e-4


@pytest.mark.parametrize("family", ["llama-mlp-bias", "qwen2-seven-heads-a-kv-head", "qwen3-listed-windows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_that_of_transformers(family, dtype):
    check_half_precision(FAMILIES[family], dtype, "cpu")


def check_half_precision(raw: dict, dtype: torch.dtype, device: str) -> None:
    """At most twice their error against their float64, and the same first token wherever that is no coin flip."""
    theirs = their_model(raw).to(device)
    for parameter in theirs.parameters():  # `.to(dtype)` would round the rotation's frequencies too
        parameter.data = parameter.data.to(dtype)
    ours, cfg = our_model(raw, theirs)
    prompts = prompts_of(PROMPTS, device)
    got, same = torch.cat(our_logits(ours, cfg, prompts)), torch.cat(their_logits(theirs, prompts))
    exact = torch.cat(their_logits(theirs.double(), prompts))
    assert_close(got, same, exact, "logits")
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 4 * (got.double() - exact).abs().amax(-1)
    assert clear.sum() > len(clear) / 4  # else the next line would prove little: bf16 leaves few margins that wide
    assert torch.equal(got.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize(
    "family", ["llama-mlp-bias", "mistral-window", "qwen2-seven-heads-a-kv-head", "qwen3-listed-windows"]
)
def test_kernels_match_transformers(family):
    """In Triton's interpreter where there is no GPU: few tokens, for it is slow."""
    with ops.use("triton"):
        assert parity_error(FAMILIES[family], (7, 2), DEVICE) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_on_a_gpu(family):
    with exact_float32():
        assert parity_error(FAMILIES[family], (13, 1, 7, 40), "cuda") <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_that_of_transformers_on_a_gpu(family, dtype):
    check_half_precision(FAMILIES[family], dtype, "cuda")
