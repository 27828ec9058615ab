"""Find the fastest tiles of the matmul kernels on this GPU and write them to its table in lite_llm/ops/triton/tuned/.

    python tools/tune.py [--shape llama-3.2-1b ...] [--tokens 1 8 ...] [--minutes 10] [--out FILE]
    python tools/tune.py --quick --tokens 128 256 512 1024 2048 4096 --parts qkv gate_up --context 1    for prompts

A kernel is never timed by itself: it runs in its place in a chain of layers, attention included, replayed as a CUDA
graph, because what it costs depends on how it overlaps with its neighbours. One tile is varied at a time, beginning
with what the table says now; a winner is checked against plain torch, and the table is written after every matmul, so
that a run which is cut short has done something.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm.config import HFConfig
from lite_llm.engine.roofline import copy_rate
from lite_llm.errors import LiteLLMError
from lite_llm.models import registry, shapes
from lite_llm.ops.triton import gemv, skinny, tuning, wide
from lite_llm.ops.triton.gpu import capability
from lite_llm.ops.triton.tuning import CUBLAS, Choice, Row
from tools.chain import COLD, PARTS, Chain, Weights
from tools.prompts import Prompts

SHAPES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b")
TOKENS = (1, 2, 4, 8, 16, 32, 64)
MOST_DECODING = 256  # more tokens are a prompt's; what decoding requests' attention would cost there says nothing
WIDE = 32  # for as many tokens or fewer the kernel for many is not tried
WIDE_STARTS = (  # tokens, rows of the weight, columns, warps, stages: what has won somewhere
    (64, 64, 128, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4),
)  # fmt: skip
REPLAYS, DROP, KEEP = 6, 1.02, 0.9985  # of a sample; slower is not looked at again; what counts as faster

GRIDS = {  # tried in all combinations that fit, the nearest to the present tile first
    "gemv": {"rows": (1, 2, 4, 8, 16), "columns": (512, 1024, 2048, 4096), "warps": (1, 2, 4, 8)},
    "skinny": {"rows": (16, 32, 64, 128), "columns": (64, 128, 256), "warps": (2, 4, 8), "splits": (1, 2, 4, 8)},
    "wide": {
        "tokens": (64, 128, 256), "rows": (32, 64, 128, 256), "columns": (64, 128), "warps": (4, 8),
        "splits": (1, 2, 4, 8),
    },
}  # fmt: skip
FIELDS = {  # tried one after the other, once the grid has a winner
    "gemv": {
        "ahead": (0, 1 << 21, 1 << 22, 1 << 23, 1 << 24, 3 << 23), "evict_first": (False, True), "release": (0, 1, 2),
        "own": (0, 256, 512, 1024, 2048, 4096),
    },
    "skinny": {
        "stages": (2, 3, 4, 5, 6), "fuse_norm": (False, True), "own": (0, 128, 256, 512, 1024, 2048),
        "tokens": (8, 16, 32, 64, 128), "ahead": (0, 1 << 20, 1 << 22, 1 << 23, 1 << 24), "release": (0, 1, 2),
    },
    "wide": {
        "stages": (2, 3, 4, 5, 6), "tma": (False, True), "own": (0, 64, 128, 256, 512, 1024),
        "ahead": (0, 1 << 22, 1 << 23, 1 << 24, 3 << 23), "release": (0, 1, 2),
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return run(tune, _arguments(arguments))


def run(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """The exit code of work that needs a GPU."""
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use", file=sys.stderr)
        return 3
    try:
        work(args)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@torch.inference_mode()
def tune(args: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    end = time.monotonic() + 60 * args.minutes
    gpu, copy = torch.cuda.get_device_name(device), copy_rate(device)
    path, rows = target(device, args.out)
    print(f"{gpu}: copy {copy / 1e12:.2f} TB/s; {args.minutes:g} minutes; {path}", flush=True)
    jobs = len(args.shape) * len(args.tokens)
    for shape in args.shape:
        weights = random_weights(shape, device, args.cold)
        hints: dict[str, Choice] = {}
        for tokens in args.tokens:
            stop = time.monotonic() + (end - time.monotonic()) / jobs
            jobs -= 1
            chain, name = Chain(weights, tokens, args.context), f"{shape}, {tokens} tokens"
            choices = {part: present(weights, part, tokens) for part in PARTS}
            if tokens > MOST_DECODING:
                choices["attention"] = Choice("none", None)
            timer = Timer(chain, choices, args.workers)
            print(f"{name}: {timer.summary(choices, copy)}", flush=True)
            parts = [part for part in PARTS if part in args.parts and tokens >= weights.least(part)]
            parts *= args.rounds
            for left, part in zip(range(len(parts), 0, -1), parts):
                until = time.monotonic() + (stop - time.monotonic()) / left
                found = search(timer, part, choices, hints.get(part), until, args.quick)
                if found != choices[part]:
                    print(f"{name}, {part}: {timer.told(part, choices, found)}", flush=True)
                hints[part] = choices[part] = found
                rows = put(rows, weights, part, tokens, found)
                tuning.write(path, gpu, rows)
            print(f"{name}: {timer.summary(choices, copy)}", flush=True)


def target(device: torch.device, out: Path | None) -> tuple[Path, list[tuning.AnyRow]]:
    """Where to write, and the rows to begin with: of that file, else of this GPU's table, else of the default one."""
    used = tuning.TABLES / f"{tuning.file_name(device)}.json"
    path = out or used
    return path, tuning.read(next(p for p in (path, used, tuning.TABLES / "default.json") if p.exists()))


