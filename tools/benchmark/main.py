"""`python benchmark.py`: arguments to works, works to a record, the record to tables, files and an exit code."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lite_llm.config import EngineConfig
from lite_llm.engine.roofline import Ceilings
from lite_llm.errors import EnvironmentProblem, LiteLLMError, UsageError
from tools.benchmark import arguments, baseline, modes, plot, table
from tools.benchmark.bench import AGAIN, OURS, Bench, Facts, absent, takes
from tools.benchmark.ladder import RUNGS
from tools.benchmark.modes import Job
from tools.benchmark.record import Record, load
from tools.benchmark.screen import Screen, Teller
from tools.benchmark.sides import SERVERS, Limits
from tools.benchmark.work import Lengths, Work, batch, burst, fixed, many, poisson, trace
from tools.environment import environment

ROOM = 64
"""Slots that a running request may hold ahead of its tokens."""
_GATE = 40  # tokens of a request of the gate
_INTERRUPTED, _CLOSED_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = arguments.parse(argv)
        if args.rerun:
            args, argv = _again(args.rerun, argv)
        return run(args, argv)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # nobody reads on: Python's own last flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE


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
    if facts.cfg.vision:
        raise UsageError(f"{facts.name} reads pictures, and no work here has any", "tools/bench_pictures.py has them")
    _defaults(args, small=args.quick or not (args.model or args.shape))
    missing = absent(args.against, device)
    args.against = [side for side in args.against if side not in missing]  # servers are asked only if one is measured
    jobs = _jobs(args, facts)
    limits = _limits(args, facts, jobs)
    labels = [OURS] + [AGAIN if side == "self" else side for side in args.against if side != "none"]
    resolved = {"argv": arguments.argv_without_outputs(argv)} | _resolved(args, limits)
    model = {"name": facts.name, "dtype": facts.dtype, "random_weights": bool(args.shape), "device": device}
    if before:
        planned = Record(resolved, model, {"copy_tb_s": None, "matmul_tflops": None}, environment())
        baseline.check(planned, before, [(args.mode, job.work, label) for job in jobs for label in labels])
    with Teller(total=_runs(args.mode, len(jobs) * len(labels), device) * (args.rounds + 1)) as say:
        for side, why in missing.items():
            say(f"left out {side}: {why}")
        say("what copies and matmuls reach here")
        roof = Ceilings.measure(torch.device(device), getattr(torch, facts.dtype))
        reached = {"copy_tb_s": roof.copy / 1e12, "matmul_tflops": roof.matmul / 1e12}
        record = Record.begin(resolved, model, reached, args.json)
        http = _over_http(args)
        view = say.flight if args.mode == "online" and say.console.is_terminal and not http else None
        failed: BaseException | None = None
        try:
            with Bench(facts, record, roof, limits, args.rounds, say, view, args.prefix_cache, http) as bench:
                record.arguments["sides"] = bench.infos
                _measure(args, bench, jobs, labels)
        except (LiteLLMError, KeyboardInterrupt) as error:
            failed = error
    return _told(args, record, before, failed)


def _told(args: Namespace, record: Record, before: Record | None, failed: BaseException | None) -> int:
    """What was measured, in every file that was asked for and on the screen; raises `failed` after that."""
    console = Screen()
    if record.rows or not failed:
        try:  # files first: who pipes the table to `head` wants them too
            if args.csv:
                table.csv(record, args.csv)
            if args.plot:
                plot.plot(record, args.plot)
        except LiteLLMError as error:
            failed = failed or error
        table.show(record, console)
    if failed:
        raise failed
    findings = baseline.compare(record, before) if before else []
    for finding in findings:
        console.print(str(finding), markup=False, highlight=False)
    if before:
        console.print(baseline.summary(record, before, findings), markup=False, highlight=False)
    refused = any(record.refusal(row) or row.figures.get("verdict") == "bug" for row in record.rows)
    refused = refused or any(gate["wrong"] for gate in record.gates)
    if any(pair.side == AGAIN and pair.differs for row in record.rows for pair in record.comparisons(row)):
        console.print("the same program twice differs: by that much no other ratio of this machine can be believed")
        refused = True
    return int(refused or any(finding.fails for finding in findings))


def _runs(mode: str, pairs: int, device: str) -> int:
    """What runs in a round: a pair of a work and a side each, but in an ablation both sides of every rung."""
    if mode != "ablation":
        return pairs
    return 2 * sum(rung.against is not None and (device == "cuda" or not rung.gpu) for rung in RUNGS)


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
    """What the user left out; small for the demo and --quick: in under a minute anywhere, but startup and ablation."""
    one = args.mode in ("latency", "startup", "ablation", "accuracy")
    args.rounds = args.rounds or (4 if args.quick else 6 if small else 9)
    args.batch = args.batch or ([1, 4] if args.quick else [1, 8] if small else [1, 8, 32])
    args.input = args.input or (["16"] if args.quick else ["32"] if small else ["128"] if one else ["64-512"])
    args.output = args.output or (["16"] if args.quick else ["32"] if small else ["128"] if one else ["32-256"])
    args.requests = args.requests or (8 if args.quick else 24 if small else 256)
    if args.mode == "online":
        args.arrivals = args.arrivals or ("poisson:16" if small else "poisson:4")


def _over_http(args: Namespace) -> bool:
    """Whether servers are asked instead of engines: vLLM's is measured as its users have it, and so is ours then."""
    return args.mode == "online" and "vllm" in args.against


