"""The trainer imports neither Ray nor the pipeline, and loads no VAE."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.helpers import arguments

_RUN = """
import functools
import sys
import diffusers
@functools.wraps(diffusers.AutoencoderKL.__init__)  # its signature has the defaults of configs
def refuse(*_, **__):
    raise AssertionError("a VAE was made")
diffusers.AutoencoderKL.__init__ = refuse
from smpo_trainer.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in sys.modules if name.split(".")[0] in ("ray", "smpo_pipeline", "image_reward")]
assert "smpo_trainer.trainer" in sys.modules
assert not heavy, heavy
"""


@pytest.mark.slow
def test_a_whole_run_imports_neither_ray_nor_the_pipeline(shards: Path, model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    args = arguments(shards, model, tmp_path / "run", max_steps=1)
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *args], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "training.json").is_file()


def test_help_does_not_import_torch() -> None:
    code = "import sys, smpo_trainer.cli; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
