"""Each flag is known to change the results of a run, or not to: a resumed run must share those of the first kind."""

from __future__ import annotations

from smpo_common.options import fields_of
from smpo_trainer.settings import TrainSettings

CHANGES_NO_RESULT = {
    *("model", "out", "preset", "variant", "device", "gradient_checkpointing", "workers", "overwrite"),
    *("cache", "cache_gib", "max_skipped", "val_every", "val_states", "save_every", "checkpoints_total_limit"),
    *("keep_checkpoints", "wandb_project", "image_prompts", "image_every"),
    *("image_sampling_steps", "image_guidance_scale", "lora_format", "push_to_hub", "hub_private_repo", "license"),
    *("on_spike", "spike_ratio", "print_config"),
}
"""The shards' manifest identifies the model; presets only set other flags; a resumed run may treat spikes otherwise."""


def test_a_flag_is_part_of_the_identity_unless_it_is_listed_here() -> None:
    unmarked = {name for name, _, _, flag in fields_of(TrainSettings) if flag.identity is None}
    assert unmarked == CHANGES_NO_RESULT
