"""`lite-llm top URL`: the live view of the requests in a server, from its /v1/requests."""

import argparse
import os
from collections.abc import Sequence

from lite_llm.cli import args
from lite_llm.cli.client import Client
from lite_llm.cli.flight import FRAME, FlightView, Watched, top
from lite_llm.cli.keys import CTRL_D, Keys
from lite_llm.cli.screen import Screen, width
from lite_llm.cli.serve import KEY


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = args.Parser(prog=prog, description="Watch the requests in a server; q or Ctrl-C leaves.")
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get(KEY), help=f"its key (also {KEY})")
    parser.add_argument("--once", action="store_true", help="print one moment and leave, as when this is no terminal")
    args.add_output(parser)
    parser.set_defaults(json=False)
    return parser.parse_args(argv)


def run(options: argparse.Namespace, screen: Screen) -> int:
    client = Client(options.url, options.api_key)
    if options.once or not screen.err.isatty():
        screen.out.write(top(client.in_flight(), None, 0, width()) + "\n")
        return 0
    watch(client)
    return 0


def watch(watched: Watched) -> None:
    """Show its requests until q or Ctrl-D; KeyboardInterrupt passes through."""
    with Keys() as keys, FlightView(hint="q or Ctrl-C leaves" if keys.heard else "Ctrl-C leaves") as view:
        key = ""
        while key not in ("q", "Q", CTRL_D):
            view.update(watched)
            key = keys.wait(FRAME)
