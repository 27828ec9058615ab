"""Trains the demo chat model, examines it on held-out questions and writes its directory."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig

from tools import demo_exam
from tools.demo_model import DemoLlama, llama_config, save_model
from tools.demo_text import BOS, CONTEXT, END, VOCAB, Lessons, save_tokenizer, train_tokenizer
from tools.demo_training import adam, learn, loader

_TIMED = 0.25  # of the minutes; then the number of steps is fixed, before the fall of the rate
_SHUFFLED = 2  # items whose batches are mixed


@dataclass(frozen=True)
class Plan:
    """How to train; `minutes` fixes the number of steps once the speed is known."""

    device: torch.device
    steps: int = 6000
    minutes: float = 0.0
    tokens: int = 49_152  # a batch
    documents: int = 6000  # an item of Lessons
    dialogues: int = 30_000  # for the tokenizer
    workers: int = 2
    rate: float = 2e-3
    warmup: int = 200
    seed: int = 1
    per_topic: int = 60
    start: Path | None = None  # a checkpoint to go on from, with its tokenizer


def config(layers: int = 6) -> LlamaConfig:
    return llama_config(
        vocab_size=VOCAB,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=END,
    )


def build(plan: Plan, folder: Path) -> None:
    """Everything into `folder`: tokenizer, weights, configuration and model card."""
    began = time.monotonic()
    torch.manual_seed(plan.seed)
    if plan.start:
        tokenizer = Tokenizer.from_file(str(plan.start / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(plan.dialogues)
    save_tokenizer(tokenizer, folder)
    print(f"tokenizer: {VOCAB} tokens, {time.monotonic() - began:.0f} s", flush=True)
    cfg = config()
    model = DemoLlama(cfg).to(plan.device)
    if plan.start:
        model.load_state_dict(load_file(plan.start / "model.safetensors"))
    count = sum(p.numel() for p in model.parameters())
    print(f"model: {count / 1e6:.2f} M parameters", flush=True)
    began = time.monotonic()
    steps, seen, loss = _train(plan, model, tokenizer)
    seconds = time.monotonic() - began
    save_model(model, cfg, torch.bfloat16, folder, max_new_tokens=512)
    scores = demo_exam.examine(folder, plan.per_topic, plan.device)
    print(demo_exam.table(scores), flush=True)
    facts = {"parameters": count, "steps": steps, "tokens": seen, "loss": loss, "seconds": seconds}
    (folder / "README.md").write_text(demo_exam.card(plan, facts, scores), encoding="utf-8")


def _train(plan: Plan, model: DemoLlama, tokenizer) -> tuple[int, int, float]:
    """Returns the steps taken, the tokens seen and the last smoothed loss."""
    cuda = plan.device.type == "cuda"
    optimizer = adam(model, plan.rate)
    steps, fixed = (1_000_000, False) if plan.minutes else (plan.steps, True)
    seen, smooth = 0, torch.zeros((), device=plan.device)
    began = time.monotonic()
    stamps = []
    for step, (ids, spots) in enumerate(_batches(plan, tokenizer)):
        stamps.append(time.monotonic() - began)
        if not fixed and stamps[-1] > _TIMED * plan.minutes * 60:
            pace = (stamps[-1] - stamps[step // 2]) / max(step - step // 2, 1)
            steps, fixed = step + int((plan.minutes * 60 - stamps[-1]) / max(pace, 1e-9)), True
            print(f"{pace * 1e3:.1f} ms a step: --steps {steps}", flush=True)
        if step >= steps:
            break
        ids, spots = (t.to(plan.device, non_blocking=True) for t in (ids, spots))
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=cuda):
            loss = model.loss(ids, spots)
        learn(model, optimizer, loss, plan.rate * _schedule(step, steps, plan.warmup))
        smooth = loss.detach() if step == 0 else smooth.lerp(loss.detach(), 0.02)
        seen += ids.numel()
        if step % 200 == 0 or step + 1 == steps:
            spent = time.monotonic() - began
            print(
                f"step {step:5d}/{steps}  loss {smooth.item():.4f}  {seen / 1e6:7.1f} M tokens"
                f"  {seen / max(spent, 1e-9) / 1e6:.2f} M/s  {spent:5.0f} s",
                flush=True,
            )
    return steps, seen, smooth.item()


def _schedule(step: int, steps: int, warmup: int) -> float:
    """A rise over `warmup` steps, a plateau, then a straight fall to zero over the last 60 %."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.6 * steps))


def _batches(plan: Plan, tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in an order that does not depend on the number of workers."""
    lessons = Lessons(tokenizer, plan.seed, 1_000_000, plan.documents, plan.tokens)
    rng, pool = random.Random(plan.seed), []
    for i, item in enumerate(loader(lessons, plan.workers, ahead=2), 1):
        pool += item
        if i % _SHUFFLED == 0:
            rng.shuffle(pool)
            yield from ((torch.as_tensor(ids).long(), torch.as_tensor(spots).long()) for ids, spots in pool)
            pool = []