def random_weights(shape: str, device: torch.device, cold: float) -> Weights:
    """Of as many of this model's layers as fill `cold` GiB."""
    cfg = registry.parse(HFConfig(shapes.shape_config(shape)))
    return Weights(cfg, device, torch.bfloat16, int(cold * (1 << 30)))


def search(
    timer: "Timer", part: str, choices: dict[str, Choice], hint: Choice | None, until: float, quick: bool = False
) -> Choice:
    """The best choice for one part, the others being what they are, that is found until then."""
    tried, chain = {choices[part]}, timer.chain
    fields = [functools.partial(field, i) for i in range(max(map(len, FIELDS.values())))]
    stages = [(2, others), (8, grid), *((1, vary) for vary in fields), (2, neighbours)]  # shares of the time
    stages = stages[:1] if quick else stages
    while True:  # again from a better start, for as long as that gains something
        start = choices[part]
        for i, (share, candidates) in enumerate(stages):
            now = time.monotonic()
            stop = now + (until - now) * share / sum(other for other, _ in stages[i:])
            fresh = [c for c in dict.fromkeys(candidates(chain, part, choices[part], hint)) if c not in tried]
            fresh = [c for c in fresh if chain.possible(part, c)]
            tried |= set(fresh)
            choices = choices | {part: timer.better(part, choices, fresh, stop)}
        if choices[part] == start or time.monotonic() > until:
            return choices[part]


