"""Llama 1 to 3, Mistral, Qwen2, Qwen2.5 and Qwen3: pre-norm decoders with rotary GQA and a gated MLP.

They differ in facts of the checkpoint (biases, QK norm, windows, RoPE scaling), not in the graph.
"""

import torch
from torch import Tensor, nn

from lite_llm.batch import Batch, KVPool
from lite_llm.config import HFConfig, ModelConfig
from lite_llm.errors import UnsupportedModel, shown
from lite_llm.layers import Attention, Embedding, GatedMLP, Head, LayerFactory, Linear, RMSNorm, RopeTable
from lite_llm.rope import parse_rope
from lite_llm.weights.rules import Rules

RULES: Rules = {
    "model.embed_tokens.{w}": "embed.{w}",
    "model.layers.{i}.input_layernorm.{w}": "blocks.{i}.attn_norm.{w}",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,  # old Llama files store it; config.json decides
    "model.layers.{i}.self_attn.o_proj.{w}": "blocks.{i}.attn.out.{w}",
    "model.layers.{i}.self_attn.{p}_proj.{w}": "blocks.{i}.attn.qkv[{p}].{w}",
    "model.layers.{i}.self_attn.{p}_norm.{w}": "blocks.{i}.attn.{p}_norm.{w}",
    "model.layers.{i}.post_attention_layernorm.{w}": "blocks.{i}.mlp_norm.{w}",
    "model.layers.{i}.mlp.down_proj.{w}": "blocks.{i}.mlp.down.{w}",
    "model.layers.{i}.mlp.{p}_proj.{w}": "blocks.{i}.mlp.gate_up[{p}].{w}",
    "model.norm.{w}": "norm.{w}",
    "lm_head.{w}": "head.{w}",
}


def parse(hf: HFConfig) -> ModelConfig:
    """The facts of a config.json of this family. UnsupportedModel names the setting that we would compute wrongly."""
    architecture = hf.get(list, "architectures")[0]
    hf.expect("model_type", architecture.removesuffix("ForCausalLM").lower())
    layers, hidden = hf.between(int, "num_hidden_layers", 1, 4096), hf.size("hidden_size")
    heads = hf.between(int, "num_attention_heads", 1, hidden)
    llama = architecture == "LlamaForCausalLM"
    kv_heads = hf.size("num_key_value_heads", heads) if llama else hf.size("num_key_value_heads")
    head_dim = hf.size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else None)  # transformers' default
    if head_dim is None:
        if hidden % heads:
            raise UnsupportedModel(f"config.json: num_attention_heads = {heads} does not divide hidden_size = {hidden}")
        head_dim = hidden // heads
    hf.expect("hidden_act", "silu")
    hf.expect("is_causal", True)
    hf.expect("pretraining_tp", 1)  # more would sum partial matmuls in another order
    hf.expect("is_encoder_decoder", False)
    hf.expect("tie_encoder_decoder", False)
    hf.expect("is_decoder", False, True)
    hf.expect("add_cross_attention", False)
    hf.expect("cross_attention_hidden_size", None)
    bias = architecture != "MistralForCausalLM" and hf.get(bool, "attention_bias", False)
    qwen2 = architecture == "Qwen2ForCausalLM"
    rope, max_len = parse_rope(hf, head_dim, hf.size("max_position_embeddings"))
    hf.expect("dtype|torch_dtype", "float32", "bfloat16", "float16")
    return ModelConfig(
        architecture=architecture,
        num_layers=layers,
        hidden=hidden,
        ffn=hf.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=hf.size("vocab_size"),
        norm_eps=hf.get(float, "rms_norm_eps"),
        max_len=max_len,
        rope=rope,
        windows=_windows(hf, architecture, layers),
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=llama and hf.get(bool, "mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_head=hf.get(bool, "tie_word_embeddings", False),
        dtype=hf.get(str, "dtype|torch_dtype", "float32"),
    )


def _windows(hf: HFConfig, architecture: str, layers: int) -> tuple[int | None, ...]:
    """How far each layer looks back: Mistral's window holds for all layers, Qwen's for the later or listed ones."""
    if architecture == "LlamaForCausalLM":
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        hf.expect("layer_types", None)
        return (hf.size("sliding_window", None if "sliding_window" in hf else 4096),) * layers
    window, first = hf.size("sliding_window", None), hf.between(int, "max_window_layers", 0, 1 << 24, None)
    kinds = hf.get(list, "layer_types", None)
    if not hf.get(bool, "use_sliding_window", False):
        window, first = None, layers
    elif window is None or (kinds is None and first is None):
        raise UnsupportedModel("config.json: use_sliding_window without sliding_window and max_window_layers")
    if kinds is None:
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention")[: 1 if window is None else 2]:
            raise UnsupportedModel(
                f"config.json: layer_types has {shown(kind)}; supported: 'full_attention', and with use_sliding_window "
                "'sliding_attention'"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Block(nn.Module):
    def __init__(self, make: LayerFactory, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(make, cfg.hidden, cfg.norm_eps)
        self.attn = Attention(make, cfg, layer)
        self.mlp_norm = RMSNorm(make, cfg.hidden, cfg.norm_eps)
        self.mlp = GatedMLP(make, cfg.hidden, cfg.ffn, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch, kv: KVPool, rope: RopeTable, ahead: Linear | Head, last: bool) -> Tensor:
        """Both branches are added to the stream x [T, hidden] in place. `ahead` is the layer behind this block.

        The last one gives [B, hidden] if not all logits are wanted: of the other tokens nobody needs more than their
        keys and values.
        """
        q = self.attn.project_(kv, x, self.attn_norm, batch, rope)
        if last and batch.logits_at is not None:
            x, q = (t.index_select(0, batch.logits_at) for t in (x, q))  # x[...] would turn int32 into int64 first
            batch = batch.last()
        self.attn.add_(x, q, batch, kv, ahead=self.mlp.gate_up)
        return self.mlp.add_(x, self.mlp_norm, ahead)


class Llama(nn.Module):
    def __init__(self, make: LayerFactory, cfg: ModelConfig):
        super().__init__()
        self.embed = Embedding(make, cfg.vocab, cfg.hidden)
        self.rope = RopeTable(make, cfg.rope, cfg.max_len)
        self.blocks = nn.ModuleList(Block(make, cfg, i) for i in range(cfg.num_layers))
        self.norm = RMSNorm(make, cfg.hidden, cfg.norm_eps)
        self.head = Head(make, cfg.vocab, cfg.hidden)
        if cfg.tied_head:
            self.head.weight = self.embed.weight

    def forward(self, batch: Batch, kv: KVPool) -> Tensor:
        """Logits [B, vocab] of the tokens at `batch.logits_at`, or of all; K and V of all go to their slots."""
        x = self.embed(batch.tokens)
        if batch.features is not None:
            x = torch.where(batch.pictured[:, None], batch.features, x)
        following = [*(block.attn.qkv for block in self.blocks[1:]), self.head]
        for block, ahead in zip(self.blocks, following, strict=True):
            x = block(x, batch, kv, self.rope, ahead, last=block is self.blocks[-1])
        return self.head(x, self.norm)
