"""Greedy answers of a saved demo vision model to held-out questions, the way `cli_llava.py` gets them.

An answer counts only when it equals the right one character for character.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from lite_llm import LLM, SamplingParams
from tools.demo_exam import Scores
from tools.demo_vision_data import TOPIC_NAMES, Dialogue, held_out
from tools.demo_vision_draw import draw

Message = dict[str, object]
_BATCH = 64
_LONGEST = 160  # tokens of an answer; the longest right ones, of three pictures, have some 110


def messages(dialogue: Dialogue, rng: random.Random) -> tuple[list[Message], str]:
    """The dialogue up to its last question, in OpenAI's form with pictures as PIL images, and the right answer."""
    out: list[Message] = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    for exchange in dialogue.exchanges:
        pictures = [{"type": "image", "image": draw(rng, shown)} for shown in exchange.pictures]
        out.append({"role": "user", "content": [*pictures, {"type": "text", "text": exchange.user}]})
        out.append({"role": "assistant", "content": exchange.answer})
    return out[:-1], dialogue.exchanges[-1].answer


def asked(topic: str, count: int) -> list[tuple[list[Message], str]]:
    """`count` held-out questions of a topic with their answers."""
    return [messages(d, random.Random(f"{topic} {i}")) for i, d in enumerate(held_out(topic, count))]


def answers(llm: LLM, conversations: Sequence[list[Message]]) -> list[str]:
    return [output.text for output in llm.chat(list(conversations), SamplingParams(temperature=0, max_tokens=_LONGEST))]


def examine(folder: Path, per_topic: int, show: int = 3, **options) -> Scores:
    """Asks `per_topic` questions a topic; prints up to `show` wrong answers a topic. `options` are those of `LLM`."""
    scores: Scores = {}
    with LLM(folder, say=lambda text: None, **options) as llm:
        for topic in TOPIC_NAMES:
            right, rows = 0, asked(topic, per_topic)
            wrong: list[str] = []
            for start in range(0, len(rows), _BATCH):
                part = rows[start : start + _BATCH]
                for (said, answer), reply in zip(part, answers(llm, [said for said, _ in part]), strict=True):
                    right += reply == answer
                    if reply != answer:
                        wrong.append(
                            f"wrong, {topic}: {said[-1]['content'][-1]['text']!r} -> {reply[:120]!r}, not {answer!r}"
                        )
            scores[topic] = right, len(rows)
            print("\n".join([f"{topic}: {right} of {len(rows)}", *wrong[:show]]), flush=True)
    return scores
