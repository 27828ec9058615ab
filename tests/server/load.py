"""What HTTP costs: the same requests over a server and without one. No test of the suite, for it measures.

    python -m tests.server.load MODEL --concurrency 1 8 32 128

serves MODEL in a process of its own (`--device cuda` and so on go there), then opens it here. One JSON line each.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from contextlib import ExitStack

from lite_llm import LLM, SamplingParams
from lite_llm.text import Tokenizer
from tests.server.test_process import Process

SLOWDOWN = 2.0
"""What `serve` allows by default; without it other steps would be compared."""


def prompts(vocab: int, count: int, length: int) -> list[list[int]]:
    """Token ids that no two prompts begin with alike, so that the prefix cache is of no use."""
    dice = random.Random(1234)
    return [[dice.randrange(3, vocab) for _ in range(length)] for _ in range(count)]


async def one(port: int, prompt: list[int], tokens: int) -> tuple[float, float, int]:
    """Seconds to the first event and to the last, and how many events there were."""
    wishes = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body = json.dumps(wishes).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.perf_counter()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    first, events, tail = 0.0, 0, b""
    while piece := await reader.read(1 << 16):
        first = first or time.perf_counter() - start
        events, tail = events + piece.count(b"data: "), (tail + piece)[-100:]
    writer.close()
    assert b"data: [DONE]" in tail, tail
    return first, time.perf_counter() - start, events


async def over_http(port: int, work: list[list[int]], tokens: int, concurrency: int) -> dict[str, float]:
    places, found = asyncio.Semaphore(concurrency), []

    async def placed(prompt: list[int]) -> None:
        async with places:
            found.append(await one(port, prompt, tokens))

    start = time.perf_counter()
    await asyncio.gather(*map(placed, work))
    spent = time.perf_counter() - start
    firsts = sorted(first for first, _, _ in found)
    return {
        "tokens_per_second": len(work) * tokens / spent,
        "first_token_ms": statistics.median(firsts) * 1e3,
        "first_token_p99_ms": firsts[int(len(firsts) * 0.99)] * 1e3,
        "events_per_answer": statistics.mean(events for _, _, events in found),
    }


def offline(llm: LLM, work: list[list[int]], tokens: int, concurrency: int) -> dict[str, float]:
    """The step API with as many requests at a time."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    waiting, names, firsts = work[:], set(), []
    start = time.perf_counter()
    while waiting or names:
        while waiting and len(names) < concurrency:
            names.add(llm.add_request(waiting.pop(), params))
        for delta in llm.step():
            if delta.finish_reason:
                firsts.append(llm.result(delta.id).timings.first_token)
                names.discard(delta.id)
                llm.forget(delta.id)
    spent = time.perf_counter() - start
    return {"tokens_per_second": len(work) * tokens / spent, "first_token_ms": statistics.median(firsts) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="requests for each place")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    most = max(options.concurrency)
    context = options.input + options.output + 16

    def measure(how, vocab: int, side: str) -> None:
        how(prompts(vocab, 2, options.input), options.output, 1)
        for concurrency in options.concurrency:
            work = prompts(vocab, max(concurrency * options.rounds, 8), options.input)
            print(json.dumps({"side": side, "concurrency": concurrency, **how(work, options.output, concurrency)}))

    vocab = Tokenizer.load(options.model).vocab_size
    flags = [
        "--device",
        options.device,
        "--context",
        str(context),
        "--no-prefix-cache",
        "--max-slowdown",
        str(SLOWDOWN),
    ]
    with ExitStack() as stack:
        server = Process(*flags, "--max-requests", str(most), "--max-queue", "4096", options.model)
        stack.callback(server.end)
        stack.callback(server.child.terminate)
        port = int(server.wait_for(r"http://127\.0\.0\.1:(\d+)", 600)[1])
        measure(lambda *given: asyncio.run(over_http(port, *given)), vocab, "http")
    settings = dict(
        device=options.device, context=context, max_requests=most, prefix_cache=False, max_slowdown=SLOWDOWN
    )
    with LLM(options.model, say=lambda text: None, **settings) as llm:
        measure(lambda *given: offline(llm, *given), vocab, "offline")


if __name__ == "__main__":
    main()
