"""What the processes of one run must agree on before they train: a failure of one ends all, and is said once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from smpo_common.errors import UserError

T = TypeVar("T")

_SETTLE_SECONDS = 0.2


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do ``work`` in every process and return its own result.

    Without this, a process that fails alone leaves the others waiting for it in their next collective operation.

    Raises:
        UserError: in the main process, where ``work`` failed in any; the other processes exit with status 2.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    first = next((each for each in gather_object([problem]) if each is not None), None)
    if first is None:
        return result  # type: ignore[return-value]  # T may be None itself
    if accelerator.is_main_process:
        raise UserError(first)
    raise SystemExit(2)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do ``work`` in the main process alone, which owns the output folder, and return its result in every process.

    Raises:
        UserError: in the main process, where ``work`` failed; the other processes exit with status 2.
    """
    result = together(accelerator, lambda: work() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]


def leave(accelerator: Accelerator) -> None:
    """End a run in every process, after all of them have come here."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Gloo's thread drops the tensor of that barrier after the barrier has returned, for which it needs the GIL;
        # the group's destructor, called next, joins that thread with the GIL held. Seen to hang (torch 2.13).
        time.sleep(_SETTLE_SECONDS)
    accelerator.end_training()
