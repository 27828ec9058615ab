"""`lite-llm top URL`: the live view of the requests in a server, from its /v1/requests."""

import argparse
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from lite_llm.cli import args
from lite_llm.cli.flight import FRAME, FlightView, top
from lite_llm.cli.screen import Screen, width
from lite_llm.cli.serve import KEY
from lite_llm.errors import SourceProblem, UsageError
from lite_llm.outputs import InFlight

_DEADLINE = 5.0  # seconds for a server to answer
_MOST_BYTES = 64 << 20


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = args.Parser(prog=prog, description="Watch the requests in a server; Ctrl-C leaves.")
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get(KEY), help=f"its key (also {KEY})")
    parser.add_argument("--once", action="store_true", help="print one moment and leave, as when this is no terminal")
    args.add_output(parser)
    parser.set_defaults(json=False)
    return parser.parse_args(argv)


class Remote:
    """The requests of a server, to be watched like those of an LLM."""

    def __init__(self, url: str, api_key: str | None):
        url = url if "://" in url else f"http://{url}"
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url[:200]} is no http URL", "pass the server's address, as http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def in_flight(self) -> InFlight:
        """SourceProblem if the server cannot be asked, or answers something else."""
        try:
            request = urllib.request.Request(f"{self.url}/v1/requests", headers=self._headers)
            with urllib.request.urlopen(request, timeout=_DEADLINE) as response:
                found = json.loads(response.read(_MOST_BYTES))
            return InFlight.read(found)
        except urllib.error.HTTPError as error:
            hint = f"pass --api-key, or set {KEY}" if error.code == 401 else "look at the server"
            raise SourceProblem(f"{self.url} answers {error.code}", hint) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise SourceProblem(f"{self.url} cannot be asked: {reason}", "is the server running there?") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SourceProblem(f"{self.url} is no lite_llm server", "pass its address, without a path") from None


def run(options: argparse.Namespace, screen: Screen, sleep: Callable[[float], None] = time.sleep) -> int:
    remote = Remote(options.url, options.api_key)
    if options.once or not screen.err.isatty():
        screen.out.write(top(remote.in_flight(), None, 0, width()) + "\n")
        return 0
    with FlightView() as view:
        while True:
            view.update(remote)
            sleep(FRAME)
