"""Every op of the framework, one line each. Read `ops/reference/` for what they mean."""

from lite_llm.ops.dispatch import op, use
from lite_llm.ops.reference import activation, attention, embedding, linear, norm, rope, sampling, softmax

embed = op(embedding.embed)
linear = op(linear.linear)
rms_norm = op(norm.rms_norm)
add_rms_norm_ = op(norm.add_rms_norm_)
silu_mul = op(activation.silu_mul)
rope_ = op(rope.rope_)
store_kv_ = op(attention.store_kv_)
rope_store_kv_ = op(rope.rope_store_kv_)
attend = op(attention.attend)
softmax = op(softmax.softmax)
penalize_ = op(sampling.penalize_)
sample = op(sampling.sample)

__all__ = [
    "add_rms_norm_", "attend", "embed", "linear", "penalize_", "rms_norm", "rope_", "rope_store_kv_",
    "sample", "silu_mul", "softmax", "store_kv_", "use",
]  # fmt: skip
