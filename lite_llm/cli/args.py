"""The command line as options. Every value is checked here, before anything heavy is imported or loaded."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lite_llm
from lite_llm.config import EngineConfig
from lite_llm.engine.request import SamplingParams
from lite_llm.errors import UsageError
from lite_llm.text.escape import visible

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_SAMPLING = {
    "temperature": (float, "T", "0 is greedy; larger is more surprising"),
    "top_p": (float, "P", "keep the most probable tokens that together have probability P"),
    "top_k": (int, "K", "keep the K most probable tokens; 0 keeps all"),
    "min_p": (float, "P", "keep tokens at least P times as probable as the best"),
    "repetition_penalty": (float, "R", "over prompt and answer; 1 is none"),
    "presence_penalty": (float, "R", "over the answer, once per token; 0 is none"),
    "frequency_penalty": (float, "R", "over the answer, per occurrence; 0 is none"),
    "seed": (int, "N", "the same seed gives the same answer; default: a fresh one, reported with --json"),
}
_EXAMPLES = """\
examples:
  python cli.py                                     chat with the bundled demo model
  python cli.py -m Qwen/Qwen2.5-0.5B-Instruct       a model of the hub, or a directory
  python cli.py --connect http://127.0.0.1:8000     a model that `lite-llm serve` holds
  git diff | python cli.py -p "Write a commit message" > msg.txt
"""
_LLAVA_EXAMPLES = """\
examples:
  python cli_llava.py                               ask the bundled demo about one of its pictures
  python cli_llava.py -m llava-hf/llava-1.5-7b-hf -i photo.jpg
  python cli_llava.py -m MODEL -i before.png -i after.png -p "What has changed?"
"""
_EXIT_CODES = """\
exit codes: 0 ok, 1 unexpected, 2 usage, 3 environment, 4 does not fit, 5 model unsupported or corrupt,
            6 network, access or disk, 130 Ctrl-C, 141 closed pipe"""


class Parser(argparse.ArgumentParser):
    """Errors are two lines, not a page of usage; a flag that is misspelt is answered with the nearest."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            given = unknown[1].split("=")[0]
            longer = [flag for flag in flags if flag.startswith(given)]
            near = longer or difflib.get_close_matches(given, flags, 1)
            message = f"{message[:200]}" + (f"; did you mean {near[0]}?" if near else "")
        sys.stderr.write(f"error: {visible(' '.join(message.split()))[:400]}\n{self.prog} --help lists what there is\n")
        raise SystemExit(UsageError.exit_code)


def chat_parser(prog: str) -> Parser:
    return _chat_parser(prog, "Chat with a Llama or Qwen model in this terminal.", _EXAMPLES)


def llava_parser(prog: str) -> Parser:
    return _chat_parser(prog, "Ask a LLaVA model about pictures in this terminal.", _LLAVA_EXAMPLES)


def _chat_parser(prog: str, description: str, examples: str) -> Parser:
    parser = Parser(prog=prog, description=description, epilog=examples + _EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"lite_llm {lite_llm.__version__}")
    add_model(parser).add_argument(
        "--connect", metavar="URL", type=_filled,
        help="ask the server there, ours or any that speaks OpenAI's API, instead of a model in this process; "
        "--model names one of its models, LITE_LLM_API_KEY holds its key",
    )  # fmt: skip

    one_shot = parser.add_argument_group("one answer instead of a chat")
    one_shot.add_argument("-p", "--prompt", metavar="TEXT", help="ask this and leave; - reads standard input")
    one_shot.add_argument("--json", action="store_true", help="print one JSON document")

    talk = parser.add_argument_group("conversation")
    talk.add_argument(
        "-i", "--image", metavar="PATH_OR_URL", type=_filled, action="append", default=[],
        help="a picture to ask about, for models that see; repeatable",
    )  # fmt: skip
    talk.add_argument("--system", metavar="TEXT", type=_filled, help="the system prompt")
    talk.add_argument("--resume", metavar="FILE", help="go on with the conversation in FILE; every turn is saved to it")

    sampling = parser.add_argument_group("sampling (default: the model's generation_config.json)")
    sampling.add_argument(
        "--max-tokens", metavar="N", type=_size, help="of the answer; default: the rest of the context"
    )
    sampling.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends the answer; repeatable")
    for name, (kind, metavar, text) in _SAMPLING.items():
        sampling.add_argument("--" + name.replace("_", "-"), type=_number(kind), metavar=metavar, help=text)

    output = parser.add_argument_group("output")
    output.add_argument("--raw", action="store_true", help="the model's text as it is: no Markdown, nothing escaped")
    add_output(output)
    return parser


