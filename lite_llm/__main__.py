"""`python -m lite_llm` is the command lite-llm."""

from lite_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m lite_llm"))
