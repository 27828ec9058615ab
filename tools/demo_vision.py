"""Trains the demo vision model and writes its directory; `demo_vision_exam` examines it afterwards.

First the tower looks at pictures alone, painted on the training device, then all of it learns from dialogues. Text is
the dearest part of the data, so each batch of it is learnt from several times, each time with other pictures of the
same scenes.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaConfig

from tools.demo_exam import hardware
from tools.demo_training import adam, learn, loader
from tools.demo_vision_card import card, save_samples
from tools.demo_vision_lessons import DRAWN, LONG_EVERY, Lessons
from tools.demo_vision_model import DemoLlava, config, save_model
from tools.demo_vision_paint import Painter
from tools.demo_vision_text import SIDE, VOCAB, save_text, train_tokenizer

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """How to train: for some minutes, compiling included, or else for this many steps of reading."""

    device: torch.device
    steps: int = 12_000
    minutes: float = 0.0
    looking: float = 0.12  # share of the minutes or steps in which the tower sees pictures alone
    pictures: int = 1024  # of a step of looking
    tokens: int = 65_536  # of a step of reading, pictures included
    again: int = 5  # steps that learn from one batch of text
    kept: int = 64  # batches of text at hand
    spelling: int = 20_000  # dialogues for the tokenizer
    workers: int = 2
    rate: float = 1.5e-3
    seed: int = 1
    layers: int = 5  # of the text; the tower has one more
    hidden: int = 256


class Clock:
    """How far a phase of training is, from 0 to 1: by time, or by steps if there are no seconds."""

    def __init__(self, seconds: float, steps: int, lines: int):
        self.seconds, self.steps, self.lines = seconds, steps, lines
        self.began, self.step, self.said = time.monotonic(), 0, 0

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def share(self) -> float:
        return self.spent / self.seconds if self.seconds else self.step / self.steps

    def due(self, share: float) -> bool:
        """Whether one of the phase's lines is to be printed; says so once."""
        if share * self.lines < self.said:
            return False
        self.said = int(share * self.lines) + 1
        return True


def build(plan: Plan, folder: Path) -> None:
    """Everything into `folder`: tokenizer, processor, weights, sample pictures and a model card without figures."""
    began = time.monotonic()
    torch.manual_seed(plan.seed)
    tokenizer = train_tokenizer(plan.spelling)
    save_text(tokenizer, folder)
    save_samples(folder)
    print(f"tokenizer: {VOCAB} tokens, {time.monotonic() - began:.0f} s", flush=True)
    cfg = config(plan.layers, plan.hidden)
    model = DemoLlava(cfg).to(plan.device)
    length = f"--minutes {plan.minutes:g}" if plan.minutes else f"--steps {plan.steps}"
    facts = {"parameters": f"{_count(model) / 1e6:.2f}", "seed": plan.seed, "hardware": hardware(plan.device)}
    facts |= {"precision": "bfloat16 autocast" if plan.device.type == "cuda" else "float32", "length": length}
    print(f"model: {facts['parameters']} M parameters", flush=True)
    facts |= Training(plan, model, tokenizer).run()
    _save(model, cfg, facts, folder)


def _save(model: DemoLlava, cfg: LlavaConfig, facts: dict[str, object], folder: Path) -> None:
    save_model(model, cfg, folder)
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def _count(model: DemoLlava) -> int:
    """Parameters that are kept."""
    return sum(p.numel() for name, p in model.named_parameters() if "teacher" not in name)


