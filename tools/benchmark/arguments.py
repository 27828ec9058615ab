"""The command line of benchmark.py. Every value is checked here, before anything heavy is imported or started."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lite_llm.cli.args import Parser
from lite_llm.errors import UsageError
from tools.benchmark.record import HEADLINE
from tools.benchmark.sides import CLASSES

MODES = {
    "latency": "one batch at a time: time to first token, per token, tokens per second (default)",
    "throughput": "many requests of drawn lengths, all at once",
    "online": "requests that arrive over time: percentiles, and how many are served in time",
    "startup": "from the start of a process to its first token",
    "ablation": "what each part of the engine is worth, one taken away at a time",
    "accuracy": "logits and greedy tokens against transformers: noise or a bug",
}
ARRIVALS = ("every:", "poisson:", "burst:")  # else it is a file
_BATCHES, _STREAMS = ("latency", "startup", "ablation", "accuracy"), ("throughput", "online")
_FOR = {
    "batch": _BATCHES, "requests": _STREAMS, "arrivals": ("online",), "ttft": ("online",), "tpot": ("online",),
    "against": tuple(mode for mode in MODES if mode != "ablation"),
    "prefix_cache": ("latency", "throughput", "online", "accuracy"),
    "rounds": tuple(mode for mode in MODES if mode != "accuracy"), "plot": tuple(HEADLINE),
}  # fmt: skip
"""The modes of each option that some would ignore."""
_ONE_WORK = ("startup", "ablation", "accuracy")
_EXAMPLES = """\
modes:
{modes}

examples:
  python benchmark.py                                        the bundled demo, in under a minute, on any machine
  python benchmark.py --shape llama-3.2-1b --batch 1 8 32    random weights in a known model's sizes
  python benchmark.py online -m MODEL --arrivals poisson:8 --ttft 0.5 --tpot 0.05
  python benchmark.py --against self                         ourselves twice: no difference, or the benchmark is wrong
  python benchmark.py --json a.json && python benchmark.py --rerun a.json --baseline a.json
exit codes: 0 ok, 1 a refused figure or a figure below the baseline, 2 usage, 3 environment, 4 does not fit,
            5 model unsupported or corrupt, 6 network, access or disk, 130 Ctrl-C, 141 closed pipe"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    modes = "\n".join(f"  {name:<11} {text}" for name, text in MODES.items())
    parser = Parser(
        prog="benchmark.py", description="Measure lite_llm on this machine, against transformers and others.",
        epilog=_EXAMPLES.format(modes=modes),
    )  # fmt: skip
    parser.add_argument("mode", nargs="?", default="latency", choices=MODES, metavar="MODE", help="see below")
    model = parser.add_argument_group("model (default: the bundled demo)")
    which = model.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", metavar="PATH_OR_ID", help="a directory in Hugging Face format, or a hub id")
    which.add_argument(
        "--shape", metavar="NAME", help="a known model's sizes with random weights; nothing is downloaded"
    )
    model.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    model.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")

    sides = parser.add_argument_group("opponents")
    known = [name for name in CLASSES if name != "lite_llm"]
    sides.add_argument(
        "--against", nargs="+", choices=(*known, "self", "none"), metavar="SIDE",
        help=f"{', '.join(known)}, self or none; default: transformers",
    )  # fmt: skip
    sides.add_argument("--prefix-cache", action="store_true", help="let our side keep prefixes; off by default")

    work = parser.add_argument_group("work")
    work.add_argument("--batch", nargs="+", type=_count, metavar="N", help="latency: requests at a time")
    work.add_argument("--input", nargs="+", metavar="LENGTHS", help="of prompts: 128, 10-30, 64,128, lognormal:200:0.8")
    work.add_argument("--output", nargs="+", metavar="LENGTHS", help="of answers, forced on every side")
    work.add_argument("--requests", type=_count, metavar="N", help="throughput and online")
    work.add_argument(
        "--arrivals", metavar="HOW",
        help="online: every:SECONDS, poisson:RATE, burst:SIZE:SECONDS, or a JSONL file; default: poisson:4, demo 16",
    )  # fmt: skip
    work.add_argument("--ttft", type=_seconds, metavar="S", help="online: a first token later than this is too late")
    work.add_argument("--tpot", type=_seconds, metavar="S", help="online: slower tokens, on average, are too late")
    work.add_argument("--max-requests", type=_count, metavar="N", help="that advance together, on every side")
    work.add_argument("--rounds", type=_count, metavar="N", help="of every side, by turns; default: 9, of the demo 6")
    work.add_argument("--seed", type=int, default=0, metavar="N")
    work.add_argument("--quick", action="store_true", help="small works and 4 rounds: does it run?")

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything, written after each row")
    output.add_argument("--csv", type=Path, metavar="FILE")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="needs requirements-plot.txt")
    output.add_argument("--baseline", type=Path, metavar="FILE.json", help="compare with an earlier document")
    output.add_argument("--rerun", type=Path, metavar="FILE.json", help="the same arguments as that document's run")
    found = parser.parse_args(argv)
    for name in ("against", "batch", "input", "output"):  # what is said twice is measured once
        setattr(found, name, list(dict.fromkeys(getattr(found, name) or ())) or None)
    if wrong := _ignored(found) or _confused(found):
        parser.error(wrong)
    found.against = found.against or ([] if found.mode == "ablation" else ["transformers"])
    return found


def _ignored(found: argparse.Namespace) -> str | None:
    """What the user asks for and the mode has no use for."""
    mode = found.mode
    for name, modes in _FOR.items():
        if getattr(found, name) and mode not in modes:
            return f"--{name.replace('_', '-')} is for {', '.join(modes)}; {mode} has no use for it"
    for name in ("batch", "input", "output"):
        if mode in _ONE_WORK and len(getattr(found, name) or ()) > 1:
            return f"--{name} {' '.join(map(str, getattr(found, name)))}: {mode} measures one, so name one"
    if found.arrivals and not found.arrivals.startswith(ARRIVALS):
        for name in ("input", "output", "requests"):
            if getattr(found, name):
                return f"--{name}: the requests are those of --arrivals {found.arrivals}, with their lengths"
    return None


def _confused(found: argparse.Namespace) -> str | None:
    """What cannot be had together."""
    if "none" in (found.against or ()) and len(found.against) > 1:
        return "--against none stands alone"
    if found.baseline and found.rounds == 1 and found.mode != "accuracy":
        return "--baseline needs two --rounds or more: one run tells nothing of the noise"
    read = {path.resolve(): f"--{name}" for name in ("baseline", "rerun") if (path := getattr(found, name))}
    for name in ("json", "csv", "plot"):
        path = getattr(found, name)
        if path and (other := read.setdefault(path.resolve(), f"--{name}")) != f"--{name}":
            return f"{other} and --{name} are one file, {path}; each needs its own"
    return None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 8):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}; expected seconds, more than 0")
    return value


def single(lengths: str, name: str) -> int:
    """A length that must be one number."""
    if not (lengths.isascii() and lengths.isdigit()):
        raise UsageError(f"--{name} {lengths}; expected a number of tokens in this mode")
    return int(lengths)


def argv_without_outputs(argv: Sequence[str]) -> list[str]:
    """What makes a run what it is: a rerun names its own files."""
    found, skip = [], False
    for word in argv:
        if word in ("--json", "--csv", "--plot", "--baseline", "--rerun"):
            skip = True
        elif skip:
            skip = False
        elif not word.startswith(("--json=", "--csv=", "--plot=", "--baseline=", "--rerun=")):
            found.append(word)
    return found
