"""What bench_engine.py compares with: transformers, vLLM's figures, and answers that are known to be right.

As a program: milliseconds per decode step of transformers' `generate`, greedy, random weights, one JSON line per batch.

    python tools/bench_peers.py [--shape llama-3.2-1b] [--batch 1 32] [--context 512] [--new 64] [--compiled]

A step is (time of an answer of NEW tokens - time of an answer of one) / (NEW - 1), the median of three rounds: prompt
and set-up cancel. CONTEXT is the mean length that its attention sees. `--compiled`: static cache and torch.compile.
It runs in a process of its own, so that a compilation can be stopped and its memory is free afterwards.
"""

import argparse
import dataclasses
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, nothing installed

from lite_llm import LLM, SamplingParams
from lite_llm.llm import DEMO
from lite_llm.models import shapes
from lite_llm.outputs import Output

VLLM_SOURCE = (
    "vLLM 0.22.1 (torch 2.11, FlashAttention-3, torch.compile and full CUDA graphs, its defaults, prefix cache off), "
    "one NVIDIA H200, random bf16 weights, input 128, output 256, offline; measured at another time, not in this run"
)
VLLM_MS = {
    "llama-3.2-1b": {1: 1.248, 8: 1.302, 32: 1.436, 128: 2.396},
    "qwen2.5-3b": {1: 2.971, 8: 3.061, 32: 3.210, 128: 3.940},
    "llama-3.1-8b": {1: 4.981, 8: 5.102, 32: 5.515, 128: 7.423},
}
"""Milliseconds per decode step, by shape and batch."""

_LIMIT = {False: 150.0, True: 300.0}  # seconds that transformers may take, by whether it is compiled
NEAR = 0.25
"""How far below the best a token may be, in nats, where two engines differ: that much rounding moves logits of bf16."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args(arguments)
    if args.new < 2 or args.context <= args.new // 2:
        print(f"error: --new {args.new}; expected 2 or more, and half of it below --context", file=sys.stderr)
        return 2
    model = random_model(args.shape)
    for batch in args.batch:
        ids = torch.randint(model.config.vocab_size, (batch, args.context - args.new // 2), device=model.device)
        print(json.dumps({"batch": batch} | measure(model, ids, args.new, args.rounds, args.compiled)), flush=True)
    return 0


@dataclass(frozen=True)
class Peer:
    """transformers' step against ours at the same shape, batch and mean context; `reach` is of theirs over ours."""

    shape: str
    batch: int
    context: int
    reach: float
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"transformers/{'compiled' if self.compiled else 'eager'}/b{self.batch}"

    @property
    def ours(self) -> str:
        """The name of the case that has our figure."""
        return f"{self.shape}/b{self.batch}/c{self.context}"

    def measure(self, ours: dict[str, dict]) -> dict:
        """`ours`: rows by case. "missing" and the reason where either side has no figure."""
        mine = ours.get(self.ours, {})
        theirs = in_own_process(self.shape, self.batch, self.context, self.compiled, _LIMIT[self.compiled])
        row = {"against": "transformers", "theirs": theirs}
        if why := theirs.get("missing") or (None if "ms" in mine else "no figure of ours to compare with"):
            return row | {"missing": why}
        return row | {name: mine[name] for name in ("ms", "ms_rounds", "gpu_ms")} | {
            "against_ms": theirs["ms"], "ratio": theirs["ms"] / mine["ms"],
        }  # fmt: skip


def in_own_process(shape: str, batch: int, context: int, compiled: bool, limit: float) -> dict:
    """What `main` finds for one batch within `limit` seconds, or "missing" and the reason."""
    command = [sys.executable, __file__, "--shape", shape, "--batch", str(batch), "--context", str(context)]
    try:
        done = subprocess.run(command + ["--compiled"] * compiled, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": f"not done after {limit:g} s"}
    found = [row for line in done.stdout.decode().splitlines() if (row := _row(line))]
    return found[0] if found else {"missing": f"exit code {done.returncode}: {_last_line(done.stderr)}"}


def _row(line: str) -> dict | None:
    """The line as a result; libraries may print others."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "batch" in row else None


def _last_line(output: bytes) -> str:
    return (output.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:300]


def random_model(shape: str) -> torch.nn.Module:
    """transformers' model with the initial weights that its config describes, on a GPU if there is one."""
    gpu = torch.cuda.is_available()
    config = transformers.AutoConfig.for_model(**shapes.shape_config(shape))
    with torch.device("cuda" if gpu else "cpu"):
        dtype = torch.bfloat16 if gpu else torch.float32
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measure(model: torch.nn.Module, prompts: torch.Tensor, new: int, rounds: int, compiled: bool) -> dict:
    """RuntimeError if an answer has another number of tokens than was asked for, or if nothing was compiled."""
    run = _runner(model, prompts, new, compiled=False)
    _, plain = run(new)  # warms up, too
    if compiled:
        run = _runner(model, prompts, new, compiled=True)
        for _ in range(2):  # compiled and recorded, then settled
            run(new)
    steps, answers = [], []
    for _ in range(rounds):
        first, _ = run(1)
        total, answer = run(new)
        steps.append((total - first) / (new - 1) * 1e3)
        answers.append(answer)
    if compiled and prompts.is_cuda and not counters["stats"]["unique_graphs"]:
        raise RuntimeError("transformers compiled nothing")
    return {
        "ms": statistics.median(steps), "ms_rounds": steps, "prompt": prompts.shape[1], "new": new,
        "compiled": compiled, "repeats": all(torch.equal(answer, answers[0]) for answer in answers),
        "tokens_as_eager": (answers[0] == plain).float().mean().item(),
    }  # fmt: skip


def _runner(
    model: torch.nn.Module, prompts: torch.Tensor, new: int, compiled: bool
) -> Callable[[int], tuple[float, torch.Tensor]]:
    """A function of how many tokens to make: seconds, and the new tokens."""
    gpu, length = prompts.is_cuda, prompts.shape[1]
    extra = {"cache_implementation": "static", "compile_config": transformers.CompileConfig(mode="reduce-overhead")}
    if not gpu:
        del extra["compile_config"]  # transformers compiles on GPUs only

    def enough(ids: torch.Tensor, *_, most: int) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= length + most, device=ids.device)

    def run(n: int) -> tuple[float, torch.Tensor]:
        # Always `new` at most: the static cache has that size, and another size would be compiled again.
        stop = transformers.StoppingCriteriaList([lambda ids, *_, **__: enough(ids, most=n)] if n < new else [])
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, pad_token_id=0,
            eos_token_id=None, stopping_criteria=stop, **(extra if compiled else {}),
        )  # fmt: skip
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if out.shape[1] != length + n or not torch.equal(out[:, :length], prompts):
            raise RuntimeError(f"generate gave {out.shape[1] - length} tokens; expected {n} behind the prompt")
        if not ((out >= 0) & (out < model.config.vocab_size)).all():
            raise RuntimeError("generate gave token ids that the model does not have")
        return seconds, out[:, length:].clone()

    return run