class Training:
    """Batches depend on the seed alone, and so does every step but for its rate where minutes are given."""

    def __init__(self, plan: Plan, model: DemoLlava, tokenizer):
        self.plan, self.model = plan, model
        self.began = time.monotonic()
        self.optimizer = adam(model, plan.rate)
        self.painter = Painter(SIDE, plan.device, plan.seed)
        self.lessons = lessons(plan, tokenizer)
        self.waited = 0.0
        self.read_loss, self.look_loss = (torch.zeros((), device=plan.device) for _ in range(2))

    def run(self) -> dict[str, object]:
        """Returns steps of both kinds, tokens and pictures in millions, seconds, and the last smoothed loss."""
        plan = self.plan
        kept = [self._next() for _ in range(plan.kept)]
        print(f"{plan.kept} batches of text after {time.monotonic() - self.began:.1f} s", flush=True)
        if plan.device.type == "cuda":
            self._compile(kept)
        self.waited = 0.0
        left = max(plan.minutes * 60 - (time.monotonic() - self.began), 1e-3) if plan.minutes else 0.0
        looking = Clock(left * plan.looking, max(1, int(plan.steps * plan.looking)), 3)
        while (share := looking.share()) < 1:
            self._step(self._look(), None, min(1.0, 0.02 + share / 0.05))
            looking.step += 1
            if looking.due(share):
                self._say("looked", looking, looking.step * plan.pictures)
        reading = Clock(left - looking.spent if left else 0.0, plan.steps, 9)
        rng, tokens, pictures = random.Random(plan.seed), 0, 0
        while (share := reading.share()) < 1:
            fresh, turn = divmod(reading.step, plan.again)
            if turn == 0 and fresh >= plan.kept:
                kept[fresh % plan.kept] = self._next()
            batch = kept[fresh % plan.kept if turn == 0 else rng.randrange(plan.kept)]
            self._step(*self._read(batch), min(1.0, 0.02 + share / 0.03, (1 - share) / 0.6))
            reading.step += 1
            tokens, pictures = tokens + batch["ids"].numel(), pictures + len(batch["grounds"])
            if reading.due(share):
                self._say("read", reading, pictures, tokens)
        self._say("read", reading, pictures, tokens)
        return {
            "looks": looking.step,
            "steps": reading.step,
            "tokens": tokens / 1e6,
            "pictures": (looking.step * plan.pictures + pictures) / 1e6,
            "seconds": time.monotonic() - self.began,
            "loss": self.read_loss.item() / _bias(reading.step),
        }

    def _next(self) -> Batch:
        began = time.monotonic()
        batch = next(self.lessons)
        self.waited += time.monotonic() - began
        tensors = {name: torch.as_tensor(array) for name, array in batch.items()}
        if self.plan.device.type == "cuda":  # from other memory a copy waits for what the GPU still has to do
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return {name: tensor.to(self.plan.device, non_blocking=True) for name, tensor in tensors.items()}

    def _autocast(self):
        return torch.autocast(self.plan.device.type, torch.bfloat16, enabled=self.plan.device.type == "cuda")

    def _look(self) -> Tensor:
        fields, grounds = self.painter.scenes(self.plan.pictures)
        pixels = self.painter.paint(fields, grounds)
        with self._autocast():
            return self.model.look(self.model.features(pixels), fields, grounds)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = self.painter.paint(batch["fields"], batch["grounds"])
        pixels[::DRAWN] = batch["drawn"]
        with self._autocast():
            features = self.model.features(pixels)
            seen = self.model.look(features, batch["fields"], batch["grounds"])
            return seen, self.model.read(features, batch["ids"], batch["targets"], batch["places"])

    def _step(self, seen: Tensor, read: Tensor | None, rate: float) -> None:
        loss = seen if read is None else read + 0.3 * seen
        learn(self.model, self.optimizer, loss, self.plan.rate * rate)
        self.look_loss = self.look_loss.lerp(seen.detach().float(), 0.02)
        if read is not None:
            self.read_loss = self.read_loss.lerp(read.detach().float(), 0.02)

    def _compile(self, kept: list[Batch]) -> None:
        """Layer by layer, for the three sizes of batches; where that fails, training goes on without."""
        began = time.monotonic()
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        short, long = kept[0], kept[LONG_EVERY - 1]
        trials: list[Callable[[], Tensor]] = [self._look, lambda: sum(self._read(short)), lambda: sum(self._read(long))]
        try:
            for trial in trials:
                trial().backward()
            torch.cuda.synchronize(self.plan.device)
            print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            torch.compiler.set_stance("force_eager")
            print(f"not compiled, after {time.monotonic() - began:.0f} s: {str(error)[:300]!r}", flush=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _say(self, phase: str, clock: Clock, pictures: int, tokens: int = 0) -> None:
        bias = _bias(clock.step)
        looked = self.look_loss.item() / (bias if phase == "looked" else 1)
        spent = max(clock.spent, 1e-9)
        print(
            f"{phase:6s} {clock.step:5d} steps  fields {looked:.4f}"
            + (f"  loss {self.read_loss.item() / bias:.4f}  {tokens / spent / 1e6:.2f} M tokens/s" if tokens else "")
            + f"  {spent / clock.step * 1e3:.1f} ms a step  {pictures / spent / 1e3:.1f} k pictures/s"
            f"  waited {100 * self.waited / spent:.0f} %  {time.monotonic() - self.began:.0f} s",
            flush=True,
        )


def _bias(steps: int) -> float:
    """Of a smoothed loss, which began with 0."""
    return 1 - 0.98**steps


def lessons(plan: Plan, tokenizer) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `Lessons` in their order, made ahead by the workers."""
    return iter(loader(Lessons(tokenizer, plan.seed, plan.tokens), plan.workers, ahead=6, sampler=_Counting()))


class _Counting:
    """Batches by their numbers, without an end; torch's own sampler would list them all."""

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1
