"""Find the fastest tiles of attention on this GPU: of prompts for its table, of flash-decoding to look at.

    python tools/tune_attention.py --prompts 512 2048 8192 [--shape llama-3.2-1b ...] [--minutes 5] [--out FILE]
    python tools/tune_attention.py [--shape llama-3.2-1b ...] [--tokens 1 8 16 64] [--context 512] [--minutes 5]

Prompts: the tile of the portable kernel that is fastest over all these lengths together, one prompt at a time, and then
whether Hopper's is faster still where it serves. A tile is checked against the reference before it may win; the table
in lite_llm/ops/triton/tuned/ is written after every shape, whose head dimension is what a row is for. Rows for few
pairs, and for steps with decodes, are not tuned here; those that may not stand beside what is found go.

Flash-decoding: what it costs depends on the kernels before and behind it, whose weights it shares the memory with, so
whole layers are timed; what it adds is the difference to the same layers without it. It prints and writes nothing, for
one row of the table serves all numbers of requests up to 128, and another one all above.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm.config import HFConfig
from lite_llm.models import registry, shapes
from lite_llm.ops.triton import tuning
from lite_llm.ops.triton.attention_tiles import flash_fits, hopper_serves
from lite_llm.ops.triton.gpu import capability
from lite_llm.ops.triton.tuning import AnyRow, AttendRow, Choice
from tools.chain import COLD, PARTS, Chain, Weights
from tools.prompts import Prompts
from tools.tune import Timer, distance, present, random_weights, run, shown, target

PART = "attention"
NONE = Choice("none", None)
GROUPS = (  # all combinations within one, one after the other, and again as long as something is found
    {"block_n": (32, 64, 128), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4)},
    {"programs": (1, 2, 3, 4, 6, 8), "least": (1, 2, 4, 8)},
    {"release": (0, 1, 2), "asked": (0, 1, 2, 4, 8)},
)
FLASH = {"block_m": (64, 128, 256), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    return run(tune_prompts if args.prompts else tune, args)


@torch.inference_mode()
def tune(args: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + 60 * args.minutes
    print(f"{torch.cuda.get_device_name(device)}: {args.minutes:g} minutes", flush=True)
    jobs = len(args.shape) * len(args.tokens)
    for shape in args.shape:
        weights = random_weights(shape, device, args.cold)
        for tokens in args.tokens:
            until = time.monotonic() + (end - time.monotonic()) / jobs
            jobs -= 1
            chain = Chain(weights, tokens, args.context, args.width)
            first = start(weights, tokens)
            choices = {part: present(weights, part, tokens) for part in PARTS} | {PART: first}
            timer = Timer(chain, choices, args.workers)
            found = search(timer, choices, until)
            before, after = costs(timer, choices, (first, found))
            name = f"{shape}, {tokens} tokens, {chain.context} keys"
            print(f"{name}: attention adds {before:.2f} us a layer as {shown(first)}", flush=True)
            print(f"{name}: attention adds {after:.2f} us a layer as {shown(found)}", flush=True)


@torch.inference_mode()
def tune_prompts(args: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + 60 * args.minutes
    gpu, (path, rows) = torch.cuda.get_device_name(device), target(device, args.out)
    print(f"{gpu}: {args.minutes:g} minutes; {path}", flush=True)
    for left, shape in zip(range(len(args.shape), 0, -1), args.shape):
        until = time.monotonic() + (end - time.monotonic()) / left
        cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
        prompts = Prompts(cfg, args.prompts, device, torch.bfloat16, int(args.cold * (1 << 30)))
        key = (cfg.head_dim, prompts.dtype.itemsize, prompts.window is not None)
        first = tuning.choose_attend(device, *key, tuning.ANY, False)
        flash = Choice("flash", first.tile)
        timer = Timer(prompts, {PART: flash}, args.workers)
        found = fastest_prompts(timer, flash, until)
        for choice in dict.fromkeys((first, flash, Choice("flash", found.tile), found)):
            told = ", ".join(
                f"{n:,} tokens {1e6 * s:.1f} us {prompts.flops(n) / s / 1e12:.0f} TFLOP/s"
                for n, s in prompts.seconds(choice).items()
            )
            when = " (before)" * (choice == first) + " (after)" * (choice == found)
            print(f"{shape}, head_dim {key[0]}{when}: {told} as {shown(choice)}", flush=True)
        rows, out = put(rows, AttendRow("attend", *key, tuning.ANY, False, found))
        for row in out:
            print(f"{shape}: out goes, as it may not stand beside it, {shown(row.choice)} for {row.pairs:,} pairs")
        tuning.write(path, gpu, rows)


def fastest_prompts(timer: Timer, flash: Choice, until: float) -> Choice:
    """The kernel and, whichever that is, the best tile of the portable one that is found until then."""
    prompts = timer.chain
    facts = (prompts.cfg.head_dim, prompts.dtype.itemsize, capability(prompts.device))
    fitting = [choice for choice in around(flash, FLASH) if choice != flash and flash_fits(choice.tile, *facts)]
    served, now = hopper_serves(*facts), time.monotonic()
    best = timer.better(PART, {PART: flash}, fitting, now + (until - now) * (0.8 if served else 1.0))
    hopper = Choice("hopper", best.tile)
    return timer.better(PART, {PART: best}, [hopper], until) if served else best


def put(rows: list[AnyRow], row: AttendRow) -> tuple[list[AnyRow], list[AnyRow]]:
    """The rows with one more, or another in its place; and those that may not stand beside it, which are out."""
    others = [other for other in rows if other[:-1] != row[:-1]]
    out = [other for other in others if other[:4] == row[:4] and not tuning.alike(other, row)]
    return [other for other in others if other not in out] + [row], out


def start(weights: Weights, tokens: int) -> Choice:
    """What `decode` does when it is told nothing."""
    tile = tuning.choose_decode(weights.device, weights.cfg.head_dim, weights.dtype.itemsize, tokens)
    return Choice("decode", tile)


def search(timer: Timer, choices: dict[str, Choice], until: float) -> Choice:
    tried = {choices[PART]}
    while time.monotonic() < until:
        best = choices[PART]
        for left, group in zip(range(len(GROUPS), 0, -1), GROUPS):
            fresh = [c for c in around(choices[PART], group) if c not in tried]
            now = time.monotonic()
            stop = now + (until - now) / left
            tried |= set(fresh)
            choices = choices | {PART: timer.better(PART, choices, fresh, stop)}
        if choices[PART] == best:
            break
    return choices[PART]


def around(choice: Choice, group: dict[str, tuple[int, ...]]) -> list[Choice]:
    """All combinations of some fields, the nearest first."""
    found = [choice.tile._replace(**dict(zip(group, values))) for values in itertools.product(*group.values())]
    return [Choice(choice.kernel, tile) for tile in sorted(found, key=lambda tile: distance(tile, choice.tile))]


def costs(timer: Timer, choices: dict[str, Choice], variants: tuple[Choice, ...], rounds: int = 15) -> list[float]:
    """Microseconds that attention adds to a layer; samples alternate, for clocks and temperature drift."""
    graphs = [timer.graph(choices | {PART: variant}, PART) for variant in (NONE, *variants)]
    samples = [[timer.sample(graph) for graph in graphs] for _ in range(rounds)]
    layers = len(timer.chain.weights.layers)
    return [1e6 * statistics.median(row[i] - row[0] for row in samples) / layers for i in range(1, len(variants) + 1)]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["llama-3.2-1b"], choices=shapes.shape_names(), metavar="NAME")
    parser.add_argument("--prompts", nargs="+", type=int, metavar="N", help="tune prompts of so many tokens")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64], metavar="N")
    parser.add_argument("--context", type=int, default=512, help="keys that each request sees (at most 1024)")
    parser.add_argument("--width", type=int, default=4096, help="keys that the engine's longest request may see")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything together")
    parser.add_argument("--cold", type=float, default=COLD / (1 << 30), help="GiB of weights: more layers in the chain")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="threads that compile")
    parser.add_argument("--out", type=Path, help="of --prompts: another file than this GPU's table")
    args = parser.parse_args(arguments)
    if args.prompts and min(args.prompts) < 1:
        parser.error(f"--prompts {min(args.prompts)}: expected 1 token or more")
    return args


if __name__ == "__main__":
    sys.exit(main())
