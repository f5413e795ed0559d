"""Agreement between the processes of a run: if one fails, all end, and the error is printed once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from smpo_common.errors import UserError

T = TypeVar("T")

_SETTLE_SECONDS = 0.2


def on_all(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` in every process and return each process's own result.

    Raises:
        UserError: in the main process, if ``work`` failed in any process; the others exit with status 2.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    # Collective: tell every process, or a process that fails alone leaves the others waiting in their next collective.
    problems = [text for text in gather_object([problem]) if text is not None]
    if not problems:
        return result  # type: ignore[return-value]  # T may be None itself
    if accelerator.is_main_process:
        raise UserError(problems[0])
    raise SystemExit(2)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` in the main process, which owns the output folder, and return its result in every process.

    Raises:
        UserError: in the main process, if ``work`` failed; the others exit with status 2.
    """
    result = on_all(accelerator, lambda: work() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]


def end_run(accelerator: Accelerator) -> None:
    """Wait for all processes, then shut down the process group."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Avoid a deadlock seen with torch 2.13: after the barrier returns, gloo's thread needs the GIL to free its
        # tensor, while the group's destructor, called next, joins that thread and holds the GIL.
        time.sleep(_SETTLE_SECONDS)
    accelerator.end_training()
