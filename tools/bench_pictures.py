"""Time a LLaVA model on this machine: its tower, the first token behind a picture, and decoding, against transformers.

    python tools/bench_pictures.py [--shape llava-1.5-7b] [--text 64] [--rounds 7] [--json FILE]

Both sides have the same random weights and get the same ids and the same prepared pixels; rounds alternate and medians
are given. A first token is timed by the clock, from the call to the token, no prefix cached and no picture seen before.
Nothing counts before both sides choose the same token, up to rounding: else the exit code is 1. The floor is the
matmuls of prompt, tower and projector at the rate of a large matmul in the same run. Without a GPU, use a tiny shape.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM, SamplingParams
from lite_llm.engine.request import Tiles
from lite_llm.engine.roofline import Ceilings, seconds
from lite_llm.engine.vision import MOST_TILES
from lite_llm.errors import LiteLLMError
from lite_llm.models import shapes, tiling
from lite_llm.prompts import Encoded
from lite_llm.weights.random import random_hf_tensors
from tools.benchmark.limits import prompt_flops
from tools.environment import environment

NEAR = 0.25  # nats that a token may be below the best: what rounding moves logits of bf16
SIZE = 336, 336  # height and width of the pictures
DECODED = 64  # tokens of the answers whose rate is told
SEED = 0


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        record = environment() | {"shape": args.shape, "dtype": str(dtype).removeprefix("torch."), "picture": SIZE}
        roof = Ceilings.measure(torch.device(args.device), dtype)
        record |= {"matmul_tflops": roof.matmul / 1e12, "copy_tb_s": roof.copy / 1e12}
        record |= measure(args.shape, args.device, dtype, roof, args.text, args.rounds)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    Console(width=120).print(*tables(record))
    return int(record["wrong"] is not None)


@torch.inference_mode()
def measure(shape: str, device: str, dtype: torch.dtype, roof: Ceilings, text: int, rounds: int) -> dict:
    raw = shapes.shape_config(shape)
    theirs = their_model(raw, device, dtype)
    name = str(dtype).removeprefix("torch.")
    options = dict(device=device, dtype=name, max_requests=4, kv_tokens=8192 if device == "cuda" else 1024)
    with LLM(shape=shape, random_weights=True, seed=SEED, prefix_cache=False, **options) as llm:
        tower = tower_times(llm)
        tokens = tiling.tokens(llm.cfg.vision, SIZE)
        draw = np.random.default_rng(SEED)
        cases, wrong = [], None
        for pictures, length in ((1, text), (0, text + tokens), (2, text)):
            asks = [ask(llm, draw, pictures, length) for _ in range(rounds + 1)]
            wrong = wrong or judge(llm, theirs, asks[0])
            ours, others = zip(
                *((first_token(llm, each), their_first_token(theirs, each)) for each in asks), strict=True
            )
            work = flops(llm.engine.model, llm.cfg, asks[0])
            cases.append({
                "pictures": pictures, "tokens": len(asks[0].ids), "floor_ms": work / roof.matmul * 1e3,
                "ms": statistics.median(ours[1:]), "ms_rounds": ours[1:],
                "transformers_ms": statistics.median(others[1:]), "transformers_ms_rounds": others[1:],
                "tokens_per_second": rate(llm, asks[0]),
            })  # fmt: skip
    return {"tower": tower, "cases": cases, "wrong": wrong}


def ask(llm: LLM, draw: np.random.Generator, pictures: int, text: int) -> Encoded:
    """Random pictures behind a first token, then random text."""
    cfg = llm.cfg.vision
    ids, placed = [1], []
    for _ in range(pictures):
        shape = tiling.tiles(cfg, SIZE), 3, cfg.image_size, cfg.image_size
        tiles = Tiles(draw.normal(size=shape).astype(np.float32), SIZE, tiling.tokens(cfg, SIZE))
        placed.append((len(ids), tiles))
        ids += [cfg.image_token] * tiles.tokens
    words = draw.integers(0, llm.cfg.vocab, text - 1)
    words[words == cfg.image_token] -= 1
    return Encoded([*ids, *words.tolist()], tuple(placed))


def first_token(llm: LLM, prompt: Encoded) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return (time.perf_counter() - start) * 1e3


def rate(llm: LLM, prompt: Encoded) -> float:
    output = llm.generate(prompt, SamplingParams(max_tokens=DECODED, temperature=0.0, ignore_eos=True))
    return output.timings.tokens_per_second


def their_first_token(model: nn.Module, prompt: Encoded) -> float:
    """Milliseconds of `generate`; ids and pixels come from the CPU, as on our side."""
    start = time.perf_counter()
    inputs = their_inputs(model, prompt)
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None).tolist()
    return (time.perf_counter() - start) * 1e3


def their_inputs(model: nn.Module, prompt: Encoded) -> dict[str, torch.Tensor]:
    ids = torch.tensor([prompt.ids], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.pictures:
        pixels = [torch.from_numpy(tiles.pixels).to(model.device, model.dtype) for _, tiles in prompt.pictures]
        one_five = model.config.model_type == "llava"
        inputs["pixel_values"] = torch.cat(pixels) if one_five else torch.stack(pixels)
        if not one_five:
            inputs["image_sizes"] = torch.tensor([tiles.size for _, tiles in prompt.pictures], device=model.device)
    return inputs


def their_model(raw: dict, device: str, dtype: torch.dtype) -> nn.Module:
    """transformers' model with the tensors that `LLM` draws."""
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    left = dict(model.named_parameters())
    for name, tensor in random_hf_tensors(raw, SEED, dtype, device):
        place = left.pop(_their_name(name, left), None)
        if place is not None:  # the norm behind the tower has no place in some versions, and no use in any
            place.data.copy_(tensor)
    if left:
        raise RuntimeError(f"transformers' model has parameters that were not drawn: {sorted(left)[:3]}")
    return model