def others(chain: Chain, part: str, best: Choice, hint: Choice | None) -> Iterator[Choice]:
    """Every kernel with its default tile, and what won for another number of tokens."""
    key = chain.weights.key(part)
    if hint is not None and hint.kernel == "skinny":
        hint = Choice("skinny", hint.tile._replace(tokens=max(hint.tile.tokens, _enough(chain.tokens))))
    if hint is not None and hint.kernel == "wide":
        hint = Choice(
            "wide", hint.tile._replace(splits=min(hint.tile.splits, max(wide.MOST_PARTIAL // chain.tokens, 1)))
        )
    if hint is not None:
        yield hint
    yield CUBLAS
    yield Choice("gemv", gemv.default(*key, chain.tokens))
    tile = skinny.default(*key, chain.tokens, capability(chain.weights.device))
    yield Choice("skinny", tile)
    yield Choice("skinny", tile._replace(tokens=_enough(chain.tokens)))
    if chain.tokens > WIDE:
        yield Choice("hopper", None)
        tile = wide.default(*key, chain.tokens, capability(chain.weights.device))
        yield Choice("wide", tile)
        for tokens, rows, columns, warps, stages in WIDE_STARTS:
            rows //= 2 if key[0] == "gated" else 1
            yield Choice("wide", wide.Tile(tokens, rows, columns, warps, stages, tile.splits, tile.tma, own=tile.own))


def grid(chain: Chain, part: str, best: Choice, hint: Choice | None) -> list[Choice]:
    """All combinations of the fields that matter most, the nearest first."""
    found, key, gpu = around(best), chain.weights.key(part), capability(chain.weights.device)
    if chain.tokens >= gemv.MOST_TOKENS and best.kernel != "skinny":  # its default alone says little
        found += around(Choice("skinny", skinny.default(*key, chain.tokens, gpu)))
    if chain.tokens > WIDE and best.kernel != "wide":
        found += around(Choice("wide", wide.default(*key, chain.tokens, gpu)))
    return found


def around(choice: Choice) -> list[Choice]:
    """The grid of a choice's kernel, the nearest first."""
    if choice.tile is None:
        return []
    axes = GRIDS[choice.kernel]
    tiles = [choice.tile._replace(**dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    tiles = [tile for tile in tiles if tile.rows * tile.columns >= 512 * tile.warps]  # 16 numbers a thread, or more
    return [Choice(choice.kernel, tile) for tile in sorted(tiles, key=lambda tile: distance(tile, choice.tile))]


def field(i: int, chain: Chain, part: str, best: Choice, hint: Choice | None) -> list[Choice]:
    """Every value of the i-th of the other fields."""
    if best.tile is None or i >= len(FIELDS[best.kernel]):
        return []
    name, values = list(FIELDS[best.kernel].items())[i]
    return [Choice(best.kernel, best.tile._replace(**{name: value})) for value in values]


def neighbours(chain: Chain, part: str, best: Choice, hint: Choice | None) -> list[Choice]:
    """One step on the grid in every direction, for the fields may have moved its best place."""
    return [c for c in around(best) if distance(c.tile, best.tile) <= 1]


def distance(a: Any, b: Any) -> float:
    """Doublings between two tiles of a kind, all numeric fields together."""
    pairs = [(x, y) for x, y in zip(a, b) if type(x) is int]
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in pairs)


def present(weights: Weights, part: str, tokens: int) -> Choice:
    return tuning.choose(weights.device, *weights.key(part), max(tokens, weights.least(part)))


def put(rows: list[tuning.AnyRow], weights: Weights, part: str, tokens: int, choice: Choice) -> list[tuning.AnyRow]:
    """The rows with one more, or another. A shape that had none keeps what it was given for other numbers of tokens."""
    key = weights.key(part)
    if not any(row[:3] == key for row in rows):
        counts = sorted({row.tokens for row in rows if row.op == key[0]})
        rows = rows + [Row(*key, n, tuning.choose(weights.device, *key, n)) for n in counts]
    return [row for row in rows if row[:4] != (*key, tokens)] + [Row(*key, tokens, choice)]


class Timer:
    """Compares choices in CUDA graphs of the whole chain, all on one stream, for that is what tickets belong to."""

    def __init__(self, chain: Chain | Prompts, choices: dict[str, Choice], workers: int):
        self.chain, self.workers = chain, workers
        self.stream = torch.cuda.Stream(chain.device)
        self.memory = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()  # the chain was made on another stream
        self.first = self.graph(choices, "head")  # a pool of memory ends with its last graph; this one stays

    def better(self, part: str, choices: dict[str, Choice], candidates: list[Choice], until: float) -> Choice:
        """The fastest of a part's present choice and the candidates, as far as there is time to try them."""
        best = choices[part]
        for first in range(0, len(candidates), self.workers):
            usable = self.usable(part, candidates[first : first + self.workers], until)
            if usable:
                best = self.fastest(part, choices | {part: best}, usable, until)
        return best

    def fastest(self, part: str, choices: dict[str, Choice], candidates: list[Choice], until: float) -> Choice:
        best, champion = choices[part], self.graph(choices, part)
        limit = DROP * min(self.sample(champion) for _ in range(3))
        for candidate in candidates:
            if time.monotonic() > until:
                break
            challenger = self.graph(choices | {part: candidate}, part)
            if min(self.sample(challenger) for _ in range(2)) > limit or self.ratio(challenger, champion) > KEEP:
                continue
            if not self.chain.right(part, candidate):
                print(f"WRONG: {part} of {self.chain.tokens} tokens as {shown(candidate)}", flush=True)
                continue
            best, champion = candidate, challenger
            limit = DROP * min(self.sample(champion) for _ in range(3))
        return best

    def usable(self, part: str, candidates: list[Choice], until: float) -> list[Choice]:
        """Those that compile and run here. Compiling takes far longer than timing, so all at the same time."""
        failed: list[str] = []

        def runs(candidate: Choice) -> bool:
            if time.monotonic() > until:
                return False
            try:
                with torch.inference_mode(), torch.cuda.stream(self.stream):  # both belong to a thread
                    self.chain.once(part, candidate)
            except Exception as error:  # too much shared memory, or more than the compiler can do
                failed.append(f"{shown(candidate)}: {type(error).__name__}: {error}")
                return False
            return True

        with ThreadPoolExecutor(
            self.workers, initializer=torch.cuda.set_device, initargs=(self.stream.device,)
        ) as pool:
            found = [c for c, ran in zip(candidates, pool.map(runs, candidates)) if ran]
        torch.cuda.synchronize()
        if failed:
            print(f"left out {len(failed)} of {part}, as {failed[0]}"[:200], flush=True)
        return found

    def graph(self, choices: dict[str, Choice], part: str) -> torch.cuda.CUDAGraph:
        """The chain, with the head if that is what is being tuned."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self.chain.run(choices, part == "head")  # nothing may be compiled while a graph is captured
            torch.cuda.synchronize()
            graph.capture_begin(pool=self.memory)
            try:
                self.chain.run(choices, part == "head")
            finally:
                graph.capture_end()
        return graph

    def sample(self, graph: torch.cuda.CUDAGraph) -> float:
        """Seconds of one replay, the mean of a few in a row."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS

    def ratio(self, challenger: torch.cuda.CUDAGraph, champion: torch.cuda.CUDAGraph, pairs: int = 7) -> float:
        """How long one takes compared with the other; samples alternate, for clocks and temperature drift."""
        return statistics.median(self.sample(challenger) / self.sample(champion) for _ in range(pairs))

    def told(self, part: str, choices: dict[str, Choice], found: Choice) -> str:
        graphs = [self.graph(choices | {part: choice}, part) for choice in (choices[part], found)]
        before, after = (1e6 * statistics.median(self.sample(graph) for _ in range(5)) for graph in graphs)
        return f"{before:.1f} -> {after:.1f} us, {shown(found)}"

    def summary(self, choices: dict[str, Choice], copy: float) -> str:
        """The chain with its head, against the bytes that it must read."""
        graph, weights = self.graph(choices, "head"), self.chain.weights
        seconds = statistics.median(self.sample(graph) for _ in range(5))
        seen = sum(pool.nbytes for pools in self.chain.pools for pool in pools)
        floor = (len(weights.layers) * weights.bytes + weights.head.nbytes + seen) / copy
        return f"{len(weights.layers)} layers and the head {1e6 * seconds:.1f} us, {floor / seconds:.1%} of copy"


def shown(choice: Choice) -> str:
    values = choice.tile._asdict().items() if choice.tile else ()
    return f"{choice.kernel}({', '.join(f'{name}={value}' for name, value in values)})"


def _enough(tokens: int) -> int:
    """The smallest tile that takes so many tokens."""
    return max(8, 1 << (tokens - 1).bit_length())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=shapes.shape_names(), metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="N")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--context", type=int, default=512, help="keys that each request sees (at most 1024)")
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything together")
    parser.add_argument("--quick", action="store_true", help="only tiles that have won somewhere; seconds a matmul")
    parser.add_argument("--rounds", type=int, default=1, help="times that each matmul is tuned: the others move too")
    parser.add_argument("--cold", type=float, default=COLD / (1 << 30), help="GiB of weights: more layers in the chain")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="threads that compile")
    parser.add_argument("--out", type=Path, help="another file than this GPU's table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
