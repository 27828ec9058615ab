"""`python benchmark.py`: arguments to works, works to a record, the record to tables, files and an exit code."""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lite_llm.cli.flight import FlightView
from lite_llm.engine.roofline import Ceilings
from lite_llm.errors import EnvironmentProblem, LiteLLMError, UsageError
from lite_llm.outputs import InFlight
from tools.benchmark import arguments, baseline, modes, plot, table
from tools.benchmark.bench import AGAIN, OURS, Bench, Facts, takes
from tools.benchmark.modes import Job
from tools.benchmark.record import Record, load
from tools.benchmark.sides import Limits
from tools.benchmark.work import Lengths, Work, batch, burst, fixed, many, poisson, trace

_ARRIVALS = ("every:", "poisson:", "burst:")  # else it is a file
ROOM = 64
"""Slots that a running request may hold ahead of its tokens."""
_GATE = 40  # tokens of a request of the gate


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = arguments.parse(argv)
        if args.rerun:
            argv = [*load(args.rerun).arguments["argv"], *_outputs(argv)]
            args = arguments.parse(argv)
        return run(args, argv)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run(args: Namespace, argv: list[str]) -> int:
    before = load(args.baseline) if args.baseline else None
    if args.plot:
        plot.check(args.plot)
    for path in (args.csv, args.plot):
        if path and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no directory {path.absolute().parent}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("--device cuda, but torch sees no GPU", "leave it out to measure the CPU")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    facts = Facts.find(
        args.model, args.shape, args.seed, args.dtype or ("bfloat16" if device == "cuda" else "float32"), device
    )
    _defaults(args, small=args.quick or not (args.model or args.shape))
    jobs = _jobs(args, facts)
    limits = _limits(args, facts, jobs)
    labels = [OURS] + [AGAIN if side == "self" else side for side in args.against if side != "none"]
    with Teller(total=len(jobs) * (args.rounds + 1) * len(labels)) as say:
        say("what copies and matmuls reach here")
        roof = Ceilings.measure(torch.device(device), getattr(torch, facts.dtype))
        record = Record.begin(
            {"argv": arguments.argv_without_outputs(argv)} | _resolved(args, limits),
            {"name": facts.name, "dtype": facts.dtype, "random_weights": bool(args.shape), "device": device},
            {"copy_tb_s": roof.copy / 1e12, "matmul_tflops": roof.matmul / 1e12}, args.json,
        )  # fmt: skip
        view = say.flight if args.mode == "online" and say.console.is_terminal else None
        failed: BaseException | None = None
        try:
            with Bench(facts, record, roof, limits, args.rounds, say, view, args.prefix_cache) as bench:
                record.arguments["sides"] = bench.infos
                _measure(args, bench, jobs, labels)
        except (LiteLLMError, KeyboardInterrupt) as error:
            failed = error
    console = Console()
    if record.rows or not failed:
        table.show(record, console)
    if failed:
        raise failed
    if args.csv:
        table.csv(record, args.csv)
    if args.plot:
        plot.plot(record, args.plot)
    findings = baseline.compare(record, before) if before else []
    for finding in findings:
        console.print(str(finding), markup=False, highlight=False)
    refused = any(record.refusal(row) or row.figures.get("verdict") == "bug" for row in record.rows)
    refused = refused or any(gate["wrong"] for gate in record.gates)
    return int(refused or any(finding.fails for finding in findings))


def _measure(args: Namespace, bench: Bench, jobs: list[Job], labels: list[str]) -> None:
    match args.mode:
        case "latency":
            modes.latency(bench, jobs, labels)
        case "throughput":
            modes.throughput(bench, jobs, labels)
        case "online":
            modes.online(bench, jobs, labels, args.ttft, args.tpot)
        case "startup":
            modes.startup(bench, jobs[0], labels)
        case "ablation":
            modes.ablation(bench, *jobs)
        case "accuracy":
            modes.accuracy(bench, jobs[0], labels, bench.facts.directory)


def _defaults(args: Namespace, small: bool) -> None:
    """What the user left out; small for the demo and --quick, which run anywhere in under a minute."""
    one = args.mode in ("latency", "startup", "ablation", "accuracy")
    args.rounds = args.rounds or (4 if args.quick else 6 if small else 9)
    args.batch = args.batch or ([1, 4] if args.quick else [1, 8] if small else [1, 8, 32])
    args.input = args.input or (["16"] if args.quick else ["32"] if small else ["128"] if one else ["64-512"])
    args.output = args.output or (["16"] if args.quick else ["32"] if small else ["128"] if one else ["32-256"])
    args.requests = args.requests or (8 if args.quick else 32 if small else 256)