# ---- right answers

Asked = tuple[int, bool]
"""Of the gate: how many requests, and whether they are sampled."""

GATE_PROMPT, GATE_NEW = 24, 16  # tokens
GATE_LENGTH = GATE_PROMPT + GATE_NEW
GATE_TOP_K = 10  # of sampled answers; the reference tells twice as many logprobs, to judge what lies just below


def random_prompts(llm: LLM, batch: int, length: int) -> list[list[int]]:
    return torch.randint(llm.cfg.vocab, (batch, length), generator=torch.Generator().manual_seed(batch)).tolist()


def wish(sampled: bool, new: int, seed: int = 0, logprobs: int | None = None) -> SamplingParams:
    how = dict(temperature=0.7, top_k=20, top_p=0.8) if sampled else dict(temperature=0.0)
    return SamplingParams(max_tokens=new, ignore_eos=True, seed=seed, logprobs=logprobs, **how)


def gate_answers(llm: LLM, asked: Asked, logprobs: bool = False) -> list[Output]:
    """`logprobs`: as the reference of `gate`."""
    batch, sampled = asked
    wishes = [wish(sampled, GATE_NEW, seed, 2 * GATE_TOP_K if logprobs else None) for seed in range(batch)]
    if sampled:
        wishes = [dataclasses.replace(each, top_k=GATE_TOP_K) for each in wishes]
    return llm.generate(random_prompts(llm, batch, GATE_PROMPT), wishes)


def copy_gate(device: str, dtype: str) -> dict:
    """Answers of the bundled model that repeats a string of distinct symbols; "wrong" is None if all are right."""
    with LLM(DEMO.parent / "copy", device=device, dtype=dtype, max_requests=16) as llm:
        known, draw = llm.tokenizer, random.Random(0)
        symbols = [token for token in range(known.vocab_size) if token not in known.special_ids]
        texts = [draw.sample(symbols, draw.randint(1, 48)) for _ in range(48)]
        prompts = [[known.bos_id, *text, known.encode("<sep>")[-1]] for text in texts]
        answers = llm.generate(prompts, SamplingParams(max_tokens=60, temperature=0.0))
    right = [list(a.choices[0].token_ids) == [*t, min(known.eos_ids)] for t, a in zip(texts, answers, strict=True)]
    wrong = None if all(right) else f"{right.count(False)} of {len(right)} copies are wrong"
    return {"answers": len(right), "equal": right.count(True), "wrong": wrong}


def demo_gate(device: str, dtype: str) -> dict:
    """`gate` of the bundled chat model against its fp32 reference on the CPU."""
    asks = ["What is the capital of France?", "What is 7 + 5?", "My name is Ada.", "How do you spell cat?"]
    chats = [[{"role": "user", "content": ask}] for ask in asks]
    with LLM(device="cpu", dtype="float32", max_requests=4) as llm:
        right = llm.chat(chats, wish(False, GATE_NEW, logprobs=5))
    with LLM(device=device, dtype=dtype, max_requests=4) as llm:
        return gate(llm.chat(chats, wish(False, GATE_NEW)), right, sampled=False)


def gate(got: list[Output], want: list[Output], sampled: bool) -> dict:
    """Compare answers with those of the reference, which know their best tokens' logprobs.

    Where two part, the token must be as good up to rounding: within NEAR of the best, or of the last that top-k leaves.
    """
    found = {"answers": len(want), "equal": 0, "widest_gap": 0.0, "wrong": None}
    for index, (mine, right) in enumerate(zip(got, want, strict=True)):
        ours, theirs = mine.choices[0], right.choices[0]
        if (len(ours.token_ids), ours.finish_reason) != (len(theirs.token_ids), theirs.finish_reason):
            found["wrong"] = f"answer {index} has {len(ours.token_ids)} tokens, {ours.finish_reason}"
            continue
        pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=True))
        parts = next((at for at, (a, b) in pairs if a != b), None)
        found["equal"] += parts is None
        if parts is None:
            continue
        best = theirs.logprobs[parts].top
        gap = next((best[0][1] - logprob for token, logprob in best if token == ours.token_ids[parts]), math.inf)
        if gap > NEAR + (best[0][1] - best[GATE_TOP_K - 1][1] if sampled else 0.0):
            found["wrong"] = f"answer {index} parts at token {parts} by {gap:.2f} nats"
        else:
            found["widest_gap"] = max(found["widest_gap"], gap)
    return found


if __name__ == "__main__":
    sys.exit(main())
