"""Time loading a checkpoint from its Hugging Face directory and from the fused one that tools/convert.py writes.

    python tools/bench_load.py [--shape qwen2.5-0.5b] [--device cpu] [--json FILE]

Random weights in a temporary directory, page cache warm, medians of alternating rounds. On a CPU the fused parameters
are views of the mapped file, so the time to touch every byte once afterwards is given too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, nothing installed

from lite_llm.config import HFConfig
from lite_llm.layers import LayerFactory
from lite_llm.models import registry
from lite_llm.weights import load_weights, open_checkpoint
from tools import convert, make_checkpoint
from tools.environment import environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, fused = Path(folder) / "hf", Path(folder) / "fused"
        make_checkpoint.make_checkpoint(args.shape, plain, "bfloat16", 0, 5 << 30)
        convert.convert(plain, fused, None, False, ())
        rows = [measure(plain, fused, dtype, args.device, args.rounds) for dtype in (torch.bfloat16, torch.float32)]
        size = open_checkpoint(plain).nbytes
    for row in rows:
        print(
            f"{args.shape}, {size / 1e9:.2f} GB in bfloat16, to {row['dtype']} on {args.device}: Hugging Face "
            f"{row['hf_s']:.3f} s, fused {row['fused_s']:.3f} s; touching all after: {row['hf_touch_s']:.3f}, "
            f"{row['fused_touch_s']:.3f} s"
        )
    if args.json:
        record = environment() | {"shape": args.shape, "bytes": size, "device": args.device, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(plain: Path, fused: Path, dtype: torch.dtype, device: str, rounds: int) -> dict:
    times: dict[str, list[float]] = {name: [] for name in ("hf_s", "hf_touch_s", "fused_s", "fused_touch_s")}
    for i in range(rounds + 1):
        for kind, directory in (("hf", plain), ("fused", fused)):
            took, touch = load(directory, dtype, device)
            if i:  # the first round warms the page cache
                times[f"{kind}_s"].append(took)
                times[f"{kind}_touch_s"].append(touch)
    return {"dtype": str(dtype)} | {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def load(directory: Path, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Seconds to open and load, the model's empty parameters made before; and to read all of them once after."""
    cfg = registry.parse(HFConfig.load(directory))
    module, cls = registry.find(cfg.architecture)
    model = cls(LayerFactory(dtype, device), cfg)
    start = time.perf_counter()
    load_weights(model, open_checkpoint(directory), module.RULES)
    if device != "cpu":
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.max().item()
    return loaded - start, time.perf_counter() - loaded


if __name__ == "__main__":
    sys.exit(main())
