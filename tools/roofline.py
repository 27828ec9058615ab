"""Where the time of a decode step goes: every class of kernels against what memory and matmuls allow, measured now.

    python tools/roofline.py [--shape llama-3.2-1b] [--batch 1] [--context 512] [--png step.png] [--json step.json]
    python tools/roofline.py --model path/or/hub-id

The floor counts the weights and the keys and values that a step reads, at the copy bandwidth of the same run. Kernels
overlap where they are launched as dependents, so each is given what it adds to the step: from the end of the one before
it, or from its own start if that is later, to its own end. Without a GPU the floors and the whole step are shown.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm import LLM, SamplingParams
from lite_llm.engine.roofline import Ceilings, Cost, floor, step_costs
from lite_llm.errors import LiteLLMError
from tools.environment import environment

ROUNDS, WARM = 3, 8  # rounds of steps that are timed; steps before them
PROMPTS_A_STEP = 4096  # tokens of prompts; no decode step depends on it
BETWEEN, INSIDE, OTHER = "idle between steps", "idle between kernels", "other"


@dataclass(frozen=True)
class Kernel:
    name: str
    start: float  # us
    end: float


@dataclass
class Split:
    """A step's time by class, in us per step; `runs` of kernels per step, and their names."""

    us: dict[str, float] = field(default_factory=dict)
    runs: dict[str, float] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    name: str
    runs: float | None  # of kernels in a step; None: not known
    us: float | None
    bytes: int
    floor_us: float
    kernels: list[str]

    @property
    def of_limit(self) -> float | None:
        return self.floor_us / self.us if self.us and self.floor_us else None


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    try:
        record = measure(args)
    except LiteLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = [Row(**row) for row in record["rows"]]
    Console(width=150).print(table(record, rows))
    for note in record["notes"]:
        print(note)
    if args.json:
        args.json.write_text(json.dumps(environment() | record, indent=1) + "\n")
    return picture(args.png, record, rows) if args.png else 0


def measure(args: argparse.Namespace) -> dict:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    roof = Ceilings.measure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    new = WARM + (ROUNDS + 1) * args.steps + 8
    prompt = max(args.context - new // 2, 1)  # so that the steps see `context` on average
    budget = max(PROMPTS_A_STEP, 2 * args.batch)
    joining = 8 + args.batch // 16 + 2 * math.ceil(args.batch * prompt / budget)  # steps in which the first say more
    options = dict(
        device=str(device), context=prompt + new + joining, max_requests=args.batch, step_tokens=budget,
        prefix_cache=False,
    )  # fmt: skip
    model = dict(model=args.model) if args.model else dict(shape=args.shape, random_weights=True)
    with LLM(**model, **options) as llm:
        itemsize = llm.engine.kv.k.element_size()
        start(llm, args.batch, prompt, new + joining)
        step = statistics.median(wall(llm, args.steps) for _ in range(ROUNDS))
        kernels = trace(llm, args.steps) if device.type == "cuda" else []
        if len(llm.engine.scheduler.running) != args.batch:
            raise RuntimeError(f"{len(llm.engine.scheduler.running)} of {args.batch} requests ran to the end")
        costs, layers = step_costs(llm.cfg, itemsize, args.batch, prompt + new // 2), llm.cfg.num_layers
    split = attribute(kernels, layers)
    return {
        "model": args.model or args.shape, "batch": args.batch, "context": prompt + new // 2,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} "
        "threads", "copy_tb_s": roof.copy / 1e12, "matmul_tflop_s": roof.matmul / 1e12, "step_us": step * 1e6,
        "floor_us": floor(costs, roof) * 1e6, "bytes": sum(cost.bytes for cost in costs),
        "rows": [vars(row) for row in rows_of(costs, roof, split)], "notes": notes(device, split, step * 1e6),
    }  # fmt: skip


def start(llm: LLM, batch: int, prompt: int, new: int) -> None:
    """Requests with random prompts, all of them decoding when this returns."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, llm.cfg.vocab, (batch, prompt), generator=draw).tolist()
    waiting = {llm.add_request(ids, params) for ids in prompts}
    while waiting:
        waiting -= {delta.id for delta in llm.step() if delta.token_ids}
    for _ in range(WARM):
        llm.step()


def wall(llm: LLM, steps: int) -> float:
    """Seconds of a step by the clock."""
    _finish(llm)
    begin = time.perf_counter()
    for _ in range(steps):
        llm.step()
    _finish(llm)
    return (time.perf_counter() - begin) / steps


def trace(llm: LLM, steps: int) -> list[Kernel]:
    """What ran on the GPU in some steps, in order; [] if the profiler cannot see it."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            llm.step()
        _finish(llm)
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
    ]


def _finish(llm: LLM) -> None:
    if llm.engine.kv.k.device.type == "cuda":
        torch.cuda.synchronize()


def attribute(kernels: list[Kernel], layers: int) -> Split:
    """The mean of the whole steps in a trace, each from one embedding to the next."""
    kernels = sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))
    classes = classify([kernel.name for kernel in kernels], layers)
    begins = [i for i, (cls, before) in enumerate(zip(classes, [None, *classes])) if cls == "embed" != before]
    if len(begins) < 2:
        return Split()
    us, runs, names = Counter(), Counter(), {}
    until = max(kernels[begins[0]].start, *(k.end for k in kernels[: begins[0]]), 0.0)  # up to here time is given away
    for i in range(begins[0], begins[-1] + 1):
        kernel, cls = kernels[i], classes[i]
        gap = max(0.0, kernel.start - until)
        first = cls == "state" and "advance" not in kernel.name or cls == "embed"
        us[BETWEEN if first else INSIDE] += gap
        if i == begins[-1]:
            break
        us[cls] += max(0.0, kernel.end - max(until, kernel.start))
        runs[cls] += 1
        names.setdefault(cls, Counter())[short(kernel.name)] += 1
        until = max(until, kernel.end)
    steps = len(begins) - 1
    return Split(
        {cls: total / steps for cls, total in us.items()},
        {cls: count / steps for cls, count in runs.items()},
        {cls: [name for name, _ in counted.most_common()] for cls, counted in names.items()},
    )


