"""Output of a run to the terminal: lines, and a progress bar with the main metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smpo_trainer.monitoring.metrics import Record

_BAR_WIDTH = 8
"""Leaves room for the numbers in 80 columns."""

_LINES_WITHOUT_TERMINAL = 20
"""Number of progress lines if the output is a file or a pipe."""

_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("acc", "rewards/accuracies", "{:.2f}"),
    ("margin", "rewards/margins", "{:+.2f}"),
    ("states/s", "states_per_second", "{:.1f}"),
    ("wait", "data_wait_percent", "{:.1f}%"),
)
"""Label, metric and format of the numbers beside the bar. acc is the implicit accuracy, wait the time spent waiting for
data."""


class _Console(Console):
    """Stops printing if the reader of a pipe exits (`smpo-train ... | head`); the run continues."""

    def on_broken_pipe(self) -> None:
        """See the base class, which would exit."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class RunConsole:
    """Prints in the main process only; shows a progress bar between ``start`` and ``stop``."""

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
        """Print a line, above the progress bar if it is shown."""
        self._console.print(text, markup=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a line and a bar for work before the first step.

        Yields a function to call after each of the ``total`` parts of the work.
        """
        self.say(title)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, disable=self._progress.disable, transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)

    def start(self, finished_steps: int, max_steps: int) -> None:
        """Show the progress bar."""
        self._max_steps = max_steps
        for earlier in self._progress.task_ids:  # of a run that was rolled back
            self._progress.remove_task(earlier)
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
        """Stop updating the progress bar."""
        self._progress.stop()


def _numbers(record: Record) -> str:
    return ", ".join(
        f"{label} {'-' if (value := record.get(name)) is None else form.format(value)}" for label, name, form in _SHOWN
    )
