"""What is seen while a benchmark runs: what happens now, a bar, or the requests in flight."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lite_llm.cli.flight import FlightView
from lite_llm.outputs import InFlight


class Screen(Console):
    """Whoever reads it may leave: BrokenPipeError, which rich itself would make exit code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Moment:
    """The requests of another process, as it told them."""

    def __init__(self, told: dict):
        self.told = told

    def in_flight(self) -> InFlight:
        return InFlight.read(self.told)


class Teller:
    """What happens now, with a bar, on a terminal; a line each where output is no terminal."""

    def __init__(self, total: int):
        self.console = Screen(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> "Teller":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    @contextlib.contextmanager
    def flight(self) -> Iterator[Callable[[dict], None]]:
        """The requests in flight instead of the bar, from what a side tells of them."""
        self.bar.stop()
        with FlightView(self.console) as view:
            yield lambda told: view.update(_Moment(told))
        self.bar.start()

    def __call__(self, text: str) -> None:
        if text.startswith("left out") or not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)
        self.bar.update(self.task, description=text.partition("\n")[0], advance="warming" in text or ": round" in text)
