"""``smpo-pipeline``: generate and score preference pairs, invert them into shards, evaluate and inspect.

The names below are for notebooks (docs/guide/python.md); they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smpo_common.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from smpo_pipeline.inversion.inverter import Inverter
    from smpo_pipeline.inversion.prepare_pair import prepare_pair
    from smpo_pipeline.rewards import Reward, load_reward

__all__ = ["Inverter", "Reward", "load_reward", "prepare_pair"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "smpo_pipeline.inversion.inverter": ["Inverter"],
        "smpo_pipeline.inversion.prepare_pair": ["prepare_pair"],
        "smpo_pipeline.rewards": ["Reward", "load_reward"],
    },
)
