"""How many steps/s an engine keeps while HTTP listens. No test of the suite, for it measures.

    python -m tests.server.steps --streams 64 128 --calls 10

The engine here only sleeps 1 ms a step and says one token for each stream. `--calls`: between these many calls that
release the interpreter's lock, as CUDA's do, it also keeps Python busy for 0.5 ms. One JSON line each: stepped by
itself, in the process that speaks HTTP, and in a process of its own.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch

from lite_llm.llm import DEMO, LLM
from lite_llm.outputs import Choice, Delta, Output, Timings, Usage
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.steady import Steady
from tests.server.conftest import Running

_TOKENS = 1500
_SLEEP, _BUSY = 0.001, 0.0005  # seconds of a step
_CLIENT = """
import asyncio, sys
from tests.server.load import over_http
port, streams, tokens = map(int, sys.argv[1:])
print(asyncio.run(over_http(port, [[3, 4, 5]] * streams, tokens, streams))["events_per_answer"])
"""


class Sleeper:
    """In the place of an `LLM`."""

    def __init__(self, model=None, *, say=None, calls=0, **_):
        with LLM(say=lambda text: None, device="cpu", kv_tokens=64) as real:
            self.cfg, self.tokenizer, self.read = real.cfg, real.tokenizer, real.read
        self.name, self.folder, self._calls = "sleeper", DEMO, calls
        self._requests: dict[str, list] = {}  # tokens said, and the parameters
        self.times: list[tuple[float, int]] = []  # of each step its end, and how many tokens it has said
        kv = SimpleNamespace(k=torch.zeros(1))
        self.engine = _Engine(SimpleNamespace(max_requests=1024), kv, self._requests)

    def add_request(self, prompt, params, id, salt="", deadline=None):
        self._requests[id] = [0, params]

    def step(self) -> list[Delta]:
        for _ in range(self._calls):
            end = time.thread_time() + _BUSY / self._calls
            while time.thread_time() < end:
                pass
            time.sleep(0)
        time.sleep(_SLEEP)
        news = []
        for name, request in self._requests.items():
            request[0] += 1
            news.append(Delta(name, 0, " word", (5,), "length" if request[0] == request[1].max_tokens else None))
        self.times.append((time.perf_counter(), len(news)))
        return news

    def result(self, id: str) -> Output:
        said, params = self._requests[id]
        choice = Choice(0, " word" * said, (5,) * said, "length", None, 0)
        return Output(id, (), (choice,), Usage(3, 0, said), Timings(0.1, 1.0, 10.0, 0.1), params)

    def forget(self, id: str) -> None:
        self._requests.pop(id, None)


class _Engine:
    def __init__(self, scheduler, kv, requests):
        self.scheduler, self.kv, self._requests = scheduler, kv, requests

    @property
    def idle(self) -> bool:
        return not self._requests


def kept(steady: Steady, streams: int) -> float:
    """Steps/s while all streams ran, since the last question."""
    times = [moment for moment, said in steady.llm.times if said == streams]
    times = times[len(times) // 10 : -len(times) // 10]
    steady.llm.times.clear()
    return (len(times) - 1) / (times[-1] - times[0])


def alone(calls: int, streams: int) -> float:
    llm = Sleeper(calls=calls)
    for i in range(streams):
        llm.add_request(None, SimpleNamespace(max_tokens=0), f"request-{i}")
    for _ in range(_TOKENS):
        llm.step()
    return kept(SimpleNamespace(llm=llm), streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--calls", type=int, default=0)
    options = parser.parse_args()
    gc.freeze()
    for streams in options.streams:
        found = alone(options.calls, streams)
        print(json.dumps({"engine": "alone", "streams": streams, "steps_per_second": found}), flush=True)
    for where, kind in (("same process", Sleeper), ("own process", partial(RemoteLLM, make=Sleeper))):
        with contextlib.ExitStack() as stack:
            llm = kind(say=lambda text: None, calls=options.calls)
            if isinstance(llm, RemoteLLM):
                stack.enter_context(llm)
            running = stack.enter_context(Running(llm, max_queue=1000))
            for streams in options.streams:
                argv = map(str, (running.port, streams, _TOKENS))
                events = float(subprocess.check_output([sys.executable, "-c", _CLIENT, *argv]))
                steps = running.inside(partial(kept, streams=streams))
                line = {"engine": where, "streams": streams, "steps_per_second": steps}
                print(json.dumps(line | {"events_per_token": events / _TOKENS}), flush=True)


if __name__ == "__main__":
    from tests.server import steps  # so that the child finds these under their own name

    steps.main()
