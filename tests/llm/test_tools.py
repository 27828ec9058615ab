"""Tools reach the prompt of a conversation, and are refused where nobody would be told of them."""

import pytest

from lite_llm.errors import UsageError
from lite_llm.llm import LLM
from lite_llm.prompts import Encoded
from tests.llm.conftest import CHAT, OPTIONS
from tests.text.build import byte_level, write
from tests.text.test_tools import HERMES

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_are_read_into_the_prompt(checkpoint, tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write(folder, byte_level(), HERMES)
    with LLM(folder, **OPTIONS) as llm:
        told, plain = llm.read(CHAT, tools=TOOLS), llm.read(CHAT)
        assert '"name": "weather"' in llm.tokenizer.decode(told.ids) and plain.ids == llm.read(CHAT, tools=[]).ids
        assert list(told.ids)[-len(plain.ids) + 1 :] == list(plain.ids)[1:]


def test_tools_that_nobody_is_told_of_are_refused(llm):
    with pytest.raises(UsageError, match="takes no tools"):
        llm.read(CHAT, tools=TOOLS)
    for prompt in ("Hello", [1, 2], Encoded([1, 2])):
        with pytest.raises(UsageError, match="for conversations"):
            llm.read(prompt, tools=TOOLS)
    assert llm.read(CHAT, tools=[]).ids
