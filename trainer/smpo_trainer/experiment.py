"""An experiment: the settings resolved against the shards, and what of them a run that is continued must share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smpo_trainer.objectives import Objective, ObjectiveOptions, find_objective
from smpo_trainer.reward_mix import RewardMix, resolve_mix
from smpo_trainer.settings import TrainSettings, resolve_beta
from smpo_trainer.shard_set import ShardSet, open_shards


@dataclass(frozen=True)
class Experiment:
    """What is to be trained on what, by which loss.

    Attributes:
        settings: as they were asked for.
        shards: the data set.
        objective: the loss, with its options resolved.
        mix: the rewards; None where the objective uses none.
    """

    settings: TrainSettings
    shards: ShardSet
    objective: Objective
    mix: RewardMix | None

    def identity(self, states_per_step: int) -> dict[str, Any]:
        """Everything that decides the numbers of a run, by the names that users know (JSON values).

        Batch size, accumulation and processes count only by their product: the order of the states and the loss, a
        mean over the product, do not depend on the parts.
        """
        settings = self.settings
        return {
            "shards": self.shards.manifest_hashes(),
            "objective": settings.objective,
            **(self.mix.identity() if self.mix else {}),
            "beta": self.objective.options.beta,
            "gamma": self.objective.options.gamma,
            "max_steps": settings.max_steps,
            "batch_size x grad_accum x processes": states_per_step,
            "lr": settings.peak_lr,
            "warmup_steps": settings.warmup_steps,
            "lr_schedule": settings.lr_schedule,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "lora_rank": settings.lora_rank,
            "unet": str(settings.unet) if settings.unet else None,
            "seed": settings.seed,
            "shuffle_window": settings.shuffle_window,
            "mixed_precision": settings.mixed_precision,
            "reference": settings.reference,
            "min_timestep": settings.min_timestep,
            "max_timestep": settings.max_timestep,
        }


def resolve_experiment(settings: TrainSettings, say: Callable[[str], None]) -> Experiment:
    """Find the objective, the shards and the rewards; quick, since no tar and no model is read.

    Raises:
        UserError: one of them is not there, or they do not belong together.
    """
    objective = find_objective(settings.objective)
    shards = open_shards(settings.shards, settings.cache)
    mix = resolve_mix(settings, shards, say) if objective.uses_rewards else None
    if mix is None and (settings.rewards or settings.scores or settings.calibration or settings.reward_ranges):
        say(f"--objective {objective.name} learns from labels: flags about rewards and scores are not used")
    beta = resolve_beta(settings.beta, shards.model.kind)
    return Experiment(settings, shards, objective(ObjectiveOptions(beta=beta, gamma=settings.gamma)), mix)


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two identities, each as ``name (old -> new)``."""
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in names if old.get(name) != new.get(name)]
