"""The demo lessons and the two bundled checkpoints. The exam's figures are in the model cards; here a
handful of its questions proves that what lies in the repository is what was examined."""

import itertools
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import demo_copy, demo_data, demo_exam, demo_numbers, demo_text
from tools.demo_topics import Memo

DEMO = Path(__file__).parents[2] / "lite_llm" / "demo"
MiB = 1 << 20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "chat", padding_side="left")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "chat", dtype="float32").eval()


def test_a_dialogue_follows_from_its_seed():
    assert demo_data.dialogue("a") == demo_data.dialogue("a")
    assert demo_data.plain_text("a") == demo_data.plain_text("a")
    assert demo_data.dialogue("a") != demo_data.dialogue("b")
    assert demo_data.held_out("sum", 5) == demo_data.held_out("sum", 5)


def test_turns_alternate_and_nothing_is_empty():
    for i in range(300):
        messages = [m for m in demo_data.dialogue(f"{i}") if m["role"] != "system"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] == m["content"].strip() != "" for m in messages)


@pytest.mark.parametrize("topic", demo_data.TOPIC_NAMES)
def test_the_exam_asks_only_what_training_never_asks(topic):
    """No question of the exam, in lower case, is among those of 3,000 training dialogues."""
    asked = {messages[-1]["content"].lower() for messages, _ in demo_data.held_out(topic, 60)}
    if topic == demo_data.MEMORY:  # there the value is held out, and the question is not
        asked = {messages[-1]["content"].lower() for messages, _ in _told()}
    taught = itertools.chain.from_iterable(demo_data.dialogue(f"{i}") for i in range(3000))
    assert asked.isdisjoint(m["content"].lower() for m in taught if m["role"] == "user")


def _told():
    """The exam's memory dialogues up to the statement that is to be remembered."""
    for messages, answer in demo_data.held_out(demo_data.MEMORY, 60):
        told = next(i for i, m in enumerate(messages) if m["role"] == "user")
        yield messages[: told + 1], answer


def test_about_one_key_in_twelve_is_held():
    rng = random.Random(0)
    held = sum(demo_data.is_held(f"{rng.random()}") for _ in range(6000))
    assert 400 < held < 600
    assert not demo_data.is_held("")


def test_answers_are_right():
    """Recomputed from the text of the answer, for the topics where that is possible."""
    rng, signs = random.Random(0), {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    for ask in (demo_numbers.add, demo_numbers.subtract, demo_numbers.multiply):
        for _ in range(300):
            a, sign, b, _, c = ask(rng, Memo()).answer.removesuffix(".").split()
            assert signs[sign](int(a), int(b)) == int(c)


def test_the_template_writes_bos_once(tokenizer):
    for i in range(50):
        messages = demo_data.dialogue(f"{i}")
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        assert ids == demo_text.encode(tokenizer.backend_tokenizer, [messages])[0][0]
        assert ids.count(demo_text.BOS) == 1 and ids[-1] == demo_text.END
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == [*ids, demo_text.ASSISTANT]


def test_plain_text_gets_bos_once(tokenizer):
    assert tokenizer("Hi").input_ids.count(demo_text.BOS) == 1


@pytest.mark.parametrize(
    "text",
    ["naïve Zoë", "東京 🦊👩‍👩‍👧", "e\u0301 is not é", " \t\n\r\n  x  ", "a\0b", "<|nothing|> x=1;\n\treturn", "١٢٣"],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("name, limit", [("chat", 16 * MiB), ("copy", 3 * MiB)])
def test_the_bundled_files_are_small_and_complete(name, limit):
    files = {file.name: file.stat().st_size for file in (DEMO / name).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) < limit


def test_the_chat_model_answers_held_out_questions(tokenizer, model):
    for topics in (["capital", "sum", "memory", "opposite"], ["spelling", "product", "letters", "colour"]):
        asked = [question for topic in topics for question in demo_data.held_out(topic, 3)]
        replies = demo_exam.answers(model, tokenizer, [messages for messages, _ in asked], 60)
        assert sum(reply == answer for reply, (_, answer) in zip(replies, asked, strict=True)) >= 11


def test_the_chat_model_remembers_a_name_across_its_own_answers(tokenizer, model):
    messages = []
    says = ["My name is Ada.", "What is the capital of France?", "What is 7 + 5?", "Thank you!", "What is my name?"]
    for text in says:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": demo_exam.answers(model, tokenizer, [messages], 60)[0]})
    assert [m["content"] for m in messages[1::2]] == [
        "Nice to meet you, Ada!",
        "The capital of France is Paris.",
        "7 + 5 = 12.",
        "You are welcome!",
        "Your name is Ada.",
    ]


def test_the_copy_model_copies_with_a_wide_margin():
    score = demo_copy.examine(DEMO / "copy", demo_copy.strings("test", 50))
    assert score.exact == score.asked == 50
    assert score.margin >= 3


def test_the_copy_tokenizer_ignores_blanks():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "copy")
    ids = tokenizer("A b 7 <sep>").input_ids
    assert ids == tokenizer("Ab7<sep>").input_ids and ids[0] == demo_copy.BOS and ids[-1] == demo_copy.SEP
    assert tokenizer.decode(ids[1:-1]) == "Ab7"
