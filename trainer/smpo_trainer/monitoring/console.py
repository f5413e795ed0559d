"""What a run says while it goes: lines, and a progress bar with the numbers that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smpo_trainer.monitoring.metrics import Record

_BAR_WIDTH = 8
"""Leaves room for the numbers in 80 columns."""

_LINES_WITHOUT_TERMINAL = 20
"""How many progress lines a run writes into a file or a pipe."""

_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("acc", "rewards/accuracies", "{:.2f}"),
    ("margin", "rewards/margins", "{:+.2f}"),
    ("pairs/s", "pairs_per_second", "{:.1f}"),
    ("wait", "data_wait_percent", "{:.1f}%"),
)
"""Label, name in the record and format of the numbers beside the bar; acc is the implicit accuracy, wait the time
without data."""


class _Console(Console):
    """Falls silent where whoever read it is gone (`smpo-train ... | head`): the run goes on, its files say the same."""

    def on_broken_pipe(self) -> None:
        """See the base class, which would end the program."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class RunConsole:
    """Speaks for the main process only. Between ``start`` and ``stop`` there is a progress bar."""

    def __init__(self, *, is_main: bool) -> None:
        self._console = _Console(highlight=False, soft_wrap=True, quiet=not is_main)
        self._progress = Progress(
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not (is_main and self._console.is_terminal),
        )

    def say(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A line and a bar for work before the first step; yields what is called once for each of ``total``."""
        self.say(title)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, disable=self._progress.disable, transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)

    def start(self, finished_steps: int, max_steps: int) -> None:
        """Show the bar."""
        self._max_steps = max_steps
        self._task = self._progress.add_task("training", total=max_steps, completed=finished_steps, numbers="")
        self._progress.start()

    def step(self, record: Record) -> None:
        """Show a finished step."""
        step = int(record["step"] or 0)
        numbers = _numbers(record)
        self._progress.update(self._task, completed=step, numbers=numbers)
        interval = max(1, self._max_steps // _LINES_WITHOUT_TERMINAL)
        if self._progress.disable and (step % interval == 0 or step in (1, self._max_steps)):
            self.say(f"step {step}/{self._max_steps}: {numbers}")

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def _numbers(record: Record) -> str:
    return ", ".join(
        f"{label} {'-' if (value := record.get(name)) is None else form.format(value)}" for label, name, form in _SHOWN
    )
