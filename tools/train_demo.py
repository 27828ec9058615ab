"""Trains the bundled demo checkpoints from scratch: `python tools/train_demo.py --only chat`, or `--vision`.

The chat and the vision model take minutes on a GPU and hours on a CPU, the copy model 20 minutes on two CPU threads.
`--quick` only proves that every part runs; its weights know nothing.
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

    from tools import demo_chat, demo_copy, demo_vision

    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    for which in ("copy", "chat", "vision") if args.only is None else (args.only,):
        if which == "copy":
            plan = demo_copy.Plan(
                device, steps=args.steps or (20 if args.quick else 3000), exam=16 if args.quick else 1000
            )
            _write(args.out / "copy", lambda folder, plan=plan: demo_copy.build(plan, folder))
            continue
        kind = demo_chat if which == "chat" else demo_vision
        # the vision model needs few of them: each batch of text serves several steps, and pictures come from the device
        plan = kind.Plan(device, minutes=args.minutes, workers=workers if which == "chat" else min(8, workers))
        if args.quick and which == "chat":
            plan = demo_chat.Plan(
                device, steps=8, tokens=2048, documents=60, dialogues=2000, warmup=4, workers=1, per_topic=1
            )
        elif args.quick:
            plan = demo_vision.Plan(
                device, steps=8, pictures=16, tokens=2048, kept=8, spelling=3000, workers=1, layers=1
            )
        elif args.resume and which == "chat":
            plan = dataclasses.replace(
                plan, start=args.resume, rate=3e-4, warmup=20, tokens=4096, documents=1000, workers=2
            )
        plan = dataclasses.replace(plan, seed=args.seed)
        if args.steps:
            plan = dataclasses.replace(plan, steps=args.steps, minutes=0.0)
        if not args.examine:
            _write(args.out / which, lambda folder, plan=plan, kind=kind: kind.build(plan, folder))
        if which == "vision":
            _examine(args.out / which, 2 if args.quick else 60, device)


def _examine(folder: Path, per_topic: int, device) -> None:
    """Of the finished directory, so that no failure here loses the weights."""
    from tools import demo_vision_card, demo_vision_exam

    scores = demo_vision_exam.examine(folder, per_topic, device=str(device))
    demo_vision_card.write_scores(folder, scores, device)
    print(demo_vision_card.table(scores), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("chat", "copy", "vision"), help="one of the three; all without it")
    parser.add_argument("--vision", dest="only", action="store_const", const="vision", help="short for --only vision")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "lite_llm" / "demo", help="parent of chat/, copy/ and vision/"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--steps", type=int, default=0, help="training steps")
    parser.add_argument("--minutes", type=float, default=0.0, help="chat, vision: choose the steps to fit this time")
    parser.add_argument("--seed", type=int, default=1, help="chat, vision: of the weights and the lessons")
    parser.add_argument("--resume", type=Path, help="chat: go on from this directory, gently, in small batches")
    parser.add_argument("--examine", action="store_true", help="vision: only ask what is there, and note its figures")
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
