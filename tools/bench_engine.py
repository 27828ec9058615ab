"""Time whole engine steps on this machine: against the memory's limit, transformers, and vLLM's figures.

    python tools/bench_engine.py [--only PATTERN ...] [--quick] [--compile] [--json FILE]
    python tools/bench_engine.py --shape llama-3.2-3b --batch 1 8 --context 512

The floor is the bytes of the weights, and of the keys and values at the mean context of the timed steps, over the copy
bandwidth of the same run. Weights are random. Nothing is timed before its tokens agree with those of an engine without
CUDA graphs; a case that fails is shown as FAILED and the exit code is 1. `--only` takes names of cases with wildcards:
'llama-3.2-1b/b1/*', 'vllm/*', 'transformers/*'. The file is written after each case. Without a GPU, use a tiny shape.
"""

import argparse
import fnmatch
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM, SamplingParams
from lite_llm.engine.roofline import copy_rate, step_costs
from lite_llm.errors import EnvironmentProblem, LiteLLMError, UsageError
from lite_llm.models.shapes import shape_config
from tools import bench_peers as peers
from tools.bench_peers import Peer
from tools.environment import environment
from tools.idle import idle_shares, kernels

STEP_TOKENS = 4096  # of prompts; no decode step depends on it
LEAD = 4  # steps of a round before its event: the first ones after a wait are launched to an idle GPU
PROFILED = 36  # steps


@dataclass(frozen=True)
class Effort:
    rounds: int = 5
    steps: int = 50  # of a round
    warm: int = 16  # steps before the first round
    answers: int = 3  # rounds of whole answers

    @property
    def timed(self) -> int:
        return self.rounds * self.steps


