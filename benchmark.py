"""Measure lite_llm on this machine, against transformers and others: `python benchmark.py --help`."""

import sys

try:
    import numpy  # noqa: F401 -- before torch, which warns at length if it is missing

    from tools.benchmark.main import main
except ModuleNotFoundError as error:
    if (error.name or "").startswith(("lite_llm", "tools")):
        raise
    print(f"error: {error}: pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(3) from None

if __name__ == "__main__":
    raise SystemExit(main())
