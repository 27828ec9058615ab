"""The bundled chat model answers as transformers does with it: on every backend, alone or not, whole or in pieces."""

import pytest
import torch
import transformers

from lite_llm.llm import DEMO, LLM
from tests.llm.conftest import params

TALKS = [
    ["What is the capital of France?"],
    ["What is 17 + 25?"],
    ["Tell me a story."],
    ["What can you do?"],
    ["Why is the sky blue?"],
    ["Spell the word lantern."],
    ["My name is Ada.", "What is the opposite of hot?", "Count from 3 to 9.", "What is my name?"],
    ["hi", "my cat is called Mumbo", "what is 3 times 4", "what is the name of my cat?"],
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def transcripts() -> list[tuple[list[dict], list[int]]]:
    """Conversations up to the last question, and transformers' greedy answer to it in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    found = []
    for talk in TALKS:
        messages: list[dict] = []
        for question in talk:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
            answer = model.generate(prompt, do_sample=False, max_new_tokens=200)[0, prompt.shape[1] :].tolist()
            messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        found.append((messages[:-1], answer))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step_tokens", [8, 2048])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_greedy_answers_are_those_of_transformers(transcripts, device, dtype, step_tokens, prefix_cache):
    options = dict(device=device, dtype=dtype, step_tokens=step_tokens, max_requests=8, prefix_cache=prefix_cache)
    with LLM(DEMO, **options) as llm:
        conversations, answers = [messages for messages, _ in transcripts], [answer for _, answer in transcripts]
        greedy = params(max_tokens=200, temperature=0, ignore_eos=False)
        together = llm.chat(conversations, greedy)
        assert [list(out.token_ids) for out in together] == answers
        alone = [llm.chat(messages, greedy) for messages in conversations[-2:]]
        assert [list(out.token_ids) for out in alone] == answers[-2:]
        assert all(out.usage.cached_tokens > 10 for out in alone) == prefix_cache, "this time from the prefix cache"


def test_facts_are_right_and_a_name_is_remembered(transcripts):
    with LLM() as llm:
        said = [out.text for out in llm.chat([messages for messages, _ in transcripts])]
    assert "Paris" in said[0] and "42" in said[1] and "Ada" in said[6] and "Mumbo" in said[7]
