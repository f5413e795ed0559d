"""Published settings by name (``--preset``): defaults of the flags, which the command line and a config file override.

The published SmPO-Diffusion runs (arXiv 2506.02698 and its training scripts): 200 steps of 1024 pairs, on 8 GPUs with
batch 1 and accumulation 128, learning rate 1e-8 times those three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PUBLISHED_PAIRS = 1024
"""Pairs of an optimizer step, over all devices."""


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        kind: the model family that it is of.
        flags: values by the flags' names, dashes as underscores.
    """

    kind: str
    flags: Mapping[str, object]


_BOTH: dict[str, object] = {
    "objective": "smpo",
    "gamma": 10.0,
    "max_steps": 200,
    "batch_size": 1,
    "grad_accum": 128,
    "lr": 1e-8,
    "scale_lr": True,
    "lr_schedule": "constant",
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "mixed_precision": "fp16",
}

PRESETS = {
    "smpo-sd15": Preset("sd15", {**_BOTH, "beta": 2000.0, "optimizer": "adamw"}),
    "smpo-sdxl": Preset("sdxl", {**_BOTH, "beta": 5000.0, "optimizer": "adafactor", "gradient_checkpointing": True}),
}


def remarks(name: str | None, kind: str, states_per_step: int) -> list[str]:
    """What a user should know where a run departs from the preset that it names.

    Args:
        name: of the preset; None: none.
        kind: of the shards' model.
        states_per_step: pairs of an optimizer step, over all devices.
    """
    lines: list[str] = []
    if name is None:
        return lines
    if PRESETS[name].kind != kind:
        lines.append(f"--preset {name} holds the settings published for {PRESETS[name].kind}, the shards are of {kind}")
    if states_per_step != PUBLISHED_PAIRS:
        lines.append(
            f"--preset {name}: published are {PUBLISHED_PAIRS} pairs a step, here are {states_per_step} "
            "(--batch-size x --grad-accum x devices), and the learning rate is scaled by them"
        )
    return lines
