"""Small checkpoints for the tests of the loader and the converter."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lite_llm.config import HFConfig
from lite_llm.layers import LayerFactory
from lite_llm.models import registry
from lite_llm.models.shapes import shape_config
from lite_llm.weights.random import random_hf_tensors


def tensors_of(config, dtype=torch.bfloat16):
    return dict(random_hf_tensors(config, 0, dtype))


def write(directory, config, tensors=None, shards=1):
    """A Hugging Face directory; the tensors are dealt out to the shards in turn."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text("{}")
    tensors = tensors_of(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def build(directory, dtype=torch.bfloat16, device="cpu"):
    """The model of a directory, not yet filled, and its rules."""
    cfg = registry.parse(HFConfig.load(Path(directory)))
    module, model = registry.find(cfg.architecture)
    return model(LayerFactory(dtype, device), cfg), module.RULES


def config_of(shape="tiny-llama-3.2-1b", **facts):
    return {**shape_config(shape), "num_hidden_layers": 1, "dtype": "bfloat16", **facts}


def bits(model):
    return {name: param.view(torch.int16).clone() for name, param in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
