"""Every metric of ``metrics.jsonl``, TensorBoard and Weights & Biases, with its meaning; the reference lists them.

A metric of states is the mean over the step's states that have it. "Preferred" is the image that the objective wants
the model to prefer: by the label, or by the reward mix.
"""

METRICS = {
    "step": "optimizer step, from 1",
    "loss": "the objective's loss, with the terms of budget and norm and the pair weights",
    "rewards/chosen": "implicit reward of the preferred image, -(beta/2) (error - reference error)",
    "rewards/rejected": "implicit reward of the other image",
    "rewards/margins": "implicit reward of the preferred image minus that of the other",
    "rewards/margins_rms": "root mean square of these margins",
    "rewards/accuracies": "share of states with a positive margin, 0 to 1",
    "gradient_factor": "1 minus the logistic function in the loss: 0.5 at the reference, near 0 for a learned pair; "
    "only for `smpo`, `dpo` and `npo`",
    "saturated": "share of states with a gradient factor below 0.05; only for these objectives",
    "error/image_0": "the model's error at image_0: mean squared difference from its regression target",
    "error/image_1": "the same at image_1",
    "error_minus_reference/image_0": "the model's error at image_0 minus the reference's",
    "error_minus_reference/image_1": "the same at image_1",
    "error_minus_reference/chosen": "the same at the preferred image",
    "error_minus_reference/rejected": "the same at the other image",
    "drift": "absolute difference of the model's and the reference's error, mean of both images",
    "budget/excess": "how far the preferred image is beyond `--budget`, in margin units; only with `--budget`",
    "norm_growth": "norm (rms) of the model's output over the reference's, minus 1, mean of both images; where all "
    "shards have the reference's norms, and with `--reference live`",
    "norm_guard/excess": "how far norms exceed the reference's, mean of both images; only with `--norm-guard`",
    "winner_preserving/scale": "factor of the gradient of the image that is not preferred, 0 to 1; only with "
    "`--winner-preserving`",
    "robust/loss": "robust mean of the step's losses, which `--robust` minimises; only with it",
    "robust/largest_share": "largest weight of a state in the gradient, all of them sum to 1; only with `--robust`",
    "robust/effective": "number of equally weighted states with the same sum of squared weights; only with `--robust`",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of this step",
    "beta": "beta of this step; only with `--beta-decay` and `--beta auto`",
    "skipped_steps": "steps so far whose loss or gradient was not finite",
    "states_per_second": "states of the step, over all processes, divided by its duration",
    "data_wait_percent": "share of the step that the main process waited for data",
    "memory_gib": "the main process's peak memory so far: tensors on a GPU, resident memory on a CPU",
    "mfu_percent": "model FLOPs utilization; only on GPUs whose peak is known",
    "validation_reward": "mean `--validation-reward` of the validation images; only at steps at which they are drawn",
    "validation_reward/start": "the same before the first step; first step only",
    "reference_noise/std": "rms of the margins that come from rounding of the stored reference errors; first step only",
    "reference_noise/max": "the largest of these margins; first step only",
    "reference_noise/loss": "what this rounding adds to the mean loss; first step only",
}
"""Name to meaning. Names of held-out pairs begin with ``val/``; those of
:data:`smpo_trainer.monitoring.bands.BANDED` are also written for each band of timesteps."""
