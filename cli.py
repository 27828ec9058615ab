"""Chat with a model in this terminal: `python cli.py --help`. The same as `lite-llm chat`."""

from lite_llm.cli import chat_main

if __name__ == "__main__":
    raise SystemExit(chat_main())
