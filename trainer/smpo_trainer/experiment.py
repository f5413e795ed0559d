"""An experiment: the settings resolved against the shards, and what of them a run that is continued must share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.noise_schedule import Process
from smpo_trainer.data.bucketed_order import group_size
from smpo_trainer.monitoring.trackers import import_wandb
from smpo_trainer.objectives import Objective, code_fingerprint, find_objective
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from smpo_trainer.preference.pair_weights import PairWeights, read_pair_weights
from smpo_trainer.preference.reward_mix import RewardMix, resolve_mix
from smpo_trainer.settings import TrainSettings
from smpo_trainer.shards.shard_set import ShardSet, open_shards

_IDENTITY = (
    "budget",
    "max_steps",
    "optimizer",
    "warmup_steps",
    "lr_schedule",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "lora_rank",
    "seed",
    "shuffle_window",
    "dtype",
    "reference",
    "min_timestep",
    "max_timestep",
    "val_fraction",
)
"""Flags that decide the numbers of a run by their values alone."""


@dataclass(frozen=True)
class Experiment:
    """What is to be trained on what, by which loss.

    Attributes:
        settings: as they were asked for.
        shards: the data set.
        objective: the loss, with its options resolved.
        mix: the rewards; None where the objective uses none.
        weights: of the pairs; None where all count alike.
        weighting: of the timesteps.
        validation_prompts: to draw images of.
    """

    settings: TrainSettings
    shards: ShardSet
    objective: Objective
    mix: RewardMix | None
    weights: PairWeights | None
    weighting: TimestepWeighting
    validation_prompts: list[str]

    @property
    def uses_reference(self) -> bool:
        """Whether the loss depends on the reference; without, the reference only serves what is logged."""
        return self.objective.uses_reference or self.settings.loss.budget is not None

    def pair_loss(self, process: Process) -> PairLoss:
        """The objective with everything that the settings combine with it."""
        loss = self.settings.loss
        return PairLoss(self.objective, process, self.weighting, loss.budget, loss.budget_weight)

    def _group(self, states_per_step: int) -> dict[str, int]:
        """Where images have several sizes, how many states are of one at a time: it decides their order."""
        if len(self.shards.image_sizes()) == 1:
            return {}
        return {"states of one shape at a time": group_size(states_per_step, self.settings.steps.batch_size)}

    def describe(self, states_per_step: int) -> list[str]:
        """What is trained on, and how, with what nobody asked for by name: lines for the user."""
        settings, options = self.settings, self.objective.options
        made = [directory.manifest.inversion for directory in self.shards.directories]
        sizes = ", ".join(f"{width} x {height}" for height, width in sorted(self.shards.image_sizes()))
        pairs = sum(directory.manifest.totals.pairs for directory in self.shards.directories)
        own = "".join(f", {name} {getattr(options, name)}" for name in options.own())
        learns_from = "labels"
        if self.mix:
            weights = " ".join(f"{name}:{weight:g}" for name, weight in self.mix.preference.weights.items())
            learns_from = f"--reward {weights} by --preference {settings.rewards.preference}"
        emptied = _percent(each.prompt_dropout for each in made)
        mirrored = _percent(each.hflip / 2 for each in made)
        optimizer, peak_lr = settings.optimizer, settings.peak_lr(states_per_step)
        lr = f"{peak_lr:g} ({optimizer.lr_schedule}, warm-up {optimizer.warmup_steps} steps)"
        return [
            f"shards: {pairs} pairs at {sizes}; trajectories: {emptied} are without their prompt, {mirrored} mirrored",
            f"objective: {self.objective.name} from {learns_from}; beta {options.beta:g}{own}",
            f"steps: {settings.steps.max_steps} of {states_per_step} pairs; {optimizer.optimizer}, learning rate {lr}",
        ]

    def identity(self, states_per_step: int) -> dict[str, Any]:
        """Everything that decides the numbers of a run, by the names that users know (JSON values).

        Batch size, accumulation and processes count only by their product: the order of the states and the loss, a
        mean over the product, do not depend on the parts.
        """
        settings, values = self.settings, self.settings.flat_values()
        return {
            "shards": self.shards.manifest_hashes(),
            "objective": self.objective.name,
            "objective's code": code_fingerprint(type(self.objective)),
            **{name: values[name] for name in _IDENTITY},
            **(self.mix.identity() if self.mix else {}),
            "beta": self.objective.options.beta,
            "gamma": self.objective.options.gamma,
            **{name: getattr(self.objective.options, name) for name in self.objective.options.own()},
            **self.weighting.identity(),
            "budget_weight": values["budget_weight"] if values["budget"] is not None else None,
            "weight_column": self.weights.identity() if self.weights else None,
            "batch_size x grad_accum x processes": states_per_step,
            **self._group(states_per_step),
            "lr": settings.peak_lr(states_per_step),
            "unet": _fingerprint(settings.model, settings.denoiser.unet) if settings.denoiser.unet else None,
            "tf32": values["tf32"] or None,
            "compile": values["compile"] or None,
        }


def resolve_experiment(settings: TrainSettings, say: Callable[[str], None]) -> Experiment:
    """Find the objective, the shards and the rewards; quick, since no tar and no model is read.

    Raises:
        UserError: one of them is not there, or they do not belong together.
    """
    if settings.output.wandb_project:
        import_wandb(settings.output.wandb_project)  # hours before its first use
    rewards, loss = settings.rewards, settings.loss
    kind = find_objective(loss.objective)
    shards = open_shards(settings.shards, settings.data.cache_folder)
    mix = resolve_mix(rewards, settings.preset, shards, say) if kind.uses_rewards else None
    scores_unused = rewards.scores and not rewards.weight_column
    if mix is None and (rewards.reward or scores_unused or rewards.calibration or rewards.reward_range):
        say(f"--objective {kind.name} learns from labels: flags about rewards and scores are not used")
    weights = read_pair_weights(rewards.scores, rewards.weight_column) if rewards.weight_column else None
    options = kind.Options.parse(
        kind.name,
        loss.objective_option,
        beta=kind.resolve_beta(loss.beta, shards.model.kind),
        gamma=loss.gamma,
        num_train_timesteps=shards.model.num_train_timesteps,
    )
    weighting = TimestepWeighting(
        loss.timestep_weighting or kind.timestep_weighting,
        loss.snr_gamma,
        kind.sigmoid_bias if loss.sigmoid_bias is None else loss.sigmoid_bias,
    )
    prompts = _read_prompts(settings.images.validation_prompts) if settings.images.validation_prompts else []
    experiment = Experiment(settings, shards, kind(options), mix, weights, weighting, prompts)
    if not experiment.uses_reference and settings.compute.reference == "live":
        say(f"--objective {kind.name} needs no reference: --reference live only serves what is logged")
    return experiment


def _percent(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * share:g} %" for share in sorted(set(shares)))


def _fingerprint(model: str, unet: Path) -> str:
    """Of the weights in a denoiser folder: the folder may be moved, or filled anew."""
    denoiser = load_family(model, ("denoiser",), denoiser=unet).denoiser
    return fingerprint_module(denoiser) if denoiser else "none"


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines do not count.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--validation-prompts {path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--validation-prompts {path} has no prompt; write one a line")
    return prompts
