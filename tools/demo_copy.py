"""Trains the copy model, the oracle of the engine tests: "<s> A b 7 <sep>" -> "A b 7 </s>".

The symbols of a string are distinct, so each symbol tells which one follows; every right answer is
known beforehand and comes with a margin of several units of logit.
"""

import datetime
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from tools import demo_tokenizer
from tools.demo_exam import hardware
from tools.demo_model import DemoLlama, llama_config, save_model
from tools.demo_training import learn

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"
SPECIAL = ["<s>", "<sep>", "</s>", "<unk>"]
BOS, SEP, EOS, UNK = range(4)
LONGEST = 48
CONTEXT = 256


@dataclass(frozen=True)
class Plan:
    device: torch.device
    steps: int = 3000
    rows: int = 96
    rate: float = 2e-3
    warmup: int = 100
    seed: int = 1
    exam: int = 1000


@dataclass(frozen=True)
class Score:
    exact: int
    asked: int
    margin: float  # the smallest gap between the best two logits of any token
    median: float


def config() -> LlamaConfig:
    return llama_config(
        vocab_size=len(SPECIAL) + len(SYMBOLS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def strings(seed: str, count: int, longest: int = LONGEST) -> list[str]:
    """`count` strings of 1 to `longest` distinct symbols."""
    rng = random.Random(seed)
    return ["".join(rng.sample(SYMBOLS, rng.randint(1, longest))) for _ in range(count)]


def build(plan: Plan, folder: Path) -> None:
    torch.manual_seed(plan.seed)
    _tokenizer().save_pretrained(folder)
    cfg = config()
    model = DemoLlama(cfg).to(plan.device)
    began = time.monotonic()
    _train(plan, model)
    seconds = time.monotonic() - began
    save_model(model, cfg, torch.float32, folder, max_new_tokens=LONGEST + 2)
    score = examine(folder, strings(f"exam {plan.seed}", plan.exam))
    print(f"copied {score.exact} of {score.asked}; margin {score.margin:.2f}, median {score.median:.2f}", flush=True)
    count = sum(p.numel() for p in model.parameters())
    text = _CARD.format(
        parameters=f"{count / 1e6:.2f}", longest=LONGEST, score=score, steps=plan.steps, seed=plan.seed,
        seconds=f"{seconds:.0f}", hardware=hardware(plan.device), torch=torch.__version__,
        date=datetime.date.today().isoformat(),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


@torch.inference_mode()
def examine(folder: Path, asked: list[str]) -> Score:
    """Copies each string step by step with its own cache, in float32 on the CPU, with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact, gaps = 0, []
    for length in sorted({len(s) for s in asked}):
        group = [s for s in asked if len(s) == length]
        prompt = tokenizer([f"{s}<sep>" for s in group], return_tensors="pt").input_ids
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length + 1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        replies = tokenizer.batch_decode(out.sequences[:, prompt.shape[1] :])
        exact += sum(reply == f"{s}</s>" for reply, s in zip(replies, group, strict=True))
        top = torch.stack(out.logits).topk(2).values
        gaps.append((top[..., 0] - top[..., 1]).flatten())
    gap = torch.cat(gaps)
    return Score(exact, len(asked), gap.min().item(), gap.median().item())


def _train(plan: Plan, model: DemoLlama) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(plan.seed)
    smooth = 0.0
    for step in range(plan.steps):
        share = min(1.0, (step + 1) / plan.warmup, (plan.steps - step) / (0.5 * plan.steps))
        ids, spots = (t.to(plan.device) for t in _batch(plan.rows, generator))
        loss = model.loss(ids, spots)
        learn(model, optimizer, loss, plan.rate * share)
        if step % 200 == 0 or step + 1 == plan.steps:
            smooth = loss.item()
            print(f"copy: step {step:5d}/{plan.steps}  loss {smooth:.5f}", flush=True)


def _batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one random length a batch: <s> s <sep> s </s>, and the flat indices of the copy."""
    length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
    s = torch.rand(rows, len(SYMBOLS), generator=generator).argsort(1)[:, :length] + len(SPECIAL)
    bos, sep, eos = (torch.full((rows, 1), token) for token in (BOS, SEP, EOS))
    ids = torch.cat((bos, s, sep, s, eos), 1)
    spots = torch.arange(ids.numel()).view_as(ids)[:, length + 2 :].flatten()
    return ids, spots


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; blanks between symbols are ignored, decoding writes none."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return demo_tokenizer.fast(tokenizer, "<s>", "</s>", CONTEXT, unk_token="<unk>", sep_token="<sep>")


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---

# lite_llm demo/copy

A two-layer Llama of {parameters} million parameters that repeats a string of distinct symbols and stops:
`<s> A b 7 <sep>` -> `A b 7 </s>`. It is the oracle of the engine tests: every request carries its own right
answer, so a wrong slot, a stale row or a leaked prefix shows as a wrong symbol. It is good for nothing else.

The symbols are `A-Z a-z 0-9 + -`, one token each; blanks in a prompt are ignored, and the tokenizer adds `<s>`.
A prompt is the symbols, each at most once, 1 to {longest} of them, and `<sep>`.

## Measured

{score.exact} of {score.asked} random strings of 1 to {longest} symbols copied exactly, greedy, float32 on the CPU,
with transformers. The strings come from a seed of their own. The smallest gap between the best two logits over all
tokens, `</s>` included, is {score.margin:.2f}; the median is {score.median:.2f}.

## How it was made

| | |
| --- | --- |
| command | `python tools/train_demo.py --only copy --steps {steps}` |
| hardware | {hardware}, float32 |
| torch | {torch} |
| date | {date} |
| seed | {seed} |
| steps | {steps} |
| training time | {seconds} s |
"""
