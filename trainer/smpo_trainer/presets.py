"""Published settings by name (``--preset``): defaults of the flags, which the command line and a config file override.

Diffusion-DPO's training script (arXiv 2311.12908) is what SmPO-Diffusion's, DDIM-InPO's and the public one of DMPO were
made from: batch 1 on each of 8 devices, the rest accumulated, and a learning rate that is scaled by their product.
Nothing heavy is imported here, since ``--help`` lists the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smpo_common.errors import UserError

PICKSCORE_RANGE = "pickscore=0.11543526500463486:0.28201571106910706"
"""The extremes of PickScore, as a cosine, in SmPO-Diffusion's code."""

_DEVICES = 8


@dataclass(frozen=True)
class Preset:
    """One published run.

    Attributes:
        kind: the model family that it is of.
        flags: values by the flags' names, dashes as underscores.
        pairs: of an optimizer step, over all devices; None: not known.
        shards: how the states were made, by the names in a manifest's ``inversion``.
        starts_from_sft: whether model and reference were fine-tuned on the preferred images before.
    """

    kind: str
    flags: Mapping[str, object]
    pairs: int | None = None
    shards: Mapping[str, object] = field(default_factory=dict)
    starts_from_sft: bool = False


_Values = dict[str, object]

_ADAMW: _Values = {"optimizer": "adamw"}
_ADAFACTOR: _Values = {"optimizer": "adafactor", "gradient_checkpointing": True}
_EIGHT_BIT: _Values = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
_COMMON: _Values = {"lr_schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "dtype": "fp16"}


def _script(kind: str, pairs: int, shards: _Values, flags: _Values, *, sft: bool = False) -> Preset:
    """A run of Diffusion-DPO's script, or of one made from it."""
    optimizer = {"sd15": _ADAMW, "sdxl": _ADAFACTOR}[kind]
    batch = {"batch_size": 1, "grad_accum": pairs // _DEVICES, "lr": 1e-8, "scale_lr": True}
    return Preset(kind, {**_COMMON, **optimizer, **batch, **flags}, pairs, {**shards, "prompt_dropout": 0.2}, sft)


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
    # The launchers have beta 5000 for both; 2000 is the paper's for Stable Diffusion 1.5.
    "dpo-sd15": _script("sd15", 2048, _FORWARD, {**_DPO, "beta": 2000.0, "warmup_steps": 500}),
    "dpo-sdxl": _script("sdxl", 2048, _FORWARD, {**_DPO, "beta": 5000.0, "warmup_steps": 200}),
    "inpo-sd15": _script("sd15", 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 2000.0}, sft=True),
    "inpo-sdxl": _script("sdxl", 1024, _INPO_TRAJECTORY, {**_INPO, "beta": 5000.0}),
    # Of AIDC-AI/Diffusion-SDPO, the only public implementation; the authors' own numbers were not found.
    "dmpo-sd15": _script("sd15", 2048, _FORWARD, {**_DMPO, "beta": 2000.0}),
    "dmpo-sdxl": _script("sdxl", 2048, _FORWARD, {**_DMPO, "beta": 6000.0, "lr": 1e-9}),
    "mapo-sdxl": Preset("sdxl", _MAPO, shards=_ALL_PROMPTS),
    # No code was published; beta, learning rate and steps were not found, and are the trainer's own.
    "capo-sdxl": Preset("sdxl", _CAPO, shards={**_FORWARD, "forward_noise": "image"}),
    # Trained for up to 5000 steps; the weights that were published are of step 2000.
    "npo-sd15": Preset("sd15", {**_NPO, "beta": 1000.0, "batch_size": 64, "grad_accum": 1}, 64, _ALL_PROMPTS),
    "npo-sdxl": Preset("sdxl", {**_NPO, "beta": 2000.0, "batch_size": 30, "grad_accum": 2}, 60, _ALL_PROMPTS),
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def as_flags(settings: Mapping[str, object]) -> str:
    """Values by flag name as a command line."""
    return " ".join(_as_flag(f"--{name.replace('_', '-')}", value) for name, value in settings.items())


def _as_flag(flag: str, value: object) -> str:
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *(f"{each:g}" if isinstance(each, float) else str(each) for each in values)])
