from lite_llm.layers.attention import Attention
from lite_llm.layers.embedding import Embedding, Head
from lite_llm.layers.factory import LayerFactory
from lite_llm.layers.linear import Linear
from lite_llm.layers.mlp import GatedMLP
from lite_llm.layers.norm import LayerNorm, RMSNorm
from lite_llm.layers.rope import RopeTable

__all__ = ["Attention", "Embedding", "GatedMLP", "Head", "LayerFactory", "LayerNorm", "Linear", "RMSNorm", "RopeTable"]
