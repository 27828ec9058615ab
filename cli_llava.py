"""Ask a model about pictures in this terminal: `python cli_llava.py --help`."""

from lite_llm.cli import llava_main

if __name__ == "__main__":
    raise SystemExit(llava_main())