def plan_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Say what a model needs in memory and whether it fits; loads no weights.")
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_output(parser)
    return parser


def warmup_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description="Compile a model's kernels for this GPU and keep them on disk; loads no weights."
    )
    add_model(parser)
    parser.add_argument(
        "--max-requests", metavar="N", type=_count, help="requests together; default: 4 as in chat, and 64 as in LLM()"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_output(parser)
    return parser


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", type=_filled, help="a directory or a hub id; default: the bundled demo")
    group.add_argument("path", nargs="?", metavar="MODEL", type=_filled, help="the same, without the flag")
    group.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument("--context", metavar="N", type=_size, help="longest prompt + answer in tokens, such as 32k")
    group.add_argument(
        "--drafts", metavar="N", type=_number(int), default=EngineConfig.drafts,
        help="guess up to N tokens from what prompt and answer already said, and check them in one step: faster where "
        "text repeats itself; answers stay, up to rounding; default: %(default)s",
    )  # fmt: skip
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every turn from its first token")
    group.add_argument("--no-cuda-graphs", action="store_true", help="launch kernels one by one: slower, starts sooner")
    group.add_argument("--ignore-config", metavar="KEYS", type=_keys, default=(), help="config.json keys, a,b,c")
    return group


def add_output(group: argparse._ActionsContainer) -> None:
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-q", "--quiet", action="store_true", help="answers and errors only")
    volume.add_argument("-v", "--verbose", action="store_true", help="the log too")
    group.add_argument("--debug", action="store_true", help="tracebacks with errors (also LITE_LLM_DEBUG=1)")


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parsed and checked: adds `engine` (fields of EngineConfig) and, for a chat, `params`."""
    options = parser.parse_args(argv)
    if options.path is not None and Path(options.path).is_file():
        parser.error(f"{options.path} is a file; a model is a directory or a hub id, and pictures go with --image")
    if options.path is not None and options.model is not None:
        parser.error(f"two models: {options.path} and --model {options.model}")
    options.model = options.model if options.path is None else options.path
    options.engine = dict(
        device=options.device,
        dtype=options.dtype,
        context=options.context,
        drafts=options.drafts,
        prefix_cache=not options.no_prefix_cache,
        cuda_graphs=not options.no_cuda_graphs,
        ignore_config=options.ignore_config,
        max_requests=4,  # one answer at a time: no memory for the tables of 64
    )
    if "connect" in options and options.connect is not None:
        for name in ("device", "dtype", "context", "drafts", "no_prefix_cache", "no_cuda_graphs", "ignore_config"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for a model in this process; leave it out with --connect")
    try:
        EngineConfig(**options.engine)
        if "prompt" in options:
            names = ("max_tokens", *_SAMPLING)
            wishes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
            options.params = SamplingParams(**wishes, stop=tuple(options.stop))
    except UsageError as error:
        name, _, rest = str(error).partition(" = ")
        parser.error(f"--{name.replace('_', '-')}: {rest}")
    return options


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([km]?)", text.strip().lower(), re.ASCII)
    tokens = float(match[1]) * _UNITS[match[2]] if match else 0.5
    if tokens != int(tokens) or tokens < 1:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of tokens; expected 4096, 32k, ...")
    return int(tokens)


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of requests; expected 1, 64, ...")
    return int(text)


def _number(kind: type) -> Callable[[str], int | float]:
    def number(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {expected}") from None

    return number


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a device; expected auto, cpu, cuda or cuda:N")
    return text


def _keys(text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(","))
    if not all(keys):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} has an empty key; expected keys of config.json, as in a,b,c")
    return keys


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text
