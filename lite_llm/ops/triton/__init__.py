"""The same ops as `ops/reference`, as Triton kernels."""

from lite_llm.ops.triton.activation import gelu, silu_mul
from lite_llm.ops.triton.adjust import adjust_
from lite_llm.ops.triton.attention import attend
from lite_llm.ops.triton.embedding import embed
from lite_llm.ops.triton.kv import store_kv_
from lite_llm.ops.triton.linear import linear, linear_add_, project_qkv_
from lite_llm.ops.triton.norm import add_rms_norm_, layer_norm, rms_norm
from lite_llm.ops.triton.rope import rope_, rope_store_kv_
from lite_llm.ops.triton.sampling import sample
from lite_llm.ops.triton.softmax import softmax
from lite_llm.ops.triton.state import advance_, decode_inputs_

__all__ = [
    "add_rms_norm_", "adjust_", "advance_", "attend", "decode_inputs_", "embed", "gelu", "layer_norm", "linear",
    "linear_add_", "project_qkv_", "rms_norm", "rope_", "rope_store_kv_", "sample", "silu_mul", "softmax", "store_kv_",
]  # fmt: skip