def _jobs(args: Namespace, facts: Facts) -> list[Job]:
    limits = {"first token": args.ttft, "tokens": args.tpot}
    note = ", ".join(f"{name} in {seconds:g} s" for name, seconds in limits.items() if seconds)

    def job(make: Callable[[int], Work], **about) -> Job:
        return Job(lambda turn: make(1000 * (args.seed + 1) + turn), about, note and f", {note}")

    common = (facts.vocab, facts.banned)
    if args.arrivals and not args.arrivals.startswith(_ARRIVALS):
        return [job(lambda seed: trace(Path(args.arrivals), common[0], seed, common[1]), trace=args.arrivals)]
    if args.mode in ("throughput", "online"):
        return [
            job(lambda seed, p=p, n=n: _many(args, *common, p, n, seed), prompt=p, new=n, requests=args.requests)
            for p in args.input
            for n in args.output
        ]
    sizes = [(b, p, n) for b in args.batch for p in args.input for n in args.output]
    sizes = [(b, arguments.single(p, "input"), arguments.single(n, "output")) for b, p, n in sizes]
    jobs = [
        job(lambda seed, b=b, p=p, n=n: batch(common[0], b, p, n, seed, common[1]), batch=b, prompt=p, new=n)
        for b, p, n in sizes
    ]
    if args.mode == "ablation":
        b, p, n = sizes[-1]
        mixed = Lengths.parse(f"{max(n // 8, 1)}-{2 * n}")
        jobs = [
            jobs[-1],
            job(lambda seed: many(common[0], 4 * b, Lengths.parse(str(p)), mixed, seed, banned=common[1])),
            job(lambda seed: _prefixed(common[0], b, p, n, seed, common[1])),
        ]
    return jobs[:1] if args.mode in ("startup", "accuracy") else jobs


def _many(args: Namespace, vocab: int, banned: frozenset[int], prompt: str, new: str, seed: int) -> Work:
    how, arrivals = args.arrivals, None
    if how:
        kind, *numbers = how.split(":")
        try:
            values = [float(number) for number in numbers]
            arrivals = {
                "every": fixed,
                "poisson": poisson,
                "burst": lambda size, gap: burst(int(size) if size == int(size) else size, gap),
            }[kind](*values)
        except (ValueError, TypeError):
            raise UsageError(
                f"--arrivals {how}", "expected every:SECONDS, poisson:RATE, burst:SIZE:SECONDS or a file"
            ) from None
    return many(vocab, args.requests, Lengths.parse(prompt), Lengths.parse(new), seed, arrivals, banned)


def _prefixed(vocab: int, size: int, prompt: int, new: int, seed: int, banned: frozenset[int]) -> Work:
    """Prompts whose first seven eighths are the same, and the same in all rounds: what a system prompt is."""
    common = batch(vocab, 1, max(prompt * 7 // 8, 1), 1, 1, banned).asks[0].ids
    own = batch(vocab, size, max(prompt - len(common), 1), new, seed, banned)
    asks = tuple(type(ask)(common + ask.ids, ask.new) for ask in own.asks)
    return Work(f"b{size} in{len(asks[0].ids)} ({len(common)} common) out{new}", asks, seed=seed)


def _limits(args: Namespace, facts: Facts, jobs: Sequence[Job]) -> Limits:
    """As large as the works need and no larger: all sides share one device."""
    works = [job.works(turn) for job in jobs for turn in range(args.rounds + 1)]
    longest, slots = takes(works)
    together = max(len(work.asks) for work in works)
    most = args.max_requests or (
        max(args.batch)
        if args.mode == "ablation"
        else min(together, 64 if args.mode in ("throughput", "online") else together)
    )
    if longest > facts.cfg.max_len:
        raise UsageError(
            f"a request takes {longest} tokens; {facts.name} is made for {facts.cfg.max_len}",
            "lower --input or --output",
        )
    context = min(max(longest, _GATE), facts.cfg.max_len)
    return Limits(most, context, max(min(slots, most * longest), most * _GATE, context) + ROOM * most)


def _resolved(args: Namespace, limits: Limits) -> dict:
    skipped = ("json", "csv", "plot", "baseline", "rerun")
    return {name: value for name, value in vars(args).items() if name not in skipped} | {"limits": vars(limits)}


def _outputs(argv: Sequence[str]) -> list[str]:
    """The words of a command line that say where results go; --rerun is not one of them."""
    kept = arguments.argv_without_outputs(argv)
    if kept:
        raise UsageError(f"--rerun takes its work from the document; {kept[0]!r} is too much", "name outputs only")
    at = next(i for i, word in enumerate(argv) if word == "--rerun" or word.startswith("--rerun="))
    return [*argv[:at], *argv[at + (2 if argv[at] == "--rerun" else 1) :]]


class _Moment:
    """The requests of another process, as it told them."""

    def __init__(self, told: dict):
        self.told = told

    def in_flight(self) -> InFlight:
        return InFlight.read(self.told)


class Teller:
    """What happens now, with a bar, on a terminal; a line each where output is no terminal."""

    def __init__(self, total: int):
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> "Teller":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    @contextlib.contextmanager
    def flight(self) -> Iterator[Callable[[dict], None]]:
        """The requests in flight instead of the bar, from what a side tells of them."""
        self.bar.stop()
        with FlightView(self.console) as view:
            yield lambda told: view.update(_Moment(told))
        self.bar.start()

    def __call__(self, text: str) -> None:
        if text.startswith("left out") or not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)
        self.bar.update(self.task, description=text, advance="warming" in text or ": round" in text)
