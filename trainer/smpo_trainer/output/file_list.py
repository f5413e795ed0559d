"""The files that a run leaves in ``--out``, with their content; the reference lists them."""

from smpo_common.commandline import CONFIG_FILE
from smpo_models.sharing.card import CARD_FILE
from smpo_schemas.trained_model import (
    DENOISER_FOLDERS,
    EXTRA_LORA_FILES,
    LORA_FILE,
    METRICS_FILE,
    TRAINING_FILE,
    VALIDATION_FOLDER,
)

_UNET, _TRANSFORMER = (f"{name}/" for name in DENOISER_FOLDERS)

RUN_FILES = {
    _UNET: "the trained denoiser, as diffusers saves and loads it; not with `--lora-rank`",
    _TRANSFORMER: f"for models whose denoiser is a transformer, such as SD3 and FLUX.1, in place of `{_UNET}`",
    LORA_FILE: "with `--lora-rank`: the adapter, as `load_lora_weights` takes it",
    **{name: f"with `--lora-format {key}`: the adapter in this format, too" for key, name in EXTRA_LORA_FILES.items()},
    TRAINING_FILE: "settings and result; written last",
    CARD_FILE: "model card: data, settings, how to load the model",
    CONFIG_FILE: "every flag as it was resolved, by its key; `--config` takes it again",
    METRICS_FILE: "one JSON object per optimizer step",
    "best/": "with `--validation-reward`: the model with the highest reward so far",
    "checkpoint-NNNNNN/": "what a run continues from, and a model",
    "tensorboard/": "event files",
    f"{VALIDATION_FOLDER}/": "with `--image-prompts`: `step-NNNNNN.png`, all prompts of a step",
    "reference.safetensors": "reference errors, where this run recomputed them",
    "nonfinite.jsonl": "one object per skipped step: `step`, `bad_pairs` (their loss is not finite), `pairs`",
    "spikes.jsonl": "one object per sudden rise of the model's error, if any: `step`, `error_ratio` (to the "
    "reference's error), `usual` (this ratio before), `rolled_back_to` (step), `lr_factor`",
    "wandb/": "with `--wandb-project`: its files, and the id of the run",
}

CHECKPOINT_FILES = {
    _UNET: "as above (with `--lora-rank` the files of the adapter); with `--ema-decay` the averaged weights",
    _TRANSFORMER: f"in place of `{_UNET}`, as above",
    "weights_in_training.safetensors": "with `--ema-decay`: the weights that training continues with",
    "optimizer.pt": "state of optimizer, schedule, gradient scaler, average, skipped steps, beta, spikes and best step",
    "state.json": "`version`; `step`: finished optimizer steps; `identity`: the settings that a run which continues "
    "from here must share",
}
