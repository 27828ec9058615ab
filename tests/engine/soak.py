"""Thousands of copies together, with cancels, preemptions and failing steps: every answer exact, no slot lost?

    python -m tests.engine.soak [--requests 10000] [--concurrent 256] [--device cuda] [--seed 0] [--json FILE]

The bundled model that repeats a string runs as users run it, on a GPU with its graphs, in a pool of a third of what its
requests want. After each step everything is counted again. No test of the suite, for it takes minutes on a CPU; the
suite runs it with few requests. Exit code 1 for the first wrong answer or lost slot.
"""

import argparse
import json
import random
import time
from pathlib import Path

from lite_llm import LLM, SamplingParams
from lite_llm.llm import DEMO
from tests.engine.test_engine import copies
from tools.environment import environment

CANCELLED, FAILED = 0.1, 0.001  # of the steps: before how many a request is cancelled, and how many fail
LONGEST = 40  # symbols of a string


class Wrong(Exception):
    pass


def soak(requests: int, concurrent: int, device: str, seed: int) -> dict:
    """Counts of what happened. Wrong if anything did that should not."""
    draw, count = random.Random(seed), dict.fromkeys(("exact", "cancelled", "failed", "preempted", "steps"), 0)
    options = dict(device=device, context=2 * LONGEST + 16, max_requests=concurrent, say=lambda text: None)
    with LLM(DEMO.parent / "copy", kv_tokens=concurrent * LONGEST * 2 // 3, **options) as llm:
        todo = copies(llm.tokenizer, draw, requests, LONGEST)
        engine, scheduler = llm.engine, llm.engine.scheduler
        preempt, run = scheduler._preempt, engine.runner.run

        def counted(request) -> None:
            count["preempted"] += 1
            preempt(request)

        def failing(*arguments, **more) -> None:
            if draw.random() < FAILED:
                raise RuntimeError("a step that fails")
            run(*arguments, **more)

        scheduler._preempt, engine.runner.run = counted, failing
        flying: dict[str, list[int]] = {}
        start = time.perf_counter()
        while todo or flying:
            while todo and len(flying) < 2 * concurrent:
                request, answer = todo.pop()
                wish = SamplingParams(max_tokens=request.params.max_tokens, temperature=0.0)
                flying[llm.add_request(request.ids, wish)] = answer
            if draw.random() < CANCELLED:
                llm.abort(draw.choice(list(flying)))
            try:
                llm.step()
            except RuntimeError as error:
                if str(error) != "a step that fails":
                    raise
            count["steps"] += 1
            scheduler.check()
            for name in [name for name in flying if llm.finished(name)]:
                count[_judged(llm.result(name).choices[0], flying.pop(name))] += 1
                llm.forget(name)
        prefix = scheduler.prefix
        if prefix.protected or prefix.size + scheduler.slots.free_count != scheduler.capacity:
            raise Wrong(f"{scheduler.capacity - prefix.size - scheduler.slots.free_count} slots are lost")
    return count | {"seconds": time.perf_counter() - start, "slots": scheduler.capacity}


def _judged(choice, answer: list[int]) -> str:
    got = list(choice.token_ids)
    if got != answer[: len(got)]:
        raise Wrong(f"{got} instead of {answer}")
    if choice.finish_reason == "stop" and got == answer:
        return "exact"
    kinds = {"abort": "cancelled", "error": "failed"}
    if choice.finish_reason not in kinds:
        raise Wrong(f"{got} ended with {choice.finish_reason}; {answer} was to come")
    return kinds[choice.finish_reason]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        found = soak(args.requests, args.concurrent, args.device, args.seed)
    except Wrong as wrong:
        print(f"WRONG: {wrong}")
        return 1
    print(found)
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps(environment() | arguments | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