@dataclass(frozen=True)
class Steps:
    """A step of `batch` requests whose attention sees `context` tokens in the mean; `reach` is of floor / time."""

    shape: str
    batch: int
    context: int
    reach: float | None = None
    sampled: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape}/b{self.batch}/c{self.context}" + "/sampled" * self.sampled

    def prompt(self, effort: Effort) -> int:
        return max(1, self.context - effort.warm - effort.timed // 2)

    def new(self, effort: Effort) -> int:
        """Enough tokens for the first to be still there while the last is timed."""
        joining = 8 + self.batch // 16 + 2 * math.ceil(self.batch * self.prompt(effort) / STEP_TOKENS)
        return joining + effort.warm + effort.timed + PROFILED + 8

    def length(self, effort: Effort) -> int:
        return self.prompt(effort) + self.new(effort)

    def measure(self, llm: LLM, effort: Effort, bandwidth: float) -> dict:
        params = [peers.wish(self.sampled, self.new(effort), seed) for seed in range(self.batch)]
        with Flight(llm, peers.random_prompts(llm, self.batch, self.prompt(effort)), params) as flight:
            while min(flight.told.values()) == 0:
                flight.step()
            for _ in range(effort.warm):
                flight.step()
            before, calls = flight.tokens / self.batch, effort.timed
            wall, gpu = zip(*(self._round(llm, flight, effort.steps) for _ in range(effort.rounds)))
            steps = flight.tokens / self.batch - before
            # As many steps are on their way at the end as at the beginning, or a call is not a step.
            if abs(steps - calls) > 2 or flight.ended:
                raise RuntimeError(f"{calls} calls of step gave {steps:g} tokens to each request")
            idle = {}
            if self.batch == 1 and not self.sampled and llm.engine.stream:
                idle = idle_shares(kernels(flight.step, PROFILED))
            flight.finish()
        context = self.prompt(effort) + before + steps / 2
        item = llm.engine.kv.k.element_size()
        moved = sum(cost.bytes for cost in step_costs(llm.cfg, item, self.batch, round(context)))
        floor, ms = moved / bandwidth * 1e3, statistics.median(wall)
        return idle | {
            "ms": ms, "ms_rounds": wall, "gpu_ms": statistics.median(gpu) if gpu[0] else None, "gpu_ms_rounds": gpu,
            "against": "floor", "against_ms": floor, "ratio": floor / ms, "steps": calls, "tokens": steps,
            "mean_context": context, "bytes": moved, "tokens_per_second": self.batch / ms * 1e3,
        }  # fmt: skip

    def _round(self, llm: LLM, flight: "Flight", steps: int) -> tuple[float, float | None]:
        """Milliseconds per step by the clock, from idle to idle, and by the GPU's events once steps follow closely."""
        stream, lead = llm.engine.stream, min(LEAD, steps - 1)
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if stream else []
        _wait()
        start = time.perf_counter()
        for i in range(steps):
            if ends and i == lead:
                ends[0].record(stream)
            flight.step()
        if ends:
            ends[1].record(stream)
        _wait()
        wall = (time.perf_counter() - start) * 1e3 / steps
        return wall, ends[0].elapsed_time(ends[1]) / (steps - lead) if ends else None


@dataclass(frozen=True)
class Answers:
    """The mean decode step of whole answers, as vLLM's figures were taken; `reach` is of vLLM's time over ours."""

    shape: str
    batch: int
    their_ms: float
    reach: float
    prompt_len: int = 128
    new_len: int = 256
    sampled = False

    @property
    def name(self) -> str:
        return f"vllm/{self.shape}/b{self.batch}"

    def length(self, effort: Effort) -> int:
        return self.prompt_len + self.new_len

    def measure(self, llm: LLM, effort: Effort, bandwidth: float) -> dict:
        """What an answer takes beyond an answer of one token: prompt and pipeline cancel."""
        prompts = peers.random_prompts(llm, self.batch, self.prompt_len)
        self._seconds(llm, prompts, 2)
        pairs = [[self._seconds(llm, prompts, n) for n in (1, self.new_len)] for _ in range(effort.answers)]
        rounds = [(whole - first) / (self.new_len - 1) * 1e3 for first, whole in pairs]
        ms = statistics.median(rounds)
        return {
            "ms": ms, "ms_rounds": rounds, "gpu_ms": None, "against": "vLLM 0.22.1", "against_ms": self.their_ms,
            "ratio": self.their_ms / ms, "source": peers.VLLM_SOURCE,
        }  # fmt: skip

    def _seconds(self, llm: LLM, prompts: list[list[int]], new: int) -> float:
        _wait()
        start = time.perf_counter()
        with Flight(llm, prompts, [peers.wish(False, new)] * len(prompts)) as flight:
            while len(flight.ended) < len(prompts):
                flight.step()
            _wait()
            seconds = time.perf_counter() - start
            flight.finish()
        return seconds


class Flight:
    """Requests under way: how many tokens of each are known, and who has ended."""

    def __init__(self, llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]):
        self.llm, self.wanted = llm, params[0].max_tokens
        self.told = {llm.add_request(ids, wish): 0 for ids, wish in zip(prompts, params, strict=True)}
        self.ended: set[str] = set()
        self.left = 100 + 2 * len(prompts) + 4 * (self.wanted + sum(map(len, prompts)) // STEP_TOKENS)

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, *_) -> None:
        for name in self.told:  # a case that fails must leave nothing to the next
            self.llm.forget(name)

    @property
    def tokens(self) -> int:
        return sum(self.told.values())

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError(f"no end in sight; tokens of each request: {list(self.told.values())[:8]}")
        for delta in self.llm.step():
            self.told[delta.id] += len(delta.token_ids)
            if delta.finish_reason:
                self.ended.add(delta.id)

    def finish(self) -> None:
        """Run to the end. RuntimeError if a request has another number of tokens than it was to have."""
        while len(self.ended) < len(self.told):
            self.step()
        for name in self.told:
            choice = self.llm.result(name).choices[0]
            if (len(choice.token_ids), choice.finish_reason) != (self.wanted, "length"):
                raise RuntimeError(f"{len(choice.token_ids)} tokens, {choice.finish_reason}; expected {self.wanted}")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- the cases, and what is asked of them

