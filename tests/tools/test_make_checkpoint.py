"""tools/make_checkpoint.py: what it writes opens everywhere."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from lite_llm.weights import load_weights, open_checkpoint
from tests.weights.tiny import build
from tools import make_checkpoint


def run(*arguments):
    return make_checkpoint.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("shape", ["tiny-llama-3.2-1b", "tiny-qwen3-8b"])
def test_transformers_and_we_open_it(shape, tmp_path):
    assert run(shape, tmp_path / "one") == 0 == run(shape, tmp_path / "many", "--shard-size", "200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    models = []
    for directory in (tmp_path / "one", tmp_path / "many"):
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        ours, rules = build(directory)
        load_weights(ours, open_checkpoint(directory), rules)
        models.append(ours)
        assert torch.equal(ours.norm.weight, model.model.norm.weight)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
    size = max(path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors"))
    assert size < 300_000


def test_its_tokenizer_knows_its_template_and_any_text(tmp_path):
    assert run("tiny-qwen2.5-0.5b", tmp_path / "model", "--dtype", "float32", "--seed", "7") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["eos_token_id"] == tokenizer.eos_token_id
    assert len(tokenizer) <= config["vocab_size"]
    for text in ("attention and memory", "žluťoučký kůň 🐎\n\ttab", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_seed_decides_the_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("tiny-llama-2-7b", tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_errors_are_one_line_and_an_exit_code(tmp_path, capsys):
    assert run("gpt-5", tmp_path / "out") == 2
    assert run("tiny-llama-2-7b", tmp_path / "out", "--shard-size", "many") == 2
    assert run("tiny-llama-2-7b", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["tiny-llava-1.5-7b", "tiny-llava-1.6-mistral-7b"])
def test_a_processor_of_transformers_and_our_model_agree_on_pictures(shape, tmp_path):
    directory = tmp_path / "model"
    assert run(shape, directory, "--dtype", "float32") == 0
    theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(directory)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    picture = Image.effect_mandelbrot((91, 40), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    sizes = [tuple(size) for size in inputs.get("image_sizes", torch.tensor([[40, 91]])).tolist()]
    ours, rules = build(directory, torch.float32)
    load_weights(ours, open_checkpoint(directory), rules)
    with torch.no_grad():
        (got,) = ours.encode(inputs["pixel_values"].flatten(0, -4), sizes)
        assert (inputs["input_ids"] == ours.cfg.image_token).sum() == len(got)
        more = {"image_sizes": inputs["image_sizes"]} if "1.6" in shape else {}
        (want,) = theirs.get_image_features(inputs["pixel_values"], **more).pooler_output
    assert (got - want).abs().max() < 1e-4
