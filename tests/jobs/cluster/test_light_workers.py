"""Workers that decode or encode images do not load torch, so that one per core starts within a second."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "smpo_pipeline.jobs.score.chunks",
        "smpo_pipeline.jobs.invert.prepare",
        "smpo_pipeline.jobs.generate.parts",
        "smpo_pipeline.images.decoder",
    ],
)
def test_workers_on_images_load_no_model_library(module):
    code = f"import sys, {module}; print({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
