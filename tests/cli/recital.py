"""`python -m tests.cli.recital TEXT`: the chat of cli.py with a model that recites TEXT, slowly, for tests in a pty."""

import os
import sys

from lite_llm.cli.chat import Chat
from lite_llm.cli.line import LineInput, plain_line
from lite_llm.cli.screen import Screen
from lite_llm.cli.session import Session
from lite_llm.engine.request import SamplingParams
from tests.cli.doubles import FakeLLM


def main() -> int:
    text = sys.argv[1].encode().decode("unicode_escape")
    ask = plain_line if os.environ["TERM"] == "dumb" else LineInput()
    return Chat(Session(FakeLLM(text, delay=0.02), SamplingParams()), Screen.of_process(), ask).run()


if __name__ == "__main__":
    raise SystemExit(main())
