from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lite_llm.rope import Rope

if TYPE_CHECKING:
    from lite_llm.layers.factory import LayerFactory


class RopeTable(nn.Module):
    """cos and sin of every position that the model serves; one for all layers. fp32 whatever the model's dtype."""

    def __init__(self, make: LayerFactory, rope: Rope, max_len: int):
        super().__init__()
        for name, table in zip(("cos", "sin"), rope.tables(max_len), strict=True):
            self.register_buffer(name, table.to(make.device), persistent=False)