def _jobs(args: Namespace, facts: Facts) -> list[Job]:
    limits = {"first token": args.ttft, "tokens": args.tpot}
    note = ", ".join(f"{name} in {seconds:g} s" for name, seconds in limits.items() if seconds)

    over = {"over_http": list(SERVERS)} if _over_http(args) else {}  # which makes it another work

    def job(make: Callable[[int], Work], **about) -> Job:
        return Job(lambda turn: make(1000 * (args.seed + 1) + turn), about | over, note and f", {note}")

    common = (facts.vocab, facts.banned)
    if args.arrivals and not args.arrivals.startswith(arguments.ARRIVALS):
        return [job(lambda seed: trace(Path(args.arrivals), common[0], seed, common[1]), trace=args.arrivals)]
    if args.mode in ("throughput", "online"):
        return [
            job(lambda seed, p=p, n=n: _many(args, *common, p, n, seed), prompt=p, new=n, requests=args.requests)
            for p in args.input
            for n in args.output
        ]
    sizes = [(b, p, n) for b in args.batch for p in args.input for n in args.output]
    sizes = list(dict.fromkeys((b, arguments.single(p, "input"), arguments.single(n, "output")) for b, p, n in sizes))
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
        except UsageError as error:
            raise UsageError(f"--arrivals {how}: {error}") from None
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
    slots = max(min(slots, most * longest), most * _GATE, context) + ROOM * most
    # A step has a token of every running request: of more than a step takes by default, all.
    return Limits(most, context, slots, most if most > EngineConfig.step_tokens else None)


def _resolved(args: Namespace, limits: Limits) -> dict:
    skipped = ("json", "csv", "plot", "baseline", "rerun")
    return {name: value for name, value in vars(args).items() if name not in skipped} | {"limits": vars(limits)}


def _again(path: Path, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The arguments of a document's run, on the kind of device that it was on, with the outputs that `argv` names."""
    old = load(path)
    words = [*old.arguments["argv"], *_outputs(argv)]
    if not all(isinstance(word, str) for word in words):
        raise UsageError(f"{path}: argv = {words}; expected the words of a command line")
    args = arguments.parse(words)
    args.device = args.device or old.model.get("device")
    if args.device == "cuda" and not torch.cuda.is_available():
        on = old.environment.get("gpu") or "a GPU"
        here = shlex.join(["python", "benchmark.py", *old.arguments["argv"], "--device", "cpu"])
        raise EnvironmentProblem(
            f"{path} was measured on {on}, and torch sees no GPU here",
            f"rerun it where there is one; its work on this CPU, however long that takes: {here}",
        )
    return args, words


def _outputs(argv: Sequence[str]) -> list[str]:
    """The words of a command line that say where results go; --rerun is not one of them."""
    kept = arguments.argv_without_outputs(argv)
    if kept:
        raise UsageError(f"--rerun takes its work from the document; {kept[0]!r} is too much", "name outputs only")
    at = next(i for i, word in enumerate(argv) if word == "--rerun" or word.startswith("--rerun="))
    return [*argv[:at], *argv[at + (2 if argv[at] == "--rerun" else 1) :]]
