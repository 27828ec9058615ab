"""Time many requests at once on this machine: against the limits of their steps, static batches, and vLLM's figures.

    python tools/bench_serving.py [--shape llama-3.2-1b ...] [--requests 1000] [--json FILE]

"mixed": 256 requests, inputs of 64 to 512 tokens, outputs of 32 to 256, as vLLM's figures were taken. "chat": requests
whose lengths are spread as those of conversations are (inputs of 215 tokens in the mean, outputs of 197), once with
continuous batching, as `generate` orders them, and twice in static batches, in the order of the draw, that wait for
their longest answer: "static" lets an answer that has ended leave the steps, "held" computes it until all of its batch
have ended, as transformers' `generate` does. The limit is the sum over the steps of a round that is not timed, each at
the memory's or the matmuls' rate of this run, class by class. "idle" is the share of time in which no step runs while
requests join and leave. 256 requests at a time, random weights, no prefix cached; a shape counts only if its tokens are
those of an engine without CUDA graphs, up to rounding. Exit code 1 where they are not.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM
from lite_llm.config import ModelConfig
from lite_llm.engine.roofline import Ceilings, step_costs
from lite_llm.engine.scheduler import Plan
from lite_llm.models import shapes
from tools import bench_peers as peers
from tools.bench_ops import timed_steps
from tools.benchmark.work import Lengths
from tools.environment import environment

TOGETHER = 256
LONGEST = 2048  # tokens of a prompt, and of an answer, where lengths are drawn without a bound
MIXED = 256, Lengths.parse("64-512"), Lengths.parse("32-256")
CHAT = "lognormal:143:0.9", "lognormal:131:0.9"
VLLM_MIXED = {"llama-3.2-1b": (37_129, 1.4), "qwen2.5-3b": (19_671, 1.4), "llama-3.1-8b": (9_342, 1.15)}
"""Output tokens per second, as `peers.VLLM_SOURCE` but for the lengths, and how many times that we mean to reach."""
LIMIT_GOALS = {"llama-3.2-1b": 0.60, "llama-3.1-8b": 0.70}
LEAD, WATCHED = 120, 300  # steps until all rows are taken, and steps that are looked at while requests still wait


class Advance(NamedTuple):
    """One request in one step: `new` tokens behind `old` ones, and whether its last one is followed by another."""

    old: int
    new: int
    sampled: bool


def limit(cfg: ModelConfig, itemsize: int, step: Sequence[Advance], roof: Ceilings) -> float:
    """Seconds of one step at the limit: weights once, keys and values once for each request, and where logits are not
    needed nothing of the last layer but new keys and values.
    """
    ends = [Advance(a.old + a.new - 1, 1, True) for a in step if a.sampled]
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    *before, last = cfg.windows
    attends = [(a, window) for window in before for a in step] + [(a, last) for a in ends]
    read = sum(min(a.old, window - 1 if window else a.old) + a.new for a, window in attends)
    seen = sum(_pairs(a, window) for a, window in attends)
    seconds = 0.0
    for cost in step_costs(cfg, itemsize, sum(a.new for a in step), 0, wanted=len(ends)):
        if cost.name == "attention":
            cost = dataclasses.replace(cost, bytes=2 * kv * itemsize * read, flops=4 * q * seen)
        seconds += cost.floor(roof)
    return seconds


def _pairs(a: Advance, window: int | None) -> int:
    """Of a token and one that it sees."""
    if window is None or a.old + a.new <= window:
        return a.new * a.old + a.new * (a.new + 1) // 2
    return sum(min(a.old + i, window) for i in range(1, a.new + 1))


def steps_of(llm: LLM, run: Callable[[], object]) -> list[list[Advance]]:
    """What is computed while something runs."""
    steps, scheduler = [], llm.engine.scheduler
    launched = scheduler.launched

    def note(plan: Plan) -> None:
        steps.append([Advance(request.cached, n, n == request.pending) for request, n in plan])
        launched(plan)

    scheduler.launched = note
    try:
        run()
    finally:
        del scheduler.launched
    return steps


class Load(NamedTuple):
    prompts: list[list[int]]
    new: list[int]

    @classmethod
    def draw(cls, vocab: int, count: int, inputs: Lengths, outputs: Lengths, seed: int = 1234) -> "Load":
        draw = Random(seed)
        lengths = [(inputs.draw(draw), outputs.draw(draw)) for _ in range(count)]
        return cls([[draw.randrange(vocab) for _ in range(n)] for n, _ in lengths], [new for _, new in lengths])

    @property
    def context(self) -> int:
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.new))

    def part(self, first: int, end: int) -> "Load":
        return Load(self.prompts[first:end], self.new[first:end])

    def held(self) -> "Load":
        """All say as much as the one that says most."""
        return Load(self.prompts, [max(self.new)] * len(self.new))

    def seconds(self, llm: LLM) -> float:
        """Until the last answer, all sent at once. RuntimeError if one has another length than it was to have."""
        wishes = [peers.wish(False, new) for new in self.new]
        start = time.perf_counter()
        outputs = llm.generate(self.prompts, wishes)
        seconds = time.perf_counter() - start
        lengths = [len(output.choices[0].token_ids) for output in outputs]
        if lengths != self.new:
            raise RuntimeError(f"answers of {lengths[:8]} tokens; expected {self.new[:8]}")
        return seconds


def measured(shape: str, options: dict, requests: int, rounds: int, roof: Ceilings) -> dict:
    options = dict(options, shape=shape, random_weights=True, prefix_cache=False, say=lambda text: None)
    facts = shapes.shape_config(shape)
    longest = min(LONGEST, facts["max_position_embeddings"] // 2)
    vocab, spread = facts["vocab_size"], [Lengths.parse(text, longest) for text in CHAT]
    mixed, chat = Load.draw(vocab, *MIXED), Load.draw(vocab, requests, *spread)
    options["max_requests"] = TOGETHER
    with LLM(**options, context=peers.GATE_LENGTH, cuda_graphs=False) as llm:
        right = peers.gate_answers(llm, (8, False), logprobs=True)
    batches = [chat.part(first, first + TOGETHER) for first in range(0, requests, TOGETHER)]
    context = max(load.context for load in (mixed, *(batch.held() for batch in batches)))
    with LLM(**options, context=max(context, peers.GATE_LENGTH)) as llm:
        found = {"shape": shape, "gate": peers.gate(peers.gate_answers(llm, (8, False)), right, sampled=False)}
        if found["gate"]["wrong"]:
            return found
        item = llm.engine.kv.k.element_size()

        def timed(name: str, load: Load) -> float:
            steps = steps_of(llm, lambda: load.seconds(llm))  # a round that warms up: noting takes time
            times = [load.seconds(llm) for _ in range(rounds)]
            least = sum(limit(llm.cfg, item, step, roof) for step in steps)
            seconds, tokens = statistics.median(times), sum(load.new)
            found[name] = {
                "requests": len(load.new), "prompt_tokens": sum(map(len, load.prompts)), "new_tokens": tokens,
                "seconds": seconds, "seconds_rounds": times, "tokens_per_second": tokens / seconds,
                "steps": len(steps), "limit_seconds": least, "of_limit": least / seconds,
            }  # fmt: skip
            return seconds

        timed("mixed", mixed)
        seconds = timed("chat", chat)
        static, held = (sum(load.seconds(llm) for load in loads) for loads in (batches, [b.held() for b in batches]))
        found["chat"] |= {"static_seconds": static, "times_static": static / seconds}
        found["chat"] |= {"held_seconds": held, "times_held": held / seconds}
        if llm.engine.stream:
            found["joins"] = joins(llm, chat)
        return found


def joins(llm: LLM, load: Load) -> dict:
    """How much of the time the GPU runs no step while requests leave and others join: between the end of one step's
    graph and the start of the next one's, small edits of the device's tables included.
    """
    names = [llm.add_request(ids, peers.wish(False, new)) for ids, new in zip(load.prompts, load.new)]
    ended = 0
    for _ in range(LEAD):
        llm.step()
    with timed_steps(llm.engine.runner) as marks:
        for _ in range(WATCHED):
            ended += sum(delta.finish_reason is not None for delta in llm.step())
    llm.engine.stream.synchronize()
    for name in names:
        llm.forget(name)
    gaps = [end.elapsed_time(start) for (_, end), (start, _) in itertools.pairwise(marks)]
    return {"idle": sum(gaps) / marks[0][0].elapsed_time(marks[-1][1]), "steps": len(marks), "left": ended}


def table(record: dict) -> Table:
    rates = f"copy {record['copy_tb_s']:.3g} TB/s, matmul {record['matmul_tflop_s']:.3g} TFLOP/s"
    made = Table(title=f"{record.get('gpu', record['cpu'])}: {rates}", caption="goals in brackets")
    for name in ("requests", "tokens/s", "of the limit", "against", "idle", "gate"):
        made.add_column(name, justify="right")
    for found in record["rows"]:
        shape, gate, idle = found["shape"], found["gate"], found.get("joins")
        if gate["wrong"]:
            made.add_row(shape, gate["wrong"])
            continue
        mixed, chat = found["mixed"], found["chat"]
        theirs, goal = VLLM_MIXED.get(shape, (None, None))
        rate = mixed["tokens_per_second"]
        against = f"{rate / theirs:.2f} x vLLM ({goal:g})" if theirs else ""
        said = f"{gate['equal']} of {gate['answers']} equal"
        made.add_row(f"{shape}, mixed", f"{rate:,.0f}", f"{mixed['of_limit']:.2f}", against, "", said)
        share = f"{chat['of_limit']:.2f}" + (f" ({LIMIT_GOALS[shape]:.2f})" if shape in LIMIT_GOALS else "")
        batches = f"{chat['times_static']:.2f} x static (2), {chat['times_held']:.2f} held (2)"
        made.add_row(
            f"{shape}, chat", f"{chat['tokens_per_second']:,.0f}", share, batches,
            f"{idle['idle']:.1%} (5 %), {idle['left']} left in {idle['steps']} steps" if idle else "", "",
        )  # fmt: skip
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=list(VLLM_MIXED), choices=shapes.shape_names(), metavar="NAME")
    parser.add_argument("--requests", type=int, default=1000, help="of chat; default 1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu and not all(shape.startswith("tiny-") for shape in args.shape):
        print("error: no GPU that torch can use; --shape tiny-llama-3.2-1b runs without one", file=sys.stderr)
        return 3
    options = {"device": "cuda" if gpu else "cpu", "dtype": "bfloat16" if gpu else "float32"}
    roof = Ceilings.measure(torch.device(options["device"]), getattr(torch, options["dtype"]))
    record = environment() | {"copy_tb_s": roof.copy / 1e12, "matmul_tflop_s": roof.matmul / 1e12, "rows": []}
    record["vllm"] = peers.VLLM_SOURCE
    for shape in args.shape:
        record["rows"].append(measured(shape, options, args.requests, args.rounds, roof))
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    Console(width=130).print(table(record))
    wrong = [found["gate"]["wrong"] for found in record["rows"] if found["gate"]["wrong"]]
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
