"""Time a start: from the process's first moment to its first token, against importing torch and copying the weights.

    python tools/bench_start.py [CHECKPOINT] [--shape llama-3.2-1b] [--device cuda] [--rounds 5] [--json FILE]

Every figure is of a process of its own, the page cache warm. `yardstick` imports torch, starts CUDA and copies the
checkpoint's tensors to the device with safetensors. `start` is what the chat does up to its first token, kernels cached
on disk; `cold` is the same with an empty cache of kernels. Rounds alternate and medians are given. All starts must give
the same token, a warm one may compile nothing, and none may compile or load a kernel after it is ready: else the exit
code is 1. Without CHECKPOINT random weights of --shape are written to a temporary directory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, nothing installed

from lite_llm.weights import open_checkpoint
from tools.environment import environment
from tools.make_checkpoint import make_checkpoint

RATIO, SECONDS = 2.0, 8.0
"""What a warm start is to stay under: times the yardstick, and seconds."""

# Both print {"phases": [[name, seconds], ...]} and more; the first argument is when the parent started them.
YARDSTICK = """
import json, sys, time
marks = [("python", time.time())]
began, device, *files = sys.argv[1:]
import torch
marks.append(("import torch", time.time()))
if device.startswith("cuda"):
    torch.zeros(1, device=device).item()
    marks.append(("start CUDA", time.time()))
from safetensors import safe_open
held = []
for file in files:
    with safe_open(file, "pt", device=device) as tensors:
        held += [tensors.get_tensor(name) for name in tensors.keys()]
if device.startswith("cuda"):
    torch.cuda.synchronize()
marks.append(("copy weights", time.time()))
starts = [float(began)] + [at for _, at in marks]
print(json.dumps({"phases": [(name, at - start) for (name, at), start in zip(marks, starts)]}))
"""
START = """
import json, sys, time
marks = [("python", time.time())]
began, device, directory = sys.argv[1:]
import contextlib
from lite_llm.text import Tokenizer
Tokenizer.prepare(directory)
from lite_llm.engine.request import SamplingParams
from lite_llm.llm import LLM
marks.append(("import lite_llm", time.time()))

def mark(name):
    if marks[-1][0] == name:
        marks.pop()
    marks.append((name, time.time()))

def progress(done, total):
    if marks[-1][0] == "import lite_llm":
        marks.append(("config, tokenizer, model", time.time()))
    mark("load weights")

counter = contextlib.nullcontext()
if device.startswith("cuda"):
    from lite_llm.ops import warm
    counter = warm.counting()
