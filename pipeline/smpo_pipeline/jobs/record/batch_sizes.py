"""The batch sizes that actors choose, or find to be the largest that fit, for the driver to print."""

from __future__ import annotations

import os
import socket

from smpo_common.files import list_files, read_json, write_json
from smpo_common.store_path import AnyPath

_FILES = ".batch-size-*.json"


def record_batch_size(out: AnyPath, size: int) -> None:
    """Write this process's batch size into the folder of the job."""
    write_json(out / _FILES.replace("*", f"{socket.gethostname()}-{os.getpid()}"), size)


def pop_batch_sizes(out: AnyPath, requested: int | None, noun: str) -> list[str]:
    """Read and remove the files of all batch sizes, and describe each.

    Args:
        out: folder of the job.
        requested: value of ``--batch-size``; None: auto.
        noun: what batches are of.
    """
    files = list_files(out, _FILES)
    sizes = sorted({read_json(file) for file in files})
    for file in files:
        file.unlink()
    flag = f"{requested}: larger batches failed, usually for lack of memory" if requested else "auto"
    return [f"--batch-size {flag}: batches of {size} {noun}" for size in sizes]
