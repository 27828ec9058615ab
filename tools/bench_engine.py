"""Time the engine and transformers' generate on the same random weights, prompts and lengths, both greedy.

    python tools/bench_engine.py [--shape llama-3.2-1b] [--batch 1 8 32] [--prompt 128] [--new 128] [--json FILE]

Lengths are forced on both sides (no stop token), the prefix cache is off, the first round of each is a warm-up, and
rounds alternate. The floor is the time to read the weights once per step at the copy bandwidth of the same run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM, SamplingParams
from lite_llm.models import shapes
from tools.bench_ops import copy_rate
from tools.environment import environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use", file=sys.stderr)
        return 3
    bandwidth = copy_rate()
    llm = LLM(
        shape=args.shape, random_weights=True, dtype="bfloat16", prefix_cache=False, context=args.prompt + args.new,
        max_requests=max(args.batch), step_tokens=8192, memory_fraction=0.5, say=print,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(**shapes.shape_config(args.shape))
    with torch.device("cuda"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows = []
    for batch in args.batch:
        torch.manual_seed(batch)
        prompts = torch.randint(0, llm.cfg.vocab, (batch, args.prompt))
        sides = {
            "lite_llm": lambda prompts=prompts: ours(llm, prompts, args.new),
            "transformers": lambda prompts=prompts: their(theirs, prompts.cuda(), args.new),
        }
        times = {side: [] for side in sides}
        for i in range(args.rounds + 1):
            for side, run in sides.items():
                first, total = run()
                if i:
                    times[side].append((first, total))
        for side, measured in times.items():
            first, total = (statistics.median(column) for column in zip(*measured))
            step = (total - first) / (args.new - 1)
            rows.append({
                "side": side, "batch": batch, "first_token_ms": first * 1e3, "step_ms": step * 1e3,
                "tokens_per_second": batch * args.new / total, "floor_over_step": llm.plan.weights / bandwidth / step,
                "totals_s": [t for _, t in measured],
            })  # fmt: skip
    table = Table(title=f"{args.shape}, {torch.cuda.get_device_name()}, prompt {args.prompt}, {args.new} new tokens")
    for name in ("", "batch", "first token ms", "ms a step", "tokens/s", "weights' floor / step"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["side"], str(row["batch"]), f"{row['first_token_ms']:.1f}", f"{row['step_ms']:.2f}",
            f"{row['tokens_per_second']:.0f}", f"{row['floor_over_step']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if args.json:
        record = environment() | {"arguments": vars(args) | {"json": None}, "copy_tb_s": bandwidth / 1e12, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def ours(llm: LLM, prompts: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to the last request's first token, and to the end."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    names = [llm.add_request(ids, params) for ids in prompts.tolist()]
    waiting, first = set(names), 0.0
    while not all(llm.finished(name) for name in names):
        waiting -= {delta.id for delta in llm.step()}
        if not waiting and not first:
            first = time.perf_counter() - start
    total = time.perf_counter() - start
    for name in names:
        if len(llm.result(name).token_ids) != new:
            raise RuntimeError(f"{name} has {len(llm.result(name).token_ids)} tokens; expected {new}")
        llm.forget(name)
    return first, total


@torch.inference_mode()
def their(model: torch.nn.Module, prompts: torch.Tensor, new: int) -> tuple[float, float]:
    def run(n: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=n, min_new_tokens=n,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        torch.cuda.synchronize()
        if out.shape[1] != prompts.shape[1] + n:
            raise RuntimeError(f"transformers gave {out.shape[1] - prompts.shape[1]} tokens; expected {n}")
        return time.perf_counter() - start

    return run(1), run(new)


if __name__ == "__main__":
    sys.exit(main())