with counter as counter:
    llm = LLM(directory, device=device, max_requests=4, progress=progress, status=lambda what, *_: mark(what))
    mark("the rest")
    ready = counter.count if counter else 0
    output = llm.generate([1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    mark("first token")
starts = [float(began)] + [at for _, at in marks]
print(json.dumps({
    "phases": [(name, at - start) for (name, at), start in zip(marks, starts)],
    "token": output.choices[0].token_ids[0],
    "compiled": len(counter.compiled) if counter else 0,
    "loaded": len(counter.loaded) if counter else 0,
    "after_ready": counter.count - ready if counter else 0,
}))
"""

IMPORTS = """
import lite_llm.llm, lite_llm.ops.triton, transformers
print('{"phases": []}')
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = args.checkpoint
        if directory is None:
            directory = Path(folder) / args.shape
            make_checkpoint(args.shape, directory, "bfloat16", 0, 5 << 30)
        record = measure(directory, args.device, args.rounds, Path(folder))
    wrong = complaints(record)
    show(record, wrong)
    if args.json:
        about = {"checkpoint": str(args.checkpoint) if args.checkpoint else f"random {args.shape}"}
        args.json.write_text(json.dumps(environment() | about | record | {"wrong": wrong}, indent=1) + "\n")
    return int(bool(wrong))


def measure(directory: Path, device: str, rounds: int, folder: Path) -> dict:
    directory = directory.resolve()
    files = [str(file) for file in sorted(directory.glob("*.safetensors"))]

    def yardstick(what: str) -> dict:
        return told(f"{what}: yardstick", child(YARDSTICK, device, *files))

    def start(what: str, cache: str) -> dict:
        run = child(START, device, str(directory), TRITON_CACHE_DIR=str(folder / cache))
        return told(f"{what}: start", run)

    yardstick("for nothing")  # files into the page cache
    child(IMPORTS)  # modules compiled to .pyc
    cold = start("no kernels cached", "kernels")
    yardsticks, starts = [], []
    for i in range(rounds):
        yardsticks.append(yardstick(f"round {i + 1} of {rounds}"))
        starts.append(start(f"round {i + 1} of {rounds}", "kernels"))
    middle = [statistics.median(run["seconds"] for run in runs) for runs in (yardsticks, starts)]
    return {
        "device": device,
        "bytes": open_checkpoint(directory).nbytes,
        "yardstick_s": middle[0],
        "start_s": middle[1],
        "cold_s": cold["seconds"],
        "ratio": middle[1] / middle[0],
        "yardsticks": yardsticks,
        "cold": cold,
        "starts": starts,
    }


def told(what: str, run: dict) -> dict:
    """The run, once it is said how long it took: there are minutes of them."""
    phases = ", ".join(f"{name} {spent:.2f}" for name, spent in run["phases"])
    print(f"{what}, {run['seconds']:.1f} s: {phases}", file=sys.stderr, flush=True)
    return run


def child(code: str, *arguments: str, **environment: str) -> dict:
    """What a fresh process prints, with the seconds from before it was started to its last phase."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}  # as the command line sets them
    done = subprocess.run(
        [sys.executable, "-c", code, repr(time.time()), *arguments],
        env=os.environ | settings | environment | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"a child process ended with code {done.returncode}; its error stands above")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": sum(spent for _, spent in found["phases"])}


def complaints(record: dict) -> list[str]:
    starts = [record["cold"], *record["starts"]]
    wrong = []
    if len({start["token"] for start in starts}) > 1:
        wrong.append(f"the first tokens differ: {[start['token'] for start in starts]}")
    if any(start["compiled"] for start in record["starts"]):
        wrong.append(f"a warm start compiled kernels: {[start['compiled'] for start in record['starts']]}")
    if any(start["after_ready"] for start in starts):
        wrong.append(f"kernels were compiled or loaded after ready: {[start['after_ready'] for start in starts]}")
    return wrong


def show(record: dict, wrong: list[str]) -> None:
    console = Console()
    table = Table(title=f"{record['bytes'] / 1e9:.2f} GB to {record['device']}, seconds", title_justify="left")
    table.add_column("phase")
    for name in ("yardstick", "start", "cold start"):
        table.add_column(name, justify="right")
    columns = [middle(record["yardsticks"]), middle(record["starts"]), dict(record["cold"]["phases"])]
    for phase in dict.fromkeys(name for column in columns for name in column):
        table.add_row(phase, *(f"{column[phase]:.2f}" if phase in column else "" for column in columns))
    totals = (record["yardstick_s"], record["start_s"], record["cold_s"])
    table.add_row("in all", *(f"{total:.2f}" for total in totals), style="bold")
    console.print(table)
    kernels, loaded = record["cold"]["compiled"], statistics.median(start["loaded"] for start in record["starts"])
    console.print(f"the cold start compiled {kernels} kernels, a warm one loads {loaded:g} from the disk")
    reached = record["ratio"] <= RATIO and record["start_s"] <= SECONDS
    console.print(
        f"{record['ratio']:.2f} times the yardstick (at most {RATIO:g} are wanted, and {SECONDS:g} s): "
        + ("reached" if reached else "missed")
    )
    for line in wrong:
        console.print(f"FAILED: {line}", style="red")


def middle(runs: list[dict]) -> dict[str, float]:
    """The median of each phase."""
    return {
        name: statistics.median(dict(run["phases"]).get(name, 0.0) for run in runs) for name, _ in runs[0]["phases"]
    }


if __name__ == "__main__":
    sys.exit(main())
