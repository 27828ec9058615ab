"""Write a whole Hugging Face directory with random weights in the shape of a known model: for tests and benchmarks.

    python tools/make_checkpoint.py llama-3.2-1b OUT [--dtype bfloat16] [--seed 0] [--shard-size 5GB]

The tokenizer is a small byte-level BPE trained here; config.json keeps the shape's vocabulary size.
"""

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lite_llm.errors import LiteLLMError, UsageError  # noqa: E402
from lite_llm.models.shapes import shape_config, shape_names  # noqa: E402
from lite_llm.weights.files import INDEX, SINGLE  # noqa: E402
from lite_llm.weights.publish import new_directory  # noqa: E402
from lite_llm.weights.random import hf_shapes, random_hf_tensors  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (  # of a message that is text, or a list of parts, some of them pictures
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TEXT = """A model is a function from the tokens so far to the odds of the token that comes next. The weights of this one
are random, so that its answers mean nothing; but it is as large, as deep and as fast as the model it is named after.
One request waits, two requests run; some prompts are short and others fill the whole context. Numbers such as 0, 1,
2, 16, 128 and 2048, words such as attention, memory, bandwidth, cache, kernel, layer, head and rotation, and signs
such as (a + b) * c = d; [x, y]; {"key": "value"} are common in what people ask. The capital of France is Paris."""


def make_checkpoint(
    shape: str, out: Path, dtype: str, seed: int, shard_bytes: int, device: str = "cpu", all_ids: bool = False
) -> None:
    """`out` must not exist; it appears when it is whole. A GPU draws other weights from a seed than a CPU. With
    `all_ids` the tokenizer has a word for each id of the model, and an answer of any ids is text."""
    config = {**shape_config(shape), "dtype": dtype}
    text, pictures = config.get("text_config", config), "vision_config" in config
    tokenizer = train_tokenizer(min(text["vocab_size"], 512), [START, END, PAD] + [IMAGE] * pictures)
    if all_ids:
        tokenizer = with_words(tokenizer, text["vocab_size"])
    start, end, pad = (tokenizer.token_to_id(token) for token in (START, END, PAD))
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
    config |= ids
    if pictures:
        text = {**text, **ids, "dtype": dtype}
        config |= {"text_config": text, "image_token_index": tokenizer.token_to_id(IMAGE)}
    with new_directory(out) as partial:
        write_json(partial / "config.json", config)
        write_json(
            partial / "generation_config.json",
            {**ids, "do_sample": False},
        )
        write_tokenizer(partial, tokenizer, text["max_position_embeddings"], pictures)
        if pictures:
            write_processor(partial, config)
        write_weights(partial, config, DTYPES[dtype], seed, shard_bytes, device)


def train_tokenizer(vocab: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer


def with_words(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """The same tokenizer with words of no meaning for the ids up to `vocab`; no text is cut into them."""
    facts = json.loads(tokenizer.to_str())
    known = tokenizer.get_vocab_size()
    facts["model"]["vocab"] |= {f"\u0120w{token}": token for token in range(known, vocab)}  # \u0120 is a space
    return Tokenizer.from_str(json.dumps(facts))


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int, pictures: bool = False) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    template = TEMPLATE.replace("{{ message['content'] }}", PARTS) if pictures else TEMPLATE
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
            **({"image_token": IMAGE, "extra_special_tokens": {"image_token": IMAGE}} if pictures else {}),
        },
    )


def write_processor(directory: Path, config: dict[str, Any]) -> None:
    """As the published checkpoints have it: CLIP's mean and deviation, and for LLaVA-NeXT its resolutions."""
    size, tiled = config["vision_config"]["image_size"], config["model_type"] == "llava_next"
    kind = "LlavaNext" if tiled else "Llava"
    pictures = {
        "image_processor_type": "LlavaNextImageProcessor" if tiled else "CLIPImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    if tiled:
        pictures |= {"do_pad": True, "image_grid_pinpoints": config["image_grid_pinpoints"]}
    write_json(directory / "preprocessor_config.json", pictures)
    write_json(
        directory / "processor_config.json",
        {
            "processor_class": f"{kind}Processor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        },
    )


def write_weights(
    directory: Path, config: dict[str, Any], dtype: torch.dtype, seed: int, shard_bytes: int, device: str = "cpu"
) -> None:
    """Tensors in order, a new file whenever the next one would pass `shard_bytes`."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in hf_shapes(config).items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    tensors, weight_map = random_hf_tensors(config, seed, dtype, device), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        shard = dict(itertools.islice(tensors, len(names)))
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes it private
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or "1000"."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if not match or not int(match[1]):
        raise UsageError(f"--shard-size = {text!r}; expected a size such as 5GB, 200MB or a number of bytes")
    return int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"shapes: {', '.join(shape_names())}",
    )
    parser.add_argument("shape", metavar="SHAPE", help="a model's name, or tiny-NAME")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="5GB", help="largest weight file, unless one tensor is larger")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    try:
        shard_bytes = parse_size(options.shard_size)
        make_checkpoint(options.shape, options.out, options.dtype, options.seed, shard_bytes)
    except LiteLLMError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
