"""Trains the bundled demo checkpoints from scratch: `python tools/train_demo.py --only chat`.

The chat model takes minutes on a GPU and hours on a CPU, the copy model 20 minutes on two CPU threads. `--quick` only
proves that every part runs; its weights know nothing.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    args = _arguments()
    sys.path.insert(0, str(ROOT))
    import torch

    from tools import demo_chat, demo_copy

    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    for which in ("copy", "chat") if args.only is None else (args.only,):
        if which == "copy":
            plan = demo_copy.Plan(
                device, steps=args.steps or (20 if args.quick else 3000), exam=16 if args.quick else 1000
            )
            _write(args.out / "copy", lambda folder, plan=plan: demo_copy.build(plan, folder))
        else:
            plan = demo_chat.Plan(device, minutes=args.minutes, workers=workers)
            if args.quick:
                plan = demo_chat.Plan(
                    device, steps=8, tokens=2048, documents=60, dialogues=2000, warmup=4, workers=1, per_topic=1
                )
            if args.resume:
                plan = dataclasses.replace(
                    plan, start=args.resume, rate=3e-4, warmup=20, tokens=4096, documents=1000, workers=2
                )
            plan = dataclasses.replace(plan, seed=args.seed)
            if args.steps:
                plan = dataclasses.replace(plan, steps=args.steps, minutes=0.0)
            _write(args.out / "chat", lambda folder, plan=plan: demo_chat.build(plan, folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("chat", "copy"), help="one of the two; both without it")
    parser.add_argument("--out", type=Path, default=ROOT / "lite_llm" / "demo", help="parent of chat/ and copy/")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--steps", type=int, default=0, help="training steps")
    parser.add_argument("--minutes", type=float, default=0.0, help="chat: choose the steps to fit this time")
    parser.add_argument("--seed", type=int, default=1, help="chat: of the weights and the lessons")
    parser.add_argument("--resume", type=Path, help="chat: go on from this directory, gently, in small batches")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    parser.add_argument("--quick", action="store_true", help="a smoke test of under a minute")
    return parser.parse_args()


def _write(folder: Path, build) -> None:
    """Runs `build` on a temporary directory beside `folder`, then puts it in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        build(made)
        made.chmod(0o755)
        for file in made.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    main()
