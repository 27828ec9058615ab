"""What a script needs to be installed: imports stand in `with packages():`."""

import contextlib
import sys
from collections.abc import Iterator

from lite_llm.errors import EnvironmentProblem


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """One line and SystemExit(3) where a package is missing; SystemExit(130) for Ctrl-C, as torch takes seconds."""
    try:
        import numpy  # noqa: F401 -- before torch, which warns at length if it is missing

        yield
    except ImportError as error:
        if (error.name or "").startswith(("lite_llm", "tools")):
            raise
        problem = EnvironmentProblem(f"{error}", "pip install -r requirements.txt")
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(problem.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
