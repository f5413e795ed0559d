"""Published settings by name (``--preset``): defaults of flags that the command line and a config file override.

The training scripts of SmPO-Diffusion, DDIM-InPO and the public one of DMPO derive from that of Diffusion-DPO (arXiv
2311.12908): batch size 1 on each of 8 devices, gradient accumulation for the rest, and a learning rate scaled by the
product. This module does not import torch, since ``--help`` lists the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smpo_common.errors import UserError

PICKSCORE_RANGE = "pickscore=0.11543526500463486:0.28201571106910706"
"""Minimum and maximum of PickScore, as a cosine, in the code of SmPO-Diffusion."""

_DEVICES = 8


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        kind: model family of the run.
        flags: values by flag name, with underscores for dashes.
        states_per_step: states of an optimizer step over all devices (the papers say pairs); None if unknown.
        shards: inversion settings of its states, by the names in a manifest's ``inversion``.
        starts_from_sft: whether policy and reference start from a model fine-tuned on the preferred images.
    """

    kind: str
    flags: Mapping[str, object]
    states_per_step: int | None = None
    shards: Mapping[str, object] = field(default_factory=dict)
    starts_from_sft: bool = False


_Values = dict[str, object]

_ADAMW: _Values = {"optimizer": "adamw"}
_ADAFACTOR: _Values = {"optimizer": "adafactor", "gradient_checkpointing": True}
_EIGHT_BIT: _Values = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
_COMMON: _Values = {"lr_schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "dtype": "fp16"}


def _script(kind: str, states_per_step: int, shards: _Values, flags: _Values, *, sft: bool = False) -> Preset:
    """Describe a run of the script of Diffusion-DPO, or of one derived from it."""
    optimizer = {"sd15": _ADAMW, "sdxl": _ADAFACTOR}[kind]
    batch = {"batch_size": 1, "grad_accum": states_per_step // _DEVICES, "lr": 1e-8, "scale_lr": True}
    flags = {**_COMMON, **optimizer, **batch, **flags}
    return Preset(kind, flags, states_per_step, {**shards, "prompt_dropout": 0.2}, sft)


_FORWARD: _Values = {"source": "forward", "forward_noise": "pair"}
_ALL_PROMPTS: _Values = {**_FORWARD, "prompt_dropout": 0.0}
_TRAJECTORY: _Values = {"source": "renoise", "timesteps": "published"}
_SMPO_TRAJECTORY: _Values = {**_TRAJECTORY, "solver": "renoise", "renoise_steps": 1}
_INPO_TRAJECTORY: _Values = {**_TRAJECTORY, "steps": 10, "solver": "ddim", "eta": 0.1}

_SMPO: _Values = {
    "objective": "smpo",
    "gamma": 10.0,
    "max_steps": 200,
    "warmup_steps": 100,
    "reward_range": [PICKSCORE_RANGE],
}
_DPO: _Values = {"objective": "dpo", "max_steps": 2000}
_INPO: _Values = {"objective": "dpo", "max_steps": 400, "warmup_steps": 200}
_DMPO: _Values = {"objective": "dmpo", "max_steps": 2000, "warmup_steps": 500, "dtype": "bf16"}
_LONG: _Values = {**_COMMON, **_EIGHT_BIT, "max_steps": 2000, "warmup_steps": 0}
_MAPO: _Values = {**_LONG, "objective": "mapo", "lr": 1e-5, "batch_size": 8, "grad_accum": 2}
_CAPO: _Values = {"objective": "capo", "preference": "winrate", "sigmoid_bias": 1.5}
_NPO: _Values = {**_LONG, "objective": "npo", "lr": 5e-6, "lora_rank": 8}

PRESETS = {
    "smpo-sd15": _script("sd15", 1024, {**_SMPO_TRAJECTORY, "steps": 5}, {**_SMPO, "beta": 2000.0}, sft=True),
    "smpo-sdxl": _script("sdxl", 1024, {**_SMPO_TRAJECTORY, "steps": 10}, {**_SMPO, "beta": 5000.0}),
    # The launch scripts use beta 5000 for both models; the paper says 2000 for Stable Diffusion 1.5.
    "dpo-sd15": _script("sd15", 2048, _FORWARD, {**_DPO, "beta": 2000.0, "warmup_steps": 500}),
    "dpo-sdxl": _script("sdxl", 2048, _FORWARD, {**_DPO, "beta": 5000.0, "warmup_steps": 200}),
    "inpo-sd15": _script("sd15", 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 2000.0}, sft=True),
    "inpo-sdxl": _script("sdxl", 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 5000.0}),
    # From AIDC-AI/Diffusion-SDPO, the only public implementation; the authors' values were not found.
    "dmpo-sd15": _script("sd15", 2048, _FORWARD, {**_DMPO, "beta": 2000.0}),
    "dmpo-sdxl": _script("sdxl", 2048, _FORWARD, {**_DMPO, "beta": 6000.0, "lr": 1e-9}),
    "mapo-sdxl": Preset("sdxl", _MAPO, shards=_ALL_PROMPTS),
    # No code was published. Beta, learning rate and steps were not found and are the defaults of this trainer.
    "capo-sdxl": Preset("sdxl", _CAPO, shards={**_FORWARD, "forward_noise": "image"}),
    # Trained for up to 5000 steps; the published weights are those of step 2000.
    "npo-sd15": Preset("sd15", {**_NPO, "beta": 1000.0, "batch_size": 64, "grad_accum": 1}, 64, _ALL_PROMPTS),
    "npo-sdxl": Preset("sdxl", {**_NPO, "beta": 2000.0, "batch_size": 30, "grad_accum": 2}, 60, _ALL_PROMPTS),
}


def find_preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        UserError: it does not exist.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def as_flags(settings: Mapping[str, object]) -> str:
    """Write values by flag name as a command line."""
    return " ".join(_as_flag(f"--{name.replace('_', '-')}", value) for name, value in settings.items())


def _as_flag(flag: str, value: object) -> str:
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *(f"{item:g}" if isinstance(item, float) else str(item) for item in values)])
