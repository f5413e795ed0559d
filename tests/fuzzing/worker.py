"""The process that reads hostile inputs, one after the other, and tells its parent about each.

A line of JSON before an input ({"seed"}) and one after it ({"seed", "outcome", "problem", "seconds", "peak"}).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from smpo_common.errors import UserError
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder

_ADDRESS_SPACE = 12 << 30
"""Beyond what the process has taken already: a guard for the machine. Peaks that matter are measured."""

_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.",
    "socket.connect",
    "pickle.find_class",
)
"""Audit events (PEP 578) that no reader has a reason for; what is written to a file is watched apart."""


class Watch:
    """Notes what a reader does to the world outside it, through Python's audit hook."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and not str(path).startswith((str(self.folder), "/dev/null")):
                self.seen.append(f"opened {path!r} to write")
        elif event.startswith(_FORBIDDEN) and str(self.folder) not in str(arguments):
            self.seen.append(f"{event} {arguments!r}"[:300])


def serve(module: ModuleType, seeds: Iterable[int], out: TextIO) -> None:
    """Read the inputs of ``seeds`` that ``module`` prepares, and write about each to ``out``."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _ADDRESS_SPACE,) * 2)
    with suppress(ImageRejectedError):
        worker_decoder().decode(b"")  # the one process that may be started; once it is there, none
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for seed in seeds:
            own = Path(folder, str(seed), "input")
            own.mkdir(parents=True)
            run = module.prepare(seed, own)
            print(json.dumps({"seed": seed}), file=out, flush=True)
            print(json.dumps({"seed": seed, **_one(run, own, watch)}), file=out, flush=True)


def _one(run: Any, folder: Path, watch: Watch) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _status("VmRSS"), time.process_time()
    problem = None
    shown = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff prints what it thinks of a file
    watch.seen, watch.folder = [], folder
    try:
        outcome = run()
    except UserError as error:
        outcome = "refused"
        if not str(error).isprintable() or len(str(error)) > 2000:
            problem = f"an error that is no line: {str(error)[:300]!r}"
    except BaseException as error:  # noqa: BLE001  (that is what is looked for)
        outcome, problem = "raised", f"{type(error).__name__}: {error}"[:300]
        problem += " at " + " < ".join(
            f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__))
        )
    finally:
        watch.folder = None
        os.dup2(shown, 2)
        os.close(shown)
    strangers = [str(path) for path in folder.parent.iterdir() if path != folder]
    if watch.seen or strangers:
        problem = "; ".join([*watch.seen, *strangers])
    peak = _status("VmHWM") - before
    return {"outcome": outcome, "problem": problem, "seconds": time.process_time() - start, "peak": peak}


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
