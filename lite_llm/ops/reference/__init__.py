"""The specification of every op, in plain PyTorch: slow, obvious, and always right."""

from lite_llm.ops.reference.activation import gelu, silu_mul
from lite_llm.ops.reference.attention import attend, store_kv_
from lite_llm.ops.reference.embedding import embed
from lite_llm.ops.reference.linear import linear, linear_add_, project_qkv_
from lite_llm.ops.reference.norm import add_rms_norm_, layer_norm, rms_norm
from lite_llm.ops.reference.rope import rope_, rope_store_kv_
from lite_llm.ops.reference.sampling import adjust_, sample
from lite_llm.ops.reference.softmax import softmax
from lite_llm.ops.reference.state import advance_, decode_inputs_

__all__ = [
    "add_rms_norm_", "adjust_", "advance_", "attend", "decode_inputs_", "embed", "gelu", "layer_norm", "linear",
    "linear_add_", "project_qkv_", "rms_norm", "rope_", "rope_store_kv_", "sample", "silu_mul", "softmax", "store_kv_",
]  # fmt: skip
