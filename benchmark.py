"""Measure lite_llm on this machine, against transformers and others: `python benchmark.py --help`."""

from tools.needs import packages

with packages():
    from tools.benchmark.main import main

if __name__ == "__main__":
    raise SystemExit(main())
