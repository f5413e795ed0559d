"""The code for diffusion models that both stages share, `smpo-pipeline` and `smpo-train`.

The names below are for notebooks (docs/guide/python.md); they are imported when they are first used.
"""

from __future__ import annotations

import logging as python_logging
from typing import TYPE_CHECKING

from transformers.utils import logging

from smpo_common.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from smpo_models.draws import image_noise
    from smpo_models.family import Conditioning, Family
    from smpo_models.loading import load_family, load_tuned_denoiser
    from smpo_models.sampling import load_pipeline, sample
    from smpo_models.tuned.negative import guide_with_negative

__all__ = [
    "Conditioning",
    "Family",
    "guide_with_negative",
    "image_noise",
    "load_family",
    "load_pipeline",
    "load_tuned_denoiser",
    "sample",
]

# transformers' bar for every weight file would break up our own progress bars. Its warnings about checkpoints are not
# needed: the code that loads a checkpoint checks it itself and raises an error.
logging.disable_progress_bar()
logging.set_verbosity_error()
# PEFT imports bitsandbytes where it is installed, which on some CPUs prints that it lacks a kernel it can do without.
python_logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(python_logging.ERROR)

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "smpo_models.draws": ["image_noise"],
        "smpo_models.family": ["Conditioning", "Family"],
        "smpo_models.loading": ["load_family", "load_tuned_denoiser"],
        "smpo_models.tuned.negative": ["guide_with_negative"],
        "smpo_models.sampling": ["load_pipeline", "sample"],
    },
)