Case = Steps | Answers | Peer


def cases() -> list[Case]:
    """The most important ones first."""
    one, context = "llama-3.2-1b", 512
    reach = {1: 0.88, 8: 0.82, 16: 0.82, 32: None, 64: 0.72}
    vllm = {
        shape: [Answers(shape, batch, ms, goal if batch < 128 else last) for batch, ms in peers.VLLM_MS[shape].items()]
        for shape, goal, last in ((one, 1.6, 1.3), ("llama-3.1-8b", 1.25, 1.1), ("qwen2.5-3b", 1.6, 1.3))
    }
    return [
        *(Steps(one, batch, context, goal) for batch, goal in reach.items()),
        Steps(one, 256, 1024, 0.80),
        *(Steps(one, batch, context, None, sampled=True) for batch in (1, 64)),
        *vllm[one],
        *(Peer(one, batch, context, goal) for batch, goal in ((1, 40.0), (32, 15.0))),
        Steps("llama-3.1-8b", 1, context, 0.93),
        *vllm["llama-3.1-8b"],
        Steps("qwen2.5-0.5b", 1, context, 0.75),
        *vllm["qwen2.5-3b"],
        Peer(one, 1, context, 3.0, compiled=True),
    ]


def choose(args: argparse.Namespace) -> list[Case]:
    """UsageError for a shape that there is not, and where no case has such a name."""
    if args.shape:
        shape_config(args.shape)
        return [Steps(args.shape, batch, context, None) for context in args.context for batch in args.batch]
    found = [case for case in cases() if args.compile or not (type(case) is Peer and case.compiled)]
    if args.quick:
        found = [case for case in found if type(case) is not Peer and case.shape == found[0].shape and case.batch < 16]
    wanted = [case for case in found if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.only)]
    if not wanted:
        raise UsageError("no case has such a name")
    needed = {case.ours for case in wanted if type(case) is Peer}
    return [case for case in found if case in wanted or case.name in needed]