def _their_name(name: str, known: dict) -> str:
    """The module's name for a name of files."""
    new = f"model.{name}"
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        new = f"model.language_model.{inner.removeprefix('model.')}" if inner.startswith("model.") else inner
    return new if new in known else new.replace("vision_tower.vision_model.", "vision_tower.")


def judge(llm: LLM, model: nn.Module, prompt: Encoded) -> str | None:
    """What is wrong with our first token, if transformers knows much better ones."""
    [choice] = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)).choices
    logits = model(**their_inputs(model, prompt), logits_to_keep=1).logits[0, -1].float()
    gap = (logits.max() - logits[choice.token_ids[0]]).item()
    if gap <= NEAR:
        return None
    return f"with {len(prompt.pictures)} pictures the first token is {gap:.2f} nats below transformers' best"


def tower_times(llm: LLM) -> list[dict]:
    """Milliseconds of tower and projector by number of tiles, pixels on the device; on a GPU as the graphs they are."""
    encoder, found = llm.engine.runner.encoder, []
    for tiles in (1, 2, 4, MOST_TILES):
        pixels = encoder._blank(tiles)
        with llm.engine._on_stream():
            found.append({"tiles": tiles, "ms": seconds(lambda: encoder._run(pixels), encoder.device) * 1e3})  # noqa: B023
    return found


def flops(model: nn.Module, cfg, prompt: Encoded) -> float:
    """Of the matmuls and the attention behind a first token."""
    total = prompt_flops(cfg, len(prompt.ids))
    tiles = sum(len(picture) for _, picture in prompt.pictures)
    seen, layers = 1 + cfg.vision.side**2, max(cfg.vision.feature_layers)
    tower = 2 * seen * _numbers(model.vision.blocks[:layers]) + 4 * layers * cfg.vision.hidden * seen * seen
    patches = 2 * (seen - 1) * model.vision.patch.weight.numel()
    projector = 2 * cfg.vision.tile_features * (_numbers([model.projector]))
    return total + tiles * (tower + patches + projector)


def _numbers(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)


def tables(record: dict) -> list[Table]:
    made = Table(title=f"{record.get('gpu', record['cpu_name'])}, {record['shape']}, {record['dtype']}, random weights")
    for name in ("pictures", "tokens", "first token, ms", "transformers", "times", "floor", "of it", "then tokens/s"):
        made.add_column(name, justify="right")
    for case in record["cases"]:
        ms, other, floor = case["ms"], case["transformers_ms"], case["floor_ms"]
        cells = f"{ms:.2f}", f"{other:.2f}", f"{other / ms:.2f}", f"{floor:.2f}", f"{floor / ms:.0%}"
        made.add_row(f"{case['pictures']}", f"{case['tokens']}", *cells, f"{case['tokens_per_second']:.0f}")
    made.caption = record["wrong"] or "first tokens are transformers' own, up to rounding"
    tower = Table(title="tower and projector")
    for entry in record["tower"]:
        tower.add_column(f"{entry['tiles']} tiles", justify="right")
    tower.add_row(*(f"{entry['ms']:.3f} ms" for entry in record["tower"]))
    return [made, tower]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    named = [name for name in shapes.shape_names() if "llava" in name]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", default="llava-1.5-7b" if gpu else "tiny-llava-1.5-7b", choices=named, metavar="NAME"
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--text", type=int, default=64, help="tokens beside the pictures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.text < 2 or args.rounds < 1:
        parser.error("--text must be at least 2, --rounds at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
