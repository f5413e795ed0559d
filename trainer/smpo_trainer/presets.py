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
        origin: where the settings are from, and what was not found.
        flags: values by flag name, with underscores for dashes.
        states_per_step: states of an optimizer step over all devices (the papers say pairs); None if unknown.
        shards: inversion settings of its states, by the names in a manifest's ``inversion``.
        starts_from_sft: whether policy and reference start from a model fine-tuned on the preferred images.
    """

    kind: str
    origin: str
    flags: Mapping[str, object]
    states_per_step: int | None = None
    shards: Mapping[str, object] = field(default_factory=dict)
    starts_from_sft: bool = False


_Values = dict[str, object]

_ADAMW: _Values = {"optimizer": "adamw"}
_ADAFACTOR: _Values = {"optimizer": "adafactor", "gradient_checkpointing": True}
_EIGHT_BIT: _Values = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
_COMMON: _Values = {"lr_schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "dtype": "fp16"}


def _script(
    kind: str, origin: str, states_per_step: int, shards: _Values, flags: _Values, *, sft: bool = False
) -> Preset:
    """Describe a run of the script of Diffusion-DPO, or of one derived from it."""
    optimizer = {"sd15": _ADAMW, "sdxl": _ADAFACTOR}[kind]
    batch = {"batch_size": 1, "grad_accum": states_per_step // _DEVICES, "lr": 1e-8, "scale_lr": True}
    flags = {**_COMMON, **optimizer, **batch, **flags}
    return Preset(kind, origin, flags, states_per_step, {**shards, "prompt_dropout": 0.2}, sft)


_FORWARD: _Values = {"source": "forward", "forward_noise": "pair"}
_ALL_PROMPTS: _Values = {**_FORWARD, "prompt_dropout": 0.0}
_TRAJECTORY: _Values = {"source": "renoise", "timesteps": "published"}
_SMPO_TRAJECTORY: _Values = {**_TRAJECTORY, "solver": "renoise", "renoise_steps": 1}
_INPO_TRAJECTORY: _Values = {**_TRAJECTORY, "steps": 10, "solver": "ddim", "eta": 0.1}
_TRACKED: _Values = {"source": "tracked"}
_TRUNCATED: _Values = {
    "source": "truncated",
    "steps": 25,
    "truncated_steps": 5,
    "truncated_from": "image",
    "guidance_scale": 0.0,
    "prompt_dropout": 0.0,
}

_STEPS: _Values = {"source": "steps", "steps": 20, "eta": 1.0, "guidance_scale": 5.0}

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
_SELF_NPO: _Values = {**_LONG, "objective": "selfnpo", "max_steps": 1000, "warmup_steps": 500, "grad_accum": 1}
_PNAPO: _Values = {
    "objective": "smpo",
    "gamma": 1.0,
    "reward_range": ["hpsv2=raw"],
    "optimizer": "adamw",
    "lr": 1e-6,
    "max_steps": 200,
    "beta_decay": "100:200:0.5",
}

_TAILOR: _Values = {
    **_COMMON,
    **_ADAMW,
    "objective": "dpo",
    "objective_option": ["ratio_clip=0.1"],
    "beta": 0.1,
    "timestep_weighting": "transition",
    "lr": 3e-5,
    "lora_rank": 4,
    "batch_size": 2,
    "grad_accum": 1,
    "max_steps": 5000,
    "warmup_steps": 0,
}

_SMPO_CODE = "SmPO-Diffusion's scripts (arXiv 2506.02698)"
_DPO_LAUNCHERS = "Diffusion-DPO's launchers (arXiv 2311.12908)"
_INPO_CODE = "DDIM-InPO's scripts (arXiv 2503.18454)"
_DMPO_CODE = (
    "AIDC-AI/Diffusion-SDPO, the only public code of DMPO (arXiv 2507.07510); the authors' values were not found"
)
_MAPO_CODE = "MaPO's README (arXiv 2406.06424)"
_CAPO_NOTES = "notes about CaPO (arXiv 2502.02588), without code; beta, learning rate and steps were not found"
_NPO_CODE = "Diffusion-NPO's scripts (arXiv 2505.11245); of up to 5000 steps, 2000 are those of the published weights"
_SELF_NPO_CODE = (
    "Self-NPO's scripts (arXiv 2505.11777), whose batch counts images, here pairs of two; the number of devices, the "
    "dtype and the limit of the gradient's norm were not found"
)
_PNAPO_NOTES = (
    "notes about PNAPO (arXiv 2605.09433), without code; steps, batch and the steps of --beta-decay were not found: it "
    "decays in the second half of the run"
)
_TAILOR_TEXT = (
    "TailorPO's text (arXiv 2502.01667), the rest as in D3PO's code (arXiv 2311.13231); rank, steps and warm-up were "
    "not found: rank 4, and a pass over 10000 samples, 2 a step"
)

PRESETS = {
    "smpo-sd15": _script(
        "sd15", _SMPO_CODE, 1024, {**_SMPO_TRAJECTORY, "steps": 5}, {**_SMPO, "beta": 2000.0}, sft=True
    ),
    "smpo-sdxl": _script("sdxl", _SMPO_CODE, 1024, {**_SMPO_TRAJECTORY, "steps": 10}, {**_SMPO, "beta": 5000.0}),
    "dpo-sd15": _script(
        "sd15",
        f"{_DPO_LAUNCHERS}, but beta of the paper (theirs: 5000)",
        2048,
        _FORWARD,
        {**_DPO, "beta": 2000.0, "warmup_steps": 500},
    ),
    "dpo-sdxl": _script("sdxl", _DPO_LAUNCHERS, 2048, _FORWARD, {**_DPO, "beta": 5000.0, "warmup_steps": 200}),
    "inpo-sd15": _script("sd15", _INPO_CODE, 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 2000.0}, sft=True),
    "inpo-sdxl": _script("sdxl", _INPO_CODE, 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 5000.0}),
    "dmpo-sd15": _script("sd15", _DMPO_CODE, 2048, _FORWARD, {**_DMPO, "beta": 2000.0}),
    "dmpo-sdxl": _script("sdxl", _DMPO_CODE, 2048, _FORWARD, {**_DMPO, "beta": 6000.0, "lr": 1e-9}),
    "mapo-sdxl": Preset("sdxl", _MAPO_CODE, _MAPO, shards=_ALL_PROMPTS),
    "capo-sdxl": Preset("sdxl", _CAPO_NOTES, _CAPO, shards={**_FORWARD, "forward_noise": "image"}),
    "npo-sd15": Preset(
        "sd15", _NPO_CODE, {**_NPO, "beta": 1000.0, "batch_size": 64, "grad_accum": 1}, 64, _ALL_PROMPTS
    ),
    "npo-sdxl": Preset(
        "sdxl", _NPO_CODE, {**_NPO, "beta": 2000.0, "batch_size": 30, "grad_accum": 2}, 60, _ALL_PROMPTS
    ),
    "selfnpo-sd15": Preset(
        "sd15", _SELF_NPO_CODE, {**_SELF_NPO, "lr": 1e-6, "weight_decay": 1e-3, "batch_size": 10}, shards=_TRUNCATED
    ),
    "selfnpo-sdxl": Preset(
        "sdxl", _SELF_NPO_CODE, {**_SELF_NPO, "lr": 1e-7, "weight_decay": 0.0, "batch_size": 5}, shards=_TRUNCATED
    ),
    "tailorpo-sd15": Preset("sd15", _TAILOR_TEXT, _TAILOR, 2, _STEPS),
    "pnapo-sd3": Preset("sd3", _PNAPO_NOTES, {**_PNAPO, "beta": 5000.0}, shards=_TRACKED),
    "pnapo-flux": Preset("flux1-dev", _PNAPO_NOTES, {**_PNAPO, "beta": 2000.0}, shards=_TRACKED),
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
