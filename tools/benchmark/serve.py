"""`lite_llm serve` with any option of the engine, which the command line does not have: the pool of a benchmark has a
size of its own, for another server is on the same GPU.

    python -m tools.benchmark.serve '{"model": DIRECTORY, "port": PORT, "options": {...}}'
"""

import json
import sys

from lite_llm.errors import LiteLLMError
from lite_llm.server.connections import allow_files
from lite_llm.server.options import ServeOptions, listen
from lite_llm.server.remote import RemoteLLM
from lite_llm.server.run import serve

_QUEUE = 1 << 20  # answers that may wait: a work is measured to its end, and nobody is told to come again


def main(told: str) -> int:
    wanted = json.loads(told)
    allow_files()
    wishes = ServeOptions(port=wanted["port"], max_queue=_QUEUE)
    try:
        with listen(wishes) as listener, RemoteLLM(wanted["model"], say=_say, **wanted["options"]) as llm:
            return serve(llm, listener, wishes, _say)
    except LiteLLMError as error:
        _say(f"error: {error}")
        return error.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