_MARKS = {  # the first class with a word that the kernel's name has; what has none is a matmul
    "embed": ("embed",),
    "state": ("decode_inputs", "advance", "memcpy", "memset", "edit", "table"),
    "attention": ("attend", "decode", "merge"),
    "sampling": ("scan", "pick", "sampl", "filter", "adjust", "argmax", "topk"),
    "norm": ("norm",),  # belongs to the matmul behind it
    "behind": ("rope", "store_kv", "silu", "reduce", "elementwise", "index", "gather"),  # to the one before it
}
_NEXT = {"embed": "qkv", "attention": "out", "out": "gate_up", "gate_up": "down", "head": "head", "qkv": "qkv"}


def classify(names: list[str], layers: int) -> list[str]:
    """A class for each kernel of a stream of steps, by its name and, for matmuls, by its place in the layer."""
    found: list[str] = []
    now, full, layer = OTHER, True, 0  # `full`: the class has its matmul
    for name in names:
        kind = next((kind for kind, marks in _MARKS.items() if any(mark in name.lower() for mark in marks)), "matmul")
        if "advance" in name:
            now = kind
        if kind == "state" or now == "state" and kind != "embed":  # copies stand anywhere, edits between two steps
            found.append("state")
            continue
        if kind == "attention":
            layer += now != "attention"
        if kind == "embed":
            layer = 0
        if kind in ("embed", "attention", "sampling"):
            now, full = kind, True
        elif kind in ("norm", "matmul"):
            if full:
                now = ("head" if layer == layers else "qkv") if now == "down" else _NEXT.get(now, OTHER)
            full = kind == "matmul"
        found.append(now)
    return found


def short(name: str) -> str:
    """A C++ kernel's name without its template and arguments, a Triton kernel's as it is."""
    name = name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1]
    return name if len(name) <= 40 else name[:37] + "..."