def measured(group: Sequence[Steps | Answers], effort: Effort, options: dict, bandwidth: float) -> Iterator[tuple]:
    """(case, what was found) of cases of one shape; what was found has "failed" and the reason where there is none."""
    left, shape = list(group), group[0].shape
    options = dict(
        options, shape=shape, random_weights=True, prefix_cache=False, step_tokens=STEP_TOKENS,
        max_requests=max(case.batch for case in group), say=lambda line: print(f"{shape}: {line}", flush=True),
    )  # fmt: skip
    asked = sorted({(1, False)} | {(case.batch, case.sampled) for case in group})
    try:
        with LLM(**options, context=peers.GATE_LENGTH, cuda_graphs=False) as llm:
            right = {ask: peers.gate_answers(llm, ask, logprobs=True) for ask in asked}
        with LLM(**options, context=max(case.length(effort) for case in group)) as llm:
            gates = {ask: peers.gate(peers.gate_answers(llm, ask), right[ask], sampled=ask[1]) for ask in asked}
            while left:
                found = {"gate": gates[left[0].batch, left[0].sampled]}
                if wrong := found["gate"]["wrong"] or gates[1, False]["wrong"]:
                    found["failed"] = wrong
                else:
                    try:
                        found |= left[0].measure(llm, effort, bandwidth)
                    except Exception as error:  # GPU time is dear: one case that fails does not end the others
                        found["failed"] = _reason(error)
                yield left.pop(0), found
    except Exception as error:
        yield from ((case, {"failed": _reason(error)}) for case in left)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, LiteLLMError) else repr(error)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of cases, with wildcards")
    found.add_argument("--quick", action="store_true", help="few cases, few steps")
    found.add_argument("--compile", action="store_true", help="also transformers with torch.compile; minutes")
    found.add_argument("--shape", help="this shape alone, with --batch and --context")
    found.add_argument("--batch", type=int, nargs="+", default=[1])
    found.add_argument("--context", type=int, nargs="+", default=[512])
    found.add_argument("--json", type=Path)
    return found


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    began, gpu = time.perf_counter(), torch.cuda.is_available()
    try:
        chosen = choose(args)
        if not (gpu or args.shape):
            raise EnvironmentProblem("no GPU that torch can use")
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    effort = Effort(rounds=2, steps=12, warm=4, answers=1) if args.quick else Effort()
    options = {"device": "cuda" if gpu else "cpu", "dtype": "bfloat16" if gpu else "float32"}
    bandwidth = copy_rate(options["device"])
    if gpu:
        torch.cuda.empty_cache()
    rows: dict[str, dict] = {}
    gates = {"copy_gate": peers.copy_gate(**options), "demo_gate": peers.demo_gate(**options)}
    record = environment() | options | {"copy_tb_s": bandwidth / 1e12, "seconds": 0.0, "rows": []} | gates
    _write(args.json, record)
    if wrong := gates["copy_gate"]["wrong"] or gates["demo_gate"]["wrong"]:
        print(f"FAILED: {wrong}", file=sys.stderr)
        return 1
    for (is_peer, _), group in itertools.groupby(chosen, lambda case: (type(case) is Peer, case.shape)):
        group = list(group)
        own = measured(group, effort, options, bandwidth) if not is_peer else ()
        for case, row in own or ((case, case.measure(rows)) for case in group):
            rows[case.name] = {"case": case.name, "reach": case.reach} | row
            record |= {"rows": list(rows.values()), "seconds": time.perf_counter() - began}
            print(f"{record['seconds']:6.1f} s  {case.name}: {_said(rows[case.name])}", flush=True)
            _write(args.json, record)
    Console(width=150).print(table(record))
    return int(any("failed" in row for row in rows.values()))


def _write(path: Path | None, record: dict) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def _said(row: dict) -> str:
    """One line, as in the table."""
    if why := row.get("failed") or row.get("missing"):
        return f"{'FAILED' if 'failed' in row else 'missing'}: {why}"
    return " ".join(text for text in _cells(row) if text)


def _cells(row: dict) -> list[str]:
    low, high, gpu, gate = min(row["ms_rounds"]), max(row["ms_rounds"]), row["gpu_ms"], row.get("gate")
    remarks = ["SHORT"] * bool(row["reach"] and row["ratio"] < row["reach"])
    if "idle" in row and row["idle"] is None:
        remarks.append("the profiler saw nothing")
    elif "idle" in row:
        remarks.append(f"idle {row['idle']:.1%}, between launches {row['idle_between_launches']:.1%}")
    if gate and gate["equal"] < gate["answers"]:
        remarks.append(
            f"{gate['equal']} of {gate['answers']} answers equal, others part by {gate['widest_gap']:.2f} nats"
        )
    return [
        f"{row['ms']:.3f} ms", f"{low:.3f} to {high:.3f}", f"GPU {gpu:.3f}" if gpu else "",
        f"{row['against']} {row['against_ms']:.3f}", f"{row['ratio']:.3f}",
        f"of {row['reach']:g}" if row["reach"] else "", "; ".join(remarks),
    ]  # fmt: skip


def table(record: dict) -> Table:
    title = f"{record.get('gpu', record['cpu'])}, {record['dtype']}: copy {record['copy_tb_s']:.3g} TB/s"
    found = Table(title=title, caption=f"{record['seconds']:.0f} s in all")
    for name in ("case", "a step", "rounds", "GPU", "against, ms", "ratio", "to reach", "remarks"):
        found.add_column(name)
    for row in record["rows"]:
        wrong = "failed" in row or "missing" in row
        found.add_row(row["case"], *([_said(row)] if wrong else _cells(row)))
    return found


if __name__ == "__main__":
    sys.exit(main())
