"""The modes: each runs its works and adds a row to the record for every side and work."""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.benchmark import stats
from tools.benchmark.bench import AGAIN, JUDGE, OURS, Bench, Works, compared, figure, near
from tools.benchmark.ladder import RUNGS
from tools.benchmark.limits import Limit, alone_limits, prompt_limit, step_limit, work_limit
from tools.benchmark.record import FIGURES, PERCENTILES, Row
from tools.benchmark.sides import ROOT, Side, SideFailed
from tools.benchmark.work import Answer, Run, Work


@dataclass(frozen=True)
class Job:
    """`about` is what the record says of the work beside its name."""

    works: Works
    about: dict
    note: str = ""  # behind the name

    @property
    def work(self) -> dict:
        return {"name": self.works(0).name + self.note} | self.about


def opened(bench: Bench, labels: Sequence[str]) -> dict:
    """The sides that can run here; of one that cannot, a line says why. Ours must."""
    found = {}
    for label in labels:
        try:
            found[label] = bench.open(label, bench.prefix_cache and label in (OURS, AGAIN))
        except SideFailed as error:
            if label == OURS:
                raise
            bench.say(f"left out {label}: {error}")
    return found


def latency(bench: Bench, jobs: Sequence[Job], labels: Sequence[str]) -> None:
    sides = opened(bench, labels)
    for job in jobs:
        bench.gate_first(sides, job.works(0), job.work)
        _add(bench, "latency", job, bench.runs(sides, job.works), _batch_figures)


def throughput(bench: Bench, jobs: Sequence[Job], labels: Sequence[str]) -> None:
    sides = opened(bench, labels)
    for job in jobs:
        bench.gate_first(sides, job.works(0), job.work)
        _add(bench, "throughput", job, bench.runs(sides, job.works), _many_figures)


def online(bench: Bench, jobs: Sequence[Job], labels: Sequence[str], ttft: float | None, tpot: float | None) -> None:
    """`ttft` and `tpot` are the seconds within which a request counts as served in time."""
    sides = opened(bench, labels)
    figures = functools.partial(_online_figures, ttft=ttft, tpot=tpot)
    for job in jobs:
        bench.gate_first(sides, job.works(0), job.work)
        runs = bench.runs(sides, job.works)
        # What a faster side saves here is waiting: how long a run lasts is up to the arrivals.
        waits = {
            label: [statistics.fmean(stats.end_to_end(run, job.works(1 + i))) for i, run in enumerate(mine)]
            for label, mine in runs.items()
        }
        _add(bench, "online", job, runs, figures, compared(waits, [other for other in runs if other != OURS]))


def startup(bench: Bench, job: Job, labels: Sequence[str]) -> None:
    """Fresh processes by turns: from the start of each to its first token. Tokens are judged when all is timed."""
    found: dict[str, list[tuple[float, float, float]]] = {label: [] for label in labels}
    answered: dict[str, list[Run]] = {}
    for turn in range(bench.rounds + 1):  # the first fills the caches of the disk and of kernels, and does not count
        for label in list(found):
            try:
                with bench.fresh(label) as side:
                    run = side.run(job.works(turn))
                bench.infos[label] = side.info
            except SideFailed as error:
                if label == OURS:
                    raise
                bench.say(f"left out {label}: {error}")
                del found[label]
                continue
            first = side.ready_s + (run.answers[0].times or (run.seconds,))[0]
            if turn:
                found[label].append((side.info["import_s"], side.ready_s, first))
                answered.setdefault(label, []).append(run)
    with bench.fresh(OURS) as side:  # not before: a judge that waits beside them would be part of what is timed
        bench.gate_first({OURS: side}, job.works(0), job.work)
    bench.judge({label: answered[label] for label in found}, job.works(1), job.work)
    ids = job.works(1).asks[0].ids
    limit, _, _ = alone_limits(bench.facts.cfg, bench.facts.itemsize, len(ids), 1, bench.roof)
    for label, marks in found.items():
        imported, ready, tokens = zip(*marks, strict=True)
        figures = {"import_s": figure(imported), "ready_s": figure(ready), "first_token_s": figure(tokens, 1.0, limit)}
        last = {other: [mark[2] for mark in theirs] for other, theirs in found.items()}
        against = compared(last, [other for other in last if other != OURS]) if label == OURS else []
        row = Row("startup", job.work, label, figures, len(marks), None, against, None, note=bench.note(label))
        bench.record.add(row)  # what it compiles is part of the start, and not counted


