"""Find the fastest tiles of flash-decoding on this GPU, in its place in a chain of layers; they go into decode.tiles.

    python tools/tune_attention.py [--shape llama-3.2-1b ...] [--tokens 1 8 16 64] [--context 512] [--minutes 5]

What attention costs depends on the kernels before and behind it, whose weights it shares the memory with, so whole
layers are timed; what it adds is the difference to the same layers without it. It prints and writes nothing.
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

from lite_llm.models import shapes
from lite_llm.ops.triton.decode import capability, tiles
from lite_llm.ops.triton.tuning import Choice
from tools.chain import COLD, PARTS, Chain, Weights
from tools.tune import Timer, distance, present, random_weights, run, shown

PART = "attention"
NONE = Choice("none", None)
GROUPS = (  # all combinations within one, one after the other, and again as long as something is found
    {"block_n": (32, 64, 128), "num_warps": (1, 2, 4, 8), "num_stages": (2, 3, 4)},
    {"programs": (1, 2, 3, 4, 6, 8), "least": (1, 2, 4, 8)},
    {"release": (0, 1, 2), "asked": (0, 1, 2, 4, 8)},
)


def main(arguments: list[str] | None = None) -> int:
    return run(tune, _arguments(arguments))


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


def start(weights: Weights, tokens: int) -> Choice:
    """What `decode` does when it is told nothing."""
    return Choice("decode", tiles(weights.cfg.head_dim, weights.dtype.itemsize, capability(weights.device), tokens))


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
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64], metavar="N")
    parser.add_argument("--context", type=int, default=512, help="keys that each request sees (at most 1024)")
    parser.add_argument("--width", type=int, default=4096, help="keys that the engine's longest request may see")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything together")
    parser.add_argument("--cold", type=float, default=COLD / (1 << 30), help="GiB of weights: more layers in the chain")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="threads that compile")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
