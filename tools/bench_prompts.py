"""Time prompts on this GPU: attention alone against cuDNN's, and whole first tokens against the matmuls' floor.

    python tools/bench_prompts.py [--only attention first shapes beside] [--shape llama-3.2-1b ...] [--json FILE]

Attention: medians of graph replays, by turns; TFLOP/s of what a causal mask leaves; "portable" is the kernel for GPUs
other than Hopper; cuDNN through torch, dense, on the same keys and values. A row counts only if some of its results
agree with plain torch in fp32. First tokens: one request, by the clock, from the call to the token, random weights, no
prefix cached; the floor is the FLOP that its matmuls and its attention need at least (the last layer of most tokens
only for their keys and values) at the rate of a large matmul in the same run. A shape counts only if the first tokens
are those of the reference ops, up to rounding. Shapes of steps: each graph's time, filled with pads (so without
attention), and how much more a token costs than in the next smaller one. Beside decodes: steps with keys and all, of
requests that decode alone, of a prompt alone, and of both together; rows are what is computed, pads included. Exit code
1 if anything is wrong.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM, ops
from lite_llm.engine.roofline import matmul_rate
from lite_llm.engine.runner import Piece, Shape
from lite_llm.models import shapes
from tools import bench_peers as peers
from tools.bench_ops import DEVICE, DTYPE, timed_steps
from tools.benchmark.limits import prompt_flops
from tools.environment import environment
from tools.prompt_attention import OFF, attentions

WHAT = "attention", "first", "shapes", "beside"
STEP_TOKENS = 8192  # of a step: no prompt here is read in pieces
ANSWERED = 64  # tokens behind a cached prompt, for the time of a step
WARM = 10  # answers before the first that is timed: Python too is slower the first times, by a third of its part
DECODES, BEHIND = 192, 384  # requests that decode beside a prompt, and tokens of theirs to begin with
CHUNKS = 256, 832, 1856  # tokens of that prompt: a step of both has no pads, one of it alone may have some
GATED = 300, 77, 1024  # tokens of the prompts that are compared with the reference
VLLM_FIRST_MS = {
    "llama-3.2-1b": {128: 4.35, 1024: 7.53, 4096: 18.9},
    "qwen2.5-3b": {128: 6.97, 1024: 15.3, 4096: 45.3},
    "llama-3.1-8b": {128: 9.07, 1024: 26.9, 4096: 103.0},
}
"""As `peers.VLLM_SOURCE` says, one request."""
LENGTHS = {"llama-3.2-1b": (128, 512, 640, 1024, 2048, 4096), "llama-3.1-8b": (128, 1024, 2048, 4096, 8192)}


def firsts(shape: str, rounds: int, roof: float) -> dict:
    """First tokens of one request: milliseconds by the length of its prompt."""
    lengths = LENGTHS.get(shape, (128, 1024, 4096))
    options = dict(shape=shape, random_weights=True, prefix_cache=False, step_tokens=STEP_TOKENS, max_requests=4)
    with ops.use("reference"), LLM(**options, context=max(GATED) + 8, cuda_graphs=False) as llm:
        right = told(llm, logprobs=2 * peers.GATE_TOP_K)
    with LLM(**options, context=max(lengths) + 8) as llm:
        gate = peers.gate(told(llm), right, sampled=False)
        for i in range(WARM):
            llm.generate([random_prompt(llm, lengths[0], seed=i)], peers.wish(False, 1))
        rows = []
        for length in lengths:
            times = []
            for i in range(rounds + 1):
                prompt = random_prompt(llm, length, seed=i)
                start = time.perf_counter()
                llm.generate([prompt], peers.wish(False, 1))
                times.append((time.perf_counter() - start) * 1e3)
            ms, floor = statistics.median(times[1:]), prompt_flops(llm.cfg, length) / roof * 1e3
            theirs = VLLM_FIRST_MS.get(shape, {}).get(length)
            rows.append({"tokens": length, "ms": ms, "ms_rounds": times[1:], "floor_ms": floor, "vllm_ms": theirs})
    found = cached(options | {"context": max(lengths) + ANSWERED + 8}, max(lengths), rounds)
    return {"shape": shape, "gate": gate, "rows": rows, "cached": found}


def cached(options: dict, length: int, rounds: int) -> dict:
    """Milliseconds to the first token of a prompt that is cached but for its last token, and of a step behind it."""
    firsts, answers = [], []
    with LLM(**options | {"prefix_cache": True}) as llm:
        prompt = random_prompt(llm, length, seed=0)
        llm.generate([prompt], peers.wish(False, 1))
        for i in range(rounds + 1):
            for times, new in ((firsts, 1), (answers, 1 + ANSWERED)):
                start = time.perf_counter()
                [output] = llm.generate([[*prompt[:-1], i]], peers.wish(False, new))
                times.append((time.perf_counter() - start) * 1e3)
    ms = statistics.median(firsts[1:])
    step = (statistics.median(answers[1:]) - ms) / ANSWERED
    return {
        "tokens": length, "cached_tokens": output.usage.cached_tokens, "ms": ms, "ms_rounds": firsts[1:],
        "step_ms": step, "reach_ms": 1.5 * step + 2.0,
    }  # fmt: skip


def steps(shape: str) -> dict:
    """Milliseconds of each shape of step that computes prompts, by the number of requests that decode beside."""
    options = dict(shape=shape, random_weights=True, step_tokens=STEP_TOKENS, max_requests=256, max_slowdown=2.0)
    with LLM(**options, context=STEP_TOKENS) as llm:
        seconds = llm.engine.runner.seconds
    return {"shape": shape, "rows": ramp({(each.decodes, each.tokens): s for each, s in seconds.items()})}


def ramp(seconds: dict[tuple[int, int], float]) -> list[dict]:
    """By (decodes, tokens of prompts). `rise`: what a token costs, prompts' and decodes' alike, against what one costs
    in the next smaller step beside as many decodes; None where there is none."""
    rows, before = [], None
    for (decodes, tokens), s in sorted(item for item in seconds.items() if item[0][1]):
        each = s / (decodes + tokens)
        like = rows and rows[-1]["decodes"] == decodes
        rows.append({"decodes": decodes, "tokens": tokens, "ms": s * 1e3, "rise": each / before - 1 if like else None})
        before = each
    return rows


def beside(shape: str, rounds: int) -> dict:
    """Milliseconds of steps, keys and all, by the tokens of the prompt: it alone, decodes alone, and both in one."""
    options = dict(shape=shape, random_weights=True, prefix_cache=False, max_requests=256, context=2 * max(CHUNKS))
    with LLM(**options) as llm, timed_steps(llm.engine.runner) as marks:
        runner, kinds, computed = llm.engine.runner, [], {}
        send = runner.send

        def noted(step: Shape, rows: list[int], prompts: Sequence[Piece]) -> None:
            kinds.append((len(rows) > 0, len(prompts) > 0))
            computed[kinds[-1]] = step.decodes + step.tokens  # pads too
            send(step, rows, prompts)

        def median(decodes: bool, prompts: bool) -> float:
            torch.cuda.synchronize()
            marked = zip(kinds, marks, strict=True)
            return statistics.median(s.elapsed_time(e) for kind, (s, e) in marked if kind == (decodes, prompts))

        runner.send = noted
        rows = []
        for tokens in CHUNKS:
            kinds.clear()
            marks.clear()
            for i in range(rounds):
                llm.generate([random_prompt(llm, tokens, seed=i)], peers.wish(False, 1))
            rows.append({"tokens": tokens, "alone_ms": median(False, True), "alone_rows": computed[False, True]})
        waiting = set()
        for i in range(DECODES):
            waiting.add(llm.add_request(random_prompt(llm, BEHIND, seed=i), peers.wish(False, max(CHUNKS))))
        while waiting:
            waiting -= {delta.id for delta in llm.step()}
        for row in rows:
            kinds.clear()
            marks.clear()
            for i in range(rounds):
                asked, heard = llm.add_request(random_prompt(llm, row["tokens"], seed=i), peers.wish(False, 1)), set()
                while asked not in heard:
                    heard |= {delta.id for delta in llm.step()}
                llm.step()  # of decodes alone
            row |= {"decodes_ms": median(True, False), "both_ms": median(True, True)}
            row["both_rows"] = computed[True, True]
        return {"shape": shape, "decodes": DECODES, "behind": BEHIND, "rows": rows}


def told(llm: LLM, logprobs: int | None = None) -> list:
    asks = [random_prompt(llm, length, seed=length) for length in GATED]
    return llm.generate(asks, peers.wish(False, 1, logprobs=logprobs))


def random_prompt(llm: LLM, length: int, seed: int) -> list[int]:
    return torch.randint(llm.cfg.vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tables(record: dict) -> Iterator[Table]:
    if record["attention"]:
        yield (made := Table(title="attention of prompts, TFLOP/s"))
        for name in ("tokens", "heads", "of", "ours", "portable", "cuDNN", "ours / cuDNN", "to reach", "off"):
            made.add_column(name)
        for row in record["attention"]:
            theirs = row["cudnn_tflop_s"]
            cells = (f"{theirs:.0f}", f"{row['tflop_s'] / theirs:.3f}") if theirs else ("", "")
            made.add_row(
                row["work"], "{} / {}".format(*row["heads"]), f"{row['head_dim']}", f"{row['tflop_s']:.0f}",
                f"{row['portable_tflop_s']:.0f}", *cells, f"{row['reach'] or ''}", f"{row['off']:.4f}",
            )  # fmt: skip
    for found in record["first"]:
        yield (made := Table(title=f"{found['shape']}: first token of one prompt"))
        for name in ("tokens", "ms", "lowest to highest", "floor", "floor / ms", "vLLM 0.22.1", "its ms / ms"):
            made.add_column(name, justify="right")
        for row in found["rows"]:
            ms, theirs = row["ms"], row["vllm_ms"]
            made.add_row(
                f"{row['tokens']:,}", f"{ms:.2f}", f"{min(row['ms_rounds']):.2f} to {max(row['ms_rounds']):.2f}",
                f"{row['floor_ms']:.2f}", f"{row['floor_ms'] / ms:.2f}",
                *((f"{theirs:g}", f"{theirs / ms:.2f}") if theirs else ("", "")),
            )  # fmt: skip
        hit = found["cached"]
        told = found["gate"]["wrong"] or "first tokens are those of the reference, up to rounding"
        made.caption = (
            f"{told}; of {hit['tokens']:,} tokens {hit['cached_tokens']:,} cached: {hit['ms']:.2f} ms "
            f"(to reach: 1.5 steps and 2 ms, {hit['reach_ms']:.2f})"
        )

    for found in record["beside"]:
        title = (
            f"{found['shape']}: a prompt beside {found['decodes']} requests behind some {found['behind']} tokens, ms"
        )
        yield (made := Table(title=title))
        for name in ("tokens of the prompt", "it alone", "rows", "decodes alone", "both in one step", "rows", "saved"):
            made.add_column(name, justify="right")
        for row in found["rows"]:
            alone, both = row["alone_ms"] + row["decodes_ms"], row["both_ms"]
            made.add_row(
                f"{row['tokens']:,}", f"{row['alone_ms']:.2f}", f"{row['alone_rows']:,}", f"{row['decodes_ms']:.2f}",
                f"{row['both_ms']:.2f}", f"{row['both_rows']:,}", f"{1 - both / alone:.1%}",
            )  # fmt: skip
    for found in record["shapes"]:
        yield (made := Table(title=f"{found['shape']}: steps filled with pads, ms"))
        tokens = sorted({row["tokens"] for row in found["rows"]})
        for name in ("beside decodes", *(f"{n:,}" for n in tokens)):
            made.add_column(name, justify="right")
        for decodes in sorted({row["decodes"] for row in found["rows"]}):
            ms = {row["tokens"]: f"{row['ms']:.2f}" for row in found["rows"] if row["decodes"] == decodes}
            made.add_row(str(decodes), *(ms.get(n, "") for n in tokens))
        worst = max((row for row in found["rows"] if row["rise"] is not None), key=lambda row: row["rise"])
        made.caption = (
            f"largest rise of a token's cost: {worst['rise']:+.1%}, to {worst['tokens']:,} beside {worst['decodes']} "
            "(to reach: 5 %)"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(WHAT), choices=WHAT, help="default: all")
    parser.add_argument("--shape", nargs="+", default=list(VLLM_FIRST_MS), choices=shapes.shape_names(), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9, help="of first tokens and beside; default 9")
    parser.add_argument("--json", type=Path, help="file for the figures and what they were taken on")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    roof = matmul_rate(DEVICE, DTYPE)
    record = environment() | {"matmul_tflop_s": roof / 1e12, "vllm": peers.VLLM_SOURCE} | {name: [] for name in WHAT}
    work: list[Callable[[], None]] = []
    if "attention" in args.only:
        work.append(lambda: record["attention"].extend(attentions()))
    if "first" in args.only:
        work += [lambda s=shape: record["first"].append(firsts(s, args.rounds, roof)) for shape in args.shape]
    if "shapes" in args.only:
        work += [lambda s=shape: record["shapes"].append(steps(s)) for shape in args.shape]
    if "beside" in args.only:
        work += [lambda s=shape: record["beside"].append(beside(s, args.rounds)) for shape in args.shape]
    for each in work:
        each()
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['gpu']}: matmul {roof / 1e12:.0f} TFLOP/s")
    for table in tables(record):
        Console(width=120).print(table)
    wrong = [found["gate"]["wrong"] for found in record["first"] if found["gate"]["wrong"]]
    wrong += [f"attention, {row['work']}: off by {row['off']:.3f}" for row in record["attention"] if row["off"] > OFF]
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
