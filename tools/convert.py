"""Convert a Hugging Face directory to a fused one, which loads faster, or verify one that was converted.

python tools/convert.py SOURCE OUT [--dtype bfloat16] [--overwrite] [--verify]
python tools/convert.py --verify OUT
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lite_llm.config import HFConfig  # noqa: E402
from lite_llm.errors import LiteLLMError, UsageError  # noqa: E402
from lite_llm.layers import LayerFactory  # noqa: E402
from lite_llm.models import registry  # noqa: E402
from lite_llm.weights.files import open_checkpoint  # noqa: E402
from lite_llm.weights.fused import verify_fused, write_fused  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def convert(source: Path, out: Path, dtype: torch.dtype | None, overwrite: bool, ignore: tuple[str, ...]) -> None:
    """`dtype` None keeps the one that the tensors are stored in."""
    cfg = registry.parse(HFConfig.load(source, ignore))
    module, model = registry.find(cfg.architecture)
    make = LayerFactory(dtype or open_checkpoint(source).dtype, "meta")
    with bar(f"writing {out}") as progress:
        write_fused(model(make, cfg), module.RULES, source, out, overwrite=overwrite, progress=progress)


def verify(directory: Path) -> None:
    with bar(f"verifying {directory}") as progress:
        verify_fused(directory, progress)


@contextmanager
def bar(title: str):
    """A progress bar on stderr if someone is looking at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face directory")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="directory to write; appears when it is whole")
    parser.add_argument("--dtype", choices=DTYPES, help="convert to this dtype; the default keeps the stored one")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a converted directory")
    parser.add_argument(
        "--verify", action="store_true", help="compare every checksum of OUT (or of the only directory)"
    )
    parser.add_argument("--ignore-config", default="", metavar="KEYS", help="config.json keys that change nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    try:
        if options.out is not None:
            ignore = tuple(key for key in options.ignore_config.split(",") if key)
            convert(options.source, options.out, DTYPES.get(options.dtype), options.overwrite, ignore)
        elif not options.verify:
            raise UsageError("OUT is missing", "give SOURCE and OUT, or --verify and a converted directory")
        if options.verify:
            verify(options.out or options.source)
    except LiteLLMError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        return 130
    print(f"{options.out or options.source}: {'verified' if options.verify else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
