"""Each flag is known to change a run's numbers, or not to: a run that is continued must share the first kind."""

from __future__ import annotations

from smpo_common.options import fields_of
from smpo_trainer.experiment import _IDENTITY
from smpo_trainer.settings import TrainSettings

BY_WHAT_IT_MEANS = {
    *("shards", "reward", "preference", "calibration", "reward_range", "scores", "weight_column"),
    *(
        "objective",
        "objective_option",
        "beta",
        "gamma",
        "timestep_weighting",
        "snr_gamma",
        "sigmoid_bias",
        "budget_weight",
    ),
    *("batch_size", "grad_accum", "lr", "scale_lr", "unet", "tf32", "compile"),
}
"""In the identity by what they resolve to: hashes of shards, a learning rate, the product of sizes."""

CHANGES_NO_NUMBER = {
    *("model", "out", "preset", "variant", "device", "gradient_checkpointing", "text", "workers", "overwrite"),
    *("cache", "cache_gib", "max_skipped", "val_every", "val_states", "save_every", "checkpoints_total_limit"),
    *("keep_checkpoints", "wandb_project", "validation_prompts", "validation_every"),
    *("validation_sampling_steps", "validation_guidance_scale"),
}
"""Of the training. The shards' manifest knows the model; presets only set other flags."""


def test_every_flag_is_of_one_kind():
    flags = {name for name, *_ in fields_of(TrainSettings)}
    kinds = [set(_IDENTITY), BY_WHAT_IT_MEANS, CHANGES_NO_NUMBER]
    assert flags == set().union(*kinds)
    assert sum(map(len, kinds)) == len(flags)
