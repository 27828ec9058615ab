"""Every supported architecture, one line each."""

import importlib

from lite_llm.config import HFConfig, ModelConfig
from lite_llm.errors import UnsupportedModel, shown
from lite_llm.quant import format_of

MODELS = {
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Llama",
    "Qwen2ForCausalLM": "llama:Llama",
    "Qwen3ForCausalLM": "llama:Llama",
    "LlavaForConditionalGeneration": "llava:Llava",
    "LlavaNextForConditionalGeneration": "llava:Llava",
}


def find(architecture: str):
    """The module and class that implement an architecture of `config.json`."""
    if architecture not in MODELS:
        raise UnsupportedModel(f"{architecture} is not supported; supported: {', '.join(MODELS)}")
    module, name = MODELS[architecture].split(":")
    module = importlib.import_module(f"lite_llm.models.{module}")
    return module, getattr(module, name)


def parse(hf: HFConfig) -> ModelConfig:
    """What a config.json describes. UnsupportedModel for anything that we would not compute as its author meant."""
    architectures = hf.get(list, "architectures")
    if len(architectures) != 1 or type(architectures[0]) is not str or not architectures[0].isidentifier():
        raise UnsupportedModel(f"config.json: architectures = {shown(architectures)}; expected one name")
    module, _ = find(architectures[0])
    format_of(hf.get(dict, "quantization_config", None))
    cfg = module.parse(hf)
    hf.finish()
    return cfg
