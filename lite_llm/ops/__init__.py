"""Every op of the framework, one line each. Read `ops/reference/` for what they mean."""

from lite_llm.ops import reference
from lite_llm.ops.dispatch import op, use

embed = op(reference.embed)
linear = op(reference.linear)
linear_add_ = op(reference.linear_add_)
project_qkv_ = op(reference.project_qkv_)
rms_norm = op(reference.rms_norm)
add_rms_norm_ = op(reference.add_rms_norm_)
layer_norm = op(reference.layer_norm)
silu_mul = op(reference.silu_mul)
gelu = op(reference.gelu)
rope_ = op(reference.rope_)
store_kv_ = op(reference.store_kv_)
rope_store_kv_ = op(reference.rope_store_kv_)
attend = op(reference.attend)
softmax = op(reference.softmax)
adjust_ = op(reference.adjust_)
sample = op(reference.sample)
decode_inputs_ = op(reference.decode_inputs_)
advance_ = op(reference.advance_)

__all__ = [
    "add_rms_norm_", "adjust_", "advance_", "attend", "decode_inputs_", "embed", "gelu", "layer_norm", "linear",
    "linear_add_", "project_qkv_", "rms_norm", "rope_", "rope_store_kv_", "sample", "silu_mul", "softmax", "store_kv_",
    "use",
]  # fmt: skip
