"""Preference optimization of a denoiser, from the training states in shards.

The names below are for notebooks (docs/guide/python.md); they are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smpo_common.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from smpo_trainer.objectives import find_objective
    from smpo_trainer.objectives.base import LabelObjective, Objective, ObjectiveOptions, PairBatch, RewardObjective
    from smpo_trainer.run import run_training
    from smpo_trainer.settings import TrainSettings

__all__ = [
    "LabelObjective",
    "Objective",
    "ObjectiveOptions",
    "PairBatch",
    "RewardObjective",
    "TrainSettings",
    "find_objective",
    "run_training",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "smpo_trainer.objectives": ["find_objective"],
        "smpo_trainer.objectives.base": [
            "LabelObjective",
            "Objective",
            "ObjectiveOptions",
            "PairBatch",
            "RewardObjective",
        ],
        "smpo_trainer.run": ["run_training"],
        "smpo_trainer.settings": ["TrainSettings"],
    },
)
