"""Image files, a reward and an actor that crash, hang or fail, in workers, never in the test's process."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import numpy as np

from smpo_pipeline.jobs.faults import crashes
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.rewards import Reward
from tests.pictures import encode, picture


def _marked(mark: str) -> bytes:
    """A normal image with a comment."""
    return encode(picture(), comment=mark.encode(), quality=95)


CRASHES, HANGS, OOM_KILLED, FILLS_MEMORY = map(_marked, ("crash", "hang", "killed", "memory"))

_SITE = """
import ctypes, os, signal
from PIL.JpegImagePlugin import JpegImageFile

load = JpegImageFile.load

def poisoned(self):
    mark = self.info.get("comment", b"").decode()
    if mark == "crash":
        ctypes.string_at(0)
    if mark == "hang":
        ctypes.PyDLL(None).pause()
    if mark == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mark == "memory" or os.path.exists(os.environ.get("MEMORY_IS_SHORT", "")):
        raise MemoryError
    return load(self)

JpegImageFile.load = poisoned
"""


def write_poisoned_decoder(folder: Path) -> Path:
    """Write a folder for PYTHONPATH that makes the decoder crash, hang or run out of memory on marked files."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    return folder


class Touchy(Reward):
    """The mean of an image; pure green fails like a broken device."""

    name = "touchy"
    unit = "mean"
    default_model = None

    def __init__(self, model, device):  # noqa: ARG002
        self.model, self.fingerprint = "touchy", "0"

    def score(self, images, prompts):  # noqa: ARG002
        means = np.array([np.asarray(image).reshape(-1, 3).mean(0) for image in images])
        if (means == (0, 255, 0)).all(1).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return means.mean(1)


class TouchyInvertActor(InvertActor):
    """Crashes on the prompt "kill", fails on the prompt "fail"; its first writes fail."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        # Fewer crashes than usual: each takes the start of a worker.
        crashes.RETRY_ONE_BY_ONE_AFTER = crashes.REJECT_AFTER = 1
        invert = self._inverter.invert

        def touchy(requests):
            prompts = {pair.prompt for pair, _ in requests}
            if "kill" in prompts:
                ctypes.string_at(0)
            if "fail" in prompts:
                raise RuntimeError("CUDA error: device-side assert triggered")
            return invert(requests)

        self._inverter.invert = touchy
        # The first two commits of each process fail, as while a file server is away.
        failures, fsync = [1, 1], os.fsync

        def away_at_first(descriptor):
            if failures and failures.pop():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(descriptor)

        os.fsync = away_at_first
