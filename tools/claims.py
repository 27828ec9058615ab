"""Claims of this project's ancestors, measured again on one GPU: their work, our hardware, equal tokens on both sides.

    python tools/claims.py --json claims.json                    all of them, in half an hour on an H200
    python tools/claims.py --only ll-1b ll-3b --json ll.json     some, with all of the time for them
    python tools/claims.py --quick                               the bundled demo: does the machinery run?
    python tools/claims.py --render claims.json ll.json          docs/claims.md from documents

Time is dealt out by SECONDS. What does not fit is left out or made shorter, and the document says so. Exit codes: 0 ok,
1 a refused figure or none at all, 2 usage, 3 no GPU, 130 Ctrl-C; rows that were done are in --json.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, nothing installed

from lite_llm.errors import EnvironmentProblem, LiteLLMError
from tools.needs import packages

with packages():
    import torch

    from lite_llm.cli.args import Parser
    from lite_llm.engine.roofline import Ceilings
    from tools.benchmark.bench import Bench, Facts
    from tools.benchmark.claims_page import render
    from tools.benchmark.claims_peers import Ladder, Shape, Versus, ladder, versus
    from tools.benchmark.claims_record import Document, load
    from tools.benchmark.claims_run import OPENING, Clock, Gates, Stage, forgiving
    from tools.benchmark.claims_serving import Energon, Flover, energon, flover
    from tools.benchmark.claims_texts import CLAIMS
    from tools.benchmark.main import ROOM
    from tools.benchmark.record import replace_file
    from tools.benchmark.sides import Limits

SECONDS = {
    "ci-7b": 170, "fl": 90, "en": 50, "ll-1b": 330, "ladder": 110, "ll-3b": 400, "ll-qwen": 480, "ci-13b": 90,
}  # fmt: skip
"""How the time is shared, in seconds when all claims are measured; what one leaves goes to those after it."""

PAGE = ROOT / "docs" / "claims.md"
_GATE = 40  # tokens of a request of the gate
_COPIED = 4 << 30, 64 << 20  # bytes of the buffers that measure memory: for claims, and for --quick


@dataclass(frozen=True)
class Measure:
    shape: str
    processes: str  # claims that follow each other and name the same share their sides
    run: Callable[[Stage, object], None]
    plan: Versus | Ladder | Flover | Energon
    quick: Versus | Ladder | Flover | Energon


def _generate(headline: int) -> Versus:
    others = tuple(Shape(batch, "10-30", (128,), 3) for batch in (1, 8, 16, 32))
    return Versus((Shape(headline, "10-30", (1900, 950, 475, 240, 120), 1), *others), compiled=1)


_GENERATE = Versus((Shape(3, "2-6", (16, 8), 1), Shape(1, "2-6", (6,), 2)), compiled=1)
_LONG_PROMPTS = Versus(tuple(Shape(batch, "1024", (128,), 3) for batch in (32, 8, 16)), compiled=3)
_SMALL = Versus((Shape(2, "12", (6,), 2), Shape(1, "12", (6,), 2)), compiled=2)
MEASURES = {
    "ci-7b": Measure("llama-2-7b", "7b", versus, _LONG_PROMPTS, _SMALL),
    "fl": Measure(
        "llama-2-7b", "7b", flover,
        Flover(32, 8, 504, 0.09, 0.5, (0.22, 0.88), (0.0036, 0.036, 0.18), "120-504", 2),
        Flover(4, 3, 12, 0.5, 0.05, (0.5,), (0.2,), "4-12", 2),
    ),
    "en": Measure(
        "llama-2-7b", "7b", energon,
        Energon("1-256", ((32, 1, 256), (8, 1, 256), (32, 64, 128), (8, 64, 128)), 3),
        Energon("1-16", ((4, 1, 12), (4, 4, 12)), 2),
    ),
    "ll-1b": Measure("llama-3.2-1b", "1b", versus, _generate(15), _GENERATE),
    "ladder": Measure("llama-3.2-1b", "rungs", ladder, Ladder(8, "10-115", 40, 9), Ladder(2, "4-16", 4, 3)),
    "ll-3b": Measure("llama-3.2-3b", "3b", versus, _generate(12), _GENERATE),
    "ll-qwen": Measure("qwen2.5-3b", "qwen", versus, _generate(15), _GENERATE),
    "ci-13b": Measure("llama-2-13b", "13b", versus, Versus(_LONG_PROMPTS.shapes, compiled=0), Versus(_SMALL.shapes, 0)),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parse(argv)
    try:
        if args.render is not None:
            replace_file(args.page, render([load(path) for path in args.render]).encode())
            return 0
        return measure(args, argv)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; rows that were done are in --json", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="claims.py", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECONDS, metavar="NAME", help=", ".join(SECONDS))
    parser.add_argument("--seconds", type=float, help=f"for all that is measured; default: {sum(SECONDS.values())}")
    parser.add_argument("--quick", action="store_true", help="tiny works on the bundled demo, with or without a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, written after each row")
    parser.add_argument("--render", nargs="*", type=Path, metavar="FILE.json", help="write the page, measure nothing")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE.md", help="that --render writes")
    args = parser.parse_args(argv)
    if args.seconds is not None and not 0 < args.seconds < 1e6:
        parser.error("--seconds: expected more than 0")
    return args


def measure(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if not (torch.cuda.is_available() or args.quick):
        raise EnvironmentProblem("torch sees no GPU", "the claims are about one; --quick tries the machinery without")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype if device == "cuda" else "float32"
    names = [name for name in SECONDS if name in (args.only or SECONDS)]
    seconds = args.seconds or float(sum(SECONDS.values()))
    clock = Clock(seconds, {name: SECONDS[name] for name in names})
    roof = Ceilings.measure(torch.device(device), getattr(torch, dtype), _COPIED[args.quick])
    arguments = {"argv": list(argv), "quick": args.quick, "dtype": dtype, "device": device, "seconds": seconds}
    limits = {"copy_tb_s": roof.copy / 1e12, "matmul_tflops": roof.matmul / 1e12}
    document = Document.begin(arguments, limits, args.json)
    session = _Session(document, clock, roof, shlex.join(["python", "tools/claims.py", *argv]))
    for _, group in itertools.groupby(names, lambda name: "demo" if args.quick else MEASURES[name].processes):
        session.measure(list(group))
    for line in summary(document):
        print(line)
    return int(not document.rows or any(row.refused for row in document.rows))


@dataclass(frozen=True)
class _Session:
    document: Document
    clock: Clock
    roof: Ceilings
    command: str

    def measure(self, names: list[str]) -> None:
        """Claims on one model: its processes are started once, and hold as much as the largest work needs."""
        arguments = self.document.arguments
        quick, device = arguments["quick"], arguments["device"]
        plans = {name: MEASURES[name].quick if quick else MEASURES[name].plan for name in names}
        facts = Facts.find(None, None if quick else MEASURES[names[0]].shape, 0, arguments["dtype"], device)
        most = max(plan.most for plan in plans.values())
        longest = max(_GATE, *(plan.longest for plan in plans.values()))
        slots = max(longest, most * _GATE, *(plan.slots for plan in plans.values())) + ROOM * most
        gates = Gates(self.document, facts.name)
        with Bench(facts, gates, self.roof, Limits(most, longest, slots), 1, self.say) as bench:
            for name in names:
                claim = next(claim for claim in CLAIMS if claim.name == name)
                stage = Stage(
                    claim, bench, gates, self.clock, self.document, self.command, hardware(self.document.environment)
                )
                self.say(f"{name}: {claim.title}, {self.clock.begin(name):.0f} s")
                with forgiving(stage, "the rest"):
                    if stage.fits("all of it", 0.0 if bench.sides else OPENING[device]):
                        MEASURES[name].run(stage, plans[name])

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def hardware(environment: dict) -> str:
    return f"one {environment['gpu']}" if environment.get("gpu") else f"a CPU, {environment.get('cpu_name')}"


def summary(document: Document) -> list[str]:
    """A line per row, ratio and omission."""
    lines = []
    for row in document.rows:
        seconds = ", ".join(f"{label} {side['seconds']['median']:.3g} s" for label, side in row.sides.items())
        lines.append(f"{row.claim}: {row.work}: {seconds}" + (f"; refused: {row.refused}" if row.refused else ""))
        lines += [f"  {one['ratio']['median']:.2f}x as fast as {one['against']}: {one['side']}" for one in row.ratios]
    return lines + [f"{one['claim']}: left out {one['what']}: {one['why']}" for one in document.left_out]


if __name__ == "__main__":
    raise SystemExit(main())