def ablation(bench: Bench, plain: Job, mixed: Job, prefixed: Job) -> None:
    """One thing is taken away at a time. Two processes are open: what is tried, and what it differs from.

    `mixed` has requests of unequal lengths, more than run at a time, for static batching; `prefixed` a common prefix.
    """
    rungs = {rung.name: rung for rung in RUNGS if bench.facts.device == "cuda" or not rung.gpu}
    if absent := [rung.name for rung in RUNGS if rung.name not in rungs]:
        bench.say(f"left out {', '.join(absent)}: without a GPU there is no such thing to take away")
    for rung in rungs.values():
        if rung.against is None:
            continue
        base, job = rungs[rung.against], {"mixed": mixed, "prefixed": prefixed}.get(rung.work, plain)
        how = {rung.name: in_windows(bench.limits.max_requests)} if rung.windows else {}
        with bench.fresh(OURS, variant=base.variant) as first, bench.fresh(OURS, variant=rung.variant) as second:
            both = {base.name: first, rung.name: second}
            bench.gate_first(both, job.works(0), job.work)
            runs = bench.runs(both, job.works, how)
        bench.judge(runs, job.works(1), job.work)
        for name, mine in runs.items():
            about = job.work | {"variant": name}
            if bench.record.find("ablation", about, OURS) is None:
                against = compared(_seconds(runs), [base.name], rung.name) if name == rung.name else []
                against = [one | {"side": OURS, "variant": base.name} for one in against]
                bench.record.add(_row(bench, "ablation", job, about, OURS, mine, _batch_figures, against))


