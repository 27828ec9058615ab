"""Weight formats, by the `quant_method` of a checkpoint's `quantization_config`."""

from lite_llm.errors import UnsupportedModel
from lite_llm.quant.base import Spec, Stored, WeightFormat
from lite_llm.quant.dense import Dense

__all__ = ["Dense", "Spec", "Stored", "WeightFormat", "format_of"]


def format_of(quantization_config: dict | None) -> WeightFormat:
    """The format a checkpoint is stored in. UnsupportedModel for a quantized one."""
    if quantization_config is None:
        return Dense()
    raise UnsupportedModel(
        f"config.json: quantization_config.quant_method = {quantization_config.get('quant_method')!r}",
        "only unquantized checkpoints (bf16, fp16, fp32) are supported",
    )