def rows_of(costs: list[Cost], roof: Ceilings, split: Split) -> list[Row]:
    rows = []
    for cost in costs:
        us, runs = split.us.get(cost.name), split.runs.get(cost.name)
        names = split.names.get(cost.name, [])
        rows.append(Row(cost.name, runs, us, cost.bytes, cost.floor(roof) * 1e6, names))
    extra = [OTHER, INSIDE, BETWEEN]
    rows += [
        Row(name, split.runs.get(name), split.us[name], 0, 0.0, split.names.get(name, []))
        for name in extra
        if split.us.get(name)
    ]
    return rows


def notes(device: torch.device, split: Split, step: float) -> list[str]:
    if device.type != "cuda":
        return ["no GPU: floors only, and the step as a whole"]
    if not split.us:
        return ["the profiler saw no kernels (is CUPTI there?): floors only, and the step as a whole"]
    return [
        f"kernels as the profiler saw them, a step of {sum(split.us.values()):.1f} us; without it {step:.1f} us",
        "us: what a kernel adds to the step (from the end of the one before it); these add up, though kernels overlap",
    ]


def table(record: dict, rows: list[Row]) -> Table:
    found = Table(title=title(record))
    for name in ("class", "kernels", "us", "share", "MB", "TB/s", "floor us", "% of limit", "names"):
        found.add_column(name, justify="left" if name in ("class", "names") else "right", no_wrap=name != "names")
    whole = sum(row.us or 0 for row in rows)
    for row in rows:
        found.add_row(
            row.name, _shown(row.runs, "g"), _shown(row.us, ".1f"), _shown(row.us and row.us / whole, ".1%"),
            _shown(row.bytes / 1e6 or None, ",.1f"), _shown(row.us and row.bytes and row.bytes / row.us / 1e6, ".2f"),
            _shown(row.floor_us or None, ".1f"), _shown(row.of_limit and 100 * row.of_limit, ".0f"),
            ", ".join(row.kernels),
        )  # fmt: skip
    found.add_section()
    found.add_row(
        "step", "", f"{record['step_us']:.1f}", "", f"{record['bytes'] / 1e6:,.1f}",
        f"{record['bytes'] / record['step_us'] / 1e6:.2f}", f"{record['floor_us']:.1f}",
        f"{100 * record['floor_us'] / record['step_us']:.0f}", "(by the clock, without the profiler)",
    )  # fmt: skip
    return found


def title(record: dict) -> str:
    return (
        f"{record['model']}, batch {record['batch']}, context {record['context']}, {record['device']}: "
        f"copy {record['copy_tb_s']:.3g} TB/s, matmul {record['matmul_tflop_s']:.3g} TFLOP/s"
    )


def picture(path: Path, record: dict, rows: list[Row]) -> int:
    """A bar for each class: what it took, and in it what it must take. The exit code: 3 without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("error: the picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 3
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.us or row.floor_us]
    figure, axes = pyplot.subplots(figsize=(11, 1.6 + 0.42 * len(shown)), layout="constrained")
    places = range(len(shown))
    longest = max(max(row.us or 0, row.floor_us) for row in shown)
    axes.barh(places, [row.us or 0 for row in shown], color="#c9d3e0", label="measured")
    axes.barh(places, [row.floor_us for row in shown], color="#2c6fbb", height=0.5, label="floor")
    for at, row in zip(places, shown):
        words = f"{row.us:.1f} us" if row.us else f"at least {row.floor_us:.1f} us"
        words += f", {row.of_limit:.0%} of the limit" if row.floor_us >= 1 and row.us else ""
        axes.text(max(row.us or 0, row.floor_us) + 0.008 * longest, at, words, va="center", fontsize=9)
    axes.set_yticks(places, [row.name for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * longest)
    axes.set_xlabel("microseconds of a step")
    axes.set_title(
        f"{title(record)}\nstep {record['step_us']:.1f} us, floor {record['floor_us']:.1f} us: "
        f"{record['floor_us'] / record['step_us']:.0%} of the limit",
        fontsize=11, loc="left",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"picture: {path}")
    return 0


def _shown(value: float | None, form: str) -> str:
    return format(value, form) if value else ""


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", default="llama-3.2-1b", help="a known model's sizes, with random weights")
    model.add_argument("--model", help="a directory or hub id instead")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens that a step sees, on average")
    parser.add_argument("--steps", type=int, default=32, help="steps in each round")
    parser.add_argument("--device")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