def accuracy(bench: Bench, job: Job, labels: Sequence[str], directory: str | None) -> None:
    """Noise or a bug: greedy tokens, their distance from the best, and where the hidden states part first.

    `directory` has the checkpoint; without one the shape's random weights are compared.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        target = [directory] if directory else ["--shape", bench.facts.model.shape]
        bench.say("logits and hidden states, layer by layer")
        command = [sys.executable, ROOT / "tools" / "diff.py", *target, "--json", file.name]
        command += ["--dtype", bench.facts.dtype, "--device", bench.facts.device, "--seed", str(bench.facts.model.seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not (text := Path(file.name).read_text()):
            raise SideFailed(f"tools/diff.py: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    layers = json.loads(text)["results"][0]
    sides = opened(bench, labels)
    judge, work = bench.open(JUDGE), job.works(0)
    right = judge.run(work)
    for label, side in sides.items():
        if label == JUDGE:
            continue
        mine = side.run(work)
        gaps, _ = judge.score([(ask.ids, answer.tokens) for ask, answer in zip(work.asks, mine.answers, strict=True)])
        worst, ours = max(map(max, gaps)), label == OURS
        same = [a == b for x, y in zip(mine.answers, right.answers) for a, b in zip(x.tokens, y.tokens, strict=True)]
        bad = worst > near(bench.facts.dtype) or ours and not layers["ok"]
        figures = {
            "agreement": sum(same) / len(same), "worst_gap_nats": worst,
            "verdict": "bug" if bad else "equal" if all(same) else "noise",
            "first_layer": layers["parts_at"] if ours else None, "error_ratio": layers["ratio"] if ours else None,
        }  # fmt: skip
        bench.record.add(Row("accuracy", job.work, label, figures, 1, note=bench.note(label)))


def in_windows(most: int) -> Callable[[Side, Work], Run]:
    """The next `most` requests are sent when all before have ended: no continuous batching."""

    def run(side: Side, work: Work) -> Run:
        answers, began, compiled = [], 0.0, 0
        for first in range(0, len(work.asks), most):
            part = side.run(replace(work, asks=work.asks[first : first + most]))
            answers += [
                Answer(a.tokens, began + a.sent, tuple(began + t for t in a.times), began + a.ended)
                for a in part.answers
            ]
            began, compiled = began + part.seconds, compiled + part.compiles
        return Run(began, tuple(answers), compiled, part.peak_bytes, {})

    return run


# ---- rows

Figures = Callable[[Bench, Job, list[Run]], dict]


def _add(
    bench: Bench, mode: str, job: Job, runs: dict[str, list[Run]], figures: Figures, against: list[dict] | None = None
) -> None:
    bench.judge(runs, job.works(1), job.work)
    if against is None:
        against = compared(_seconds(runs), [other for other in runs if other != OURS])
    for label, mine in runs.items():
        bench.record.add(_row(bench, mode, job, job.work, label, mine, figures, against if label == OURS else []))


def _row(
    bench: Bench, mode: str, job: Job, about: dict, label: str, runs: list[Run], figures: Figures, against: list[dict]
) -> Row:
    found = figures(bench, job, runs)
    refused = None if found.keys() == FIGURES[mode].keys() else "this side tells no times of tokens"
    # Online, how long a run lasts is up to the arrivals, and how many are in time to what the user calls so.
    share = None if mode == "online" else _work_share(bench, job, runs)
    counts = [run.compiles for run in runs]
    compiles = None if None in counts else sum(counts)
    return Row(mode, about, label, found, len(runs), share, against, compiles, refused, note=bench.note(label))


def _work_share(bench: Bench, job: Job, runs: list[Run]) -> dict:
    limit = work_limit(bench.facts.cfg, bench.facts.itemsize, job.works(1), bench.limits.max_requests, bench.roof)
    return limit.share(statistics.median(run.seconds for run in runs))


def _batch_figures(bench: Bench, job: Job, runs: list[Run]) -> dict:
    found = {"tokens_per_second": figure([stats.tokens_per_second(run) for run in runs])}
    works = [job.works(1 + i) for i in range(len(runs))]
    if not all(answer.times for run in runs for answer in run.answers):
        return found
    first = [statistics.fmean(stats.first_token(run, work)) for run, work in zip(runs, works)]
    steps = [statistics.fmean(stats.per_token(run) or [0.0]) for run in runs]
    asks, cfg, roof = works[0].asks, bench.facts.cfg, bench.roof
    like = len({(len(ask.ids), ask.new, ask.at) for ask in asks}) == 1
    prompt = step = None
    if like:  # all prompts are done before the first token of the last one, so half of them on average
        one = prompt_limit(cfg, len(asks[0].ids), roof)
        prompt = Limit(one.seconds * (len(asks) + 1) / 2, one.name)
        step = step_limit(cfg, bench.facts.itemsize, len(asks), len(asks[0].ids) + (asks[0].new + 1) // 2, roof)
    return found | {"ttft_ms": figure(first, 1e3, prompt), "tpot_ms": figure(steps, 1e3, step)}


def _many_figures(bench: Bench, job: Job, runs: list[Run]) -> dict:
    share = _work_share(bench, job, runs)  # of requests as of tokens: both are over the whole run
    return {
        "requests_per_second": figure([len(run.answers) / run.seconds for run in runs]) | {"limit": share},
        "tokens_per_second": figure([stats.tokens_per_second(run) for run in runs]),
    }


def _online_figures(bench: Bench, job: Job, runs: list[Run], ttft: float | None, tpot: float | None) -> dict:
    pairs = [(run, job.works(1 + i)) for i, run in enumerate(runs)]
    asks = [ask for _, work in pairs for ask in work.asks]
    alone = [alone_limits(bench.facts.cfg, bench.facts.itemsize, len(ask.ids), ask.new, bench.roof) for ask in asks]
    first, step, whole = zip(*alone, strict=True)
    step = [limit for limit, ask in zip(step, asks, strict=True) if ask.new > 1]
    found = {"e2e_ms": _percentiles([stats.end_to_end(run, work) for run, work in pairs], whole)}
    if all(answer.times for run in runs for answer in run.answers):
        found["ttft_ms"] = _percentiles([stats.first_token(run, work) for run, work in pairs], first)
        found["tpot_ms"] = _percentiles([stats.per_token(run) or [0.0] for run in runs], step)
        found["goodput_per_second"] = figure([stats.goodput(run, work, ttft, tpot) for run, work in pairs])
    return found


def _percentiles(runs: Sequence[Sequence[float]], limits: Sequence[Limit]) -> dict:
    """Of the requests of each run, in milliseconds; then the median and interval over the runs.

    The share is that of the median: of all limits to that of all requests, since no request is faster than its own.
    """
    found = zip(*(stats.percentiles(values) for values in runs), strict=True)
    figures = {name: figure(values, 1e3) for name, values in zip(PERCENTILES, found, strict=True)}
    if limits:
        name = Counter(limit.name for limit in limits).most_common(1)[0][0]
        middle = Limit(statistics.median(limit.seconds for limit in limits), name)
        figures["limit"] = middle.share(statistics.median(value for values in runs for value in values))
    return figures


def _seconds(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    return {label: [run.seconds for run in mine] for label, mine in runs.items()}
