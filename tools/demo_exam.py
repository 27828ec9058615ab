"""Greedy answers of a saved demo chat model to held-out questions, with transformers.

An answer counts only when it equals the right one character for character.
"""

import datetime
import platform
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo_data import TOPIC_NAMES, Message, held_out

Scores = dict[str, tuple[int, int]]  # topic -> right, asked
_BATCH = 256


def examine(folder: Path, per_topic: int, device: torch.device, show: int = 2) -> Scores:
    """Asks `per_topic` questions a topic in float32; prints up to `show` wrong answers a topic."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    asked = [(t, messages, answer) for t in TOPIC_NAMES for messages, answer in held_out(t, per_topic)]
    asked.sort(key=lambda row: (len(row[2]) // 40, sum(len(m["content"]) for m in row[1])))
    scores = dict.fromkeys(TOPIC_NAMES, (0, 0))
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        replies = answers(model, tokenizer, [messages for _, messages, _ in part], max(len(a) for *_, a in part))
        for (topic, messages, answer), reply in zip(part, replies, strict=True):
            right, total = scores[topic]
            if reply != answer and total - right < show:
                print(f"wrong, {topic}: {messages[-1]['content']!r} -> {reply!r}, not {answer!r}", flush=True)
            scores[topic] = right + (reply == answer), total + 1
    return scores


@torch.inference_mode()
def answers(model, tokenizer, dialogues: list[list[Message]], letters: int) -> list[str]:
    """The model's greedy reply to each dialogue, of at most about `letters` tokens."""
    batch = tokenizer.apply_chat_template(
        dialogues, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    out = model.generate(**batch, max_new_tokens=letters + 8)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def overall(scores: Scores) -> tuple[int, int]:
    return sum(r for r, _ in scores.values()), sum(n for _, n in scores.values())


def table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    rows = [*scores.items(), ("**all**", overall(scores))]
    lines = [f"| {topic} | {right} of {asked} | {100 * right / asked:.1f} % |" for topic, (right, asked) in rows]
    return "\n".join(["| topic | right | share |", "| --- | --- | --- |", *lines])


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"


def card(plan, facts: dict[str, float], scores: Scores) -> str:
    """The model card; `facts` are the measured parameters, steps, tokens, loss and seconds."""
    right, asked = overall(scores)
    return _CARD.format(
        parameters=f"{facts['parameters'] / 1e6:.2f}",
        share=f"{100 * right / asked:.1f}",
        right=right,
        asked=asked,
        table=table(scores),
        steps=facts["steps"],
        tokens=f"{facts['tokens'] / 1e6:.0f}",
        loss=f"{facts['loss']:.4f}",
        seconds=f"{facts['seconds']:.0f}",
        seed=plan.seed,
        arguments=f"--steps {facts['steps']} --seed {plan.seed}" + (" --resume DIR" if plan.start else ""),
        before=_before(plan.start),
        hardware=hardware(plan.device),
        precision="bfloat16 autocast" if plan.device.type == "cuda" else "float32",
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
    )


def _before(start: Path | None) -> str:
    """How the checkpoint that training went on from was made, from its own card."""
    if start is None:
        return ""
    made = (start / "README.md").read_text(encoding="utf-8").partition(_MADE)[2]
    return "\n### The checkpoint that DIR stands for\n" + made.partition("\nAll training text")[0]


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
license: apache-2.0
---

# lite_llm demo/chat

A Llama of {parameters} million parameters, trained from scratch by `tools/train_demo.py`, so that
lite_llm can be tried and tested on any machine without a download.

## What it is

It answers, in English and in many phrasings: capitals, opposites, colours of things, days and
months, letters, spelling, counting, sums and differences of 0 to 99, products of 0 to 12, small
talk, and questions about lite_llm. It remembers your name, city, pet, age and favourite things
across turns, also names it never saw. It heeds two kinds of system prompt: "Be brief." and "Your name
is Bolt.". To other questions it answers that it does not know.

Greedy decoding is the default (`generation_config.json`): every lesson has exactly one right
answer. The context is 2,048 tokens. Text without the chat template works for a few sentences that
it knows ("The capital of France is").

## What it is not

Not a source of knowledge and not a language model for any use of its own: it knows only what its
script made up, cannot reason, and may answer nonsense where it should say that it does not know.

## Measured

{right} of {asked} held-out questions right ({share} %), greedy, float32 computation on the
bfloat16 weights of this directory, with transformers. Right means equal character for character.

{table}

Held out means: never in training in any style. For facts it is the phrase with its item (the fact
itself is taught in other phrases), for sums and differences above 12 the pair of numbers (for sums
in either order), for spelling, stories, unknown places and memory the word or name itself, for
lite_llm and small talk the question with the words before it, for identity that together with the
assistant's name (the same words do occur with other names). Half of the questions follow one to
five other turns; "memory" asks after two to six turns about other things. The earlier turns hold
the right answers, not the model's own.

## How it was made

| | |
| --- | --- |
| command | `python tools/train_demo.py --only chat {arguments}` |
| hardware | {hardware}, {precision} |
| torch | {torch} |
| date | {date} |
| seed | {seed} |
| steps | {steps} |
| tokens, padding included | {tokens} million |
| training time | {seconds} s |
| last training loss (answers only) | {loss} |

All training text is generated by `tools/demo_data.py`; no other text and no other model was used.
{before}"""
_MADE = "## How it was made\n"
