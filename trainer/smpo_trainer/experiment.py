"""An experiment: settings resolved against the shards, and the identity that a resumed run must share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_common.options import fields_of
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_trainer.data.bucketed_order import group_size
from smpo_trainer.monitoring.trackers import import_wandb
from smpo_trainer.objectives import Objective, code_fingerprint, find_objective
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from smpo_trainer.preference.pair_weights import PairWeights, read_pair_weights
from smpo_trainer.preference.reward_mix import RewardMix, resolve_mix
from smpo_trainer.safeguards.auto_beta import AutoBeta, BetaController
from smpo_trainer.settings import TrainSettings
from smpo_trainer.shards.shard_set import ShardSet, open_shards
from smpo_trainer.validation.rewards import require_reward


@dataclass(frozen=True)
class Experiment:
    """Settings, data and loss of a run.

    Attributes:
        settings: the user's settings.
        shards: the data set.
        objective: the loss, with its options resolved.
        mix: the rewards; None if the objective uses none.
        weights: weights of the pairs; None if all are equal.
        weighting: weights of the timesteps.
        image_prompts: prompts of the images to draw.
    """

    settings: TrainSettings
    shards: ShardSet
    objective: Objective
    mix: RewardMix | None
    weights: PairWeights | None
    weighting: TimestepWeighting
    image_prompts: list[str]

    @property
    def uses_reference(self) -> bool:
        """Whether the loss depends on the reference. If not, the reference only serves the metrics."""
        return self.objective.uses_reference or self.settings.loss.budget is not None

    def pair_loss(self, schedule: NoiseSchedule) -> PairLoss:
        """Combine the objective with timestep weights, safeguards, pair weights and the schedule of beta."""
        loss = self.settings.loss
        return PairLoss(
            self.objective,
            schedule,
            self.weighting,
            loss.budget,
            loss.budget_weight,
            loss.beta_decay,
            loss.winner_preserving,
            loss.norm_guard,
        )

    def beta_controller(self) -> BetaController | None:
        """Return the controller of ``--beta auto``; None if beta does not follow the margins."""
        loss, warmup_steps = self.settings.loss, self.settings.optimizer.warmup_steps
        if not isinstance(loss.beta, AutoBeta):
            return None
        return BetaController(self.objective.options.beta, loss.beta_band, loss.beta_rate, warmup_steps)

    def _group(self, states_per_step: int) -> dict[str, int]:
        # With several image sizes, the order of states depends on the size of the groups of one shape.
        if len(self.shards.image_sizes()) == 1:
            return {}
        return {"states of one shape at a time": group_size(states_per_step, self.settings.steps.batch_size)}

    def _validation(self) -> dict[str, Any]:
        # It decides which model is the result, and where the run ends.
        settings = self.settings
        if settings.safeguards.validation_reward is None:
            return {}
        return {
            "validation_patience": settings.safeguards.validation_patience,
            "image_prompts": sha256_json(self.image_prompts),
            "image_every": settings.images.image_every,
            "image_sampling_steps": settings.images.image_sampling_steps,
            "image_guidance_scale": settings.images.image_guidance_scale,
        }

    def _moving_beta(self) -> dict[str, Any]:
        if not isinstance(self.settings.loss.beta, AutoBeta):
            return {}
        return {"beta_band": str(self.settings.loss.beta_band), "beta_rate": self.settings.loss.beta_rate}

    def describe(self, states_per_step: int) -> list[str]:
        """Describe data, loss and steps for the user, including values that come from defaults."""
        settings, options = self.settings, self.objective.options
        inversions = [directory.manifest.inversion for directory in self.shards.directories]
        guidance = self.shards.model.embedded_guidance
        told = "" if guidance is None else f"; the model is told guidance {guidance:g}"
        sizes = ", ".join(f"{width} x {height}" for height, width in sorted(self.shards.image_sizes()))
        pairs = sum(directory.manifest.totals.pairs for directory in self.shards.directories)
        own = "".join(f", {name} {getattr(options, name)}" for name in options.own())
        moves = f" x --beta-decay {settings.loss.beta_decay}" if settings.loss.beta_decay else ""
        if isinstance(settings.loss.beta, AutoBeta):
            moves = f" at first, then by the margins (--beta-band {settings.loss.beta_band})"
        learns_from = "labels"
        if self.mix:
            weights = " ".join(f"{name}:{weight:g}" for name, weight in self.mix.preference.weights.items())
            learns_from = f"--reward {weights} by --preference {settings.rewards.preference}"
        dropped = _percent(inversion.prompt_dropout for inversion in inversions)
        mirrored = _percent(inversion.hflip / 2 for inversion in inversions)
        optimizer, peak_lr = settings.optimizer, settings.peak_lr(states_per_step)
        lr = f"{peak_lr:g} ({optimizer.lr_schedule}, warm-up {optimizer.warmup_steps} steps)"
        told += self._text()
        return [
            f"shards: {pairs} pairs at {sizes}; of their trajectories, {dropped} without prompt, {mirrored} mirrored"
            + told,
            f"objective: {self.objective.name} from {learns_from}; beta {options.beta:g}{moves}{own}",
            f"steps: {settings.steps.max_steps} of {states_per_step} states; {optimizer.optimizer}, learning rate {lr}",
        ]

    def _text(self) -> str:
        stored = [source for source in self.shards.sources if source.directory.manifest.text]
        if self.shards.text:
            return "; stored text, no text encoders"
        if stored:
            other = next(source.name for source in self.shards.sources if source not in stored)
            return f"; the text encoders are loaded, since --shards {other} has no stored text"
        return ""

    def identity(self, states_per_step: int) -> dict[str, Any]:
        """Return everything that decides the results of a run, by flag name (JSON values).

        A run is resumed only with the same identity. Fields marked with ``Flag(identity="value")`` are compared as they
        are; those marked ``resolved`` are resolved here.
        """
        settings, values = self.settings, self.settings.flat_values()
        compared = [name for name, _, _, flag in fields_of(type(settings)) if flag.identity == "value"]
        return {
            "shards": self.shards.manifest_hashes(),
            "objective": self.objective.name,
            "objective's code": code_fingerprint(type(self.objective)),
            **{name: values[name] for name in compared},
            **(self.mix.identity() if self.mix else {}),
            "beta": self.objective.options.beta,
            **self._moving_beta(),
            "gamma": self.objective.options.gamma,
            **{name: getattr(self.objective.options, name) for name in self.objective.options.own()},
            **self.weighting.identity(),
            "budget_weight": values["budget_weight"] if values["budget"] is not None else None,
            "robust_form": values["robust_form"] if values["robust"] is not None else None,
            **self._validation(),
            "weight_column": self.weights.identity() if self.weights else None,
            # Only the product counts: the order of states and the loss, a mean over the step, do not depend on its
            # parts.
            "batch_size x grad_accum x processes": states_per_step,
            **self._group(states_per_step),
            "lr": settings.peak_lr(states_per_step),
            "lora_alpha": settings.denoiser.other_lora_alpha,
            "unet": _fingerprint(settings.model, settings.denoiser.unet) if settings.denoiser.unet else None,
            "tf32": values["tf32"] or None,
            "compile": values["compile"] or None,
        }


def resolve_experiment(settings: TrainSettings, say: Callable[[str], None]) -> Experiment:
    """Resolve objective, shards and rewards; fast, since it reads neither tars nor models.

    Raises:
        UserError: one of them does not exist, or they do not fit each other.
    """
    if settings.output.wandb_project:
        import_wandb(settings.output.wandb_project)  # fail now, not after hours
    rewards, loss = settings.rewards, settings.loss
    kind = find_objective(loss.objective)
    shards = open_shards(settings.shards, settings.data.cache_folder)
    mix = resolve_mix(rewards, settings.preset, shards, say) if kind.uses_rewards else None
    scores_unused = rewards.scores and not rewards.weight_column
    if mix is None and (rewards.reward or scores_unused or rewards.calibration or rewards.reward_range):
        say(
            f"--objective {kind.name} does not learn from rewards: it ignores --reward, --reward-range, --calibration "
            "and --scores"
        )
    weights = read_pair_weights(rewards.scores, rewards.weight_column) if rewards.weight_column else None
    options = kind.Options.parse(
        kind.name,
        loss.objective_option,
        beta=kind.resolve_beta(loss.beta.start if isinstance(loss.beta, AutoBeta) else loss.beta, shards.model.kind),
        gamma=loss.gamma,
        num_train_timesteps=shards.model.num_train_timesteps,
    )
    weighted = loss.timestep_weighting or kind.timestep_weighting
    weighting = TimestepWeighting(
        weighted,
        loss.snr_gamma,
        kind.sigmoid_bias if loss.sigmoid_bias is None else loss.sigmoid_bias,
        loss.x0_cap,
        shards.stochastic_steps() if weighted == "transition" else None,
    )
    prompts = _read_prompts(settings.images.image_prompts) if settings.images.image_prompts else []
    experiment = Experiment(settings, shards, kind(options), mix, weights, weighting, prompts)
    if loss.beta_decay and not experiment.uses_reference:
        raise UserError(f"--beta-decay {loss.beta_decay}: without --budget, --objective {kind.name} has no beta")
    _require_options(experiment)
    if not experiment.uses_reference and settings.compute.reference == "live":
        say(f"--objective {kind.name} needs no reference: --reference live only affects the metrics")
    return experiment


def _require_options(experiment: Experiment) -> None:
    """Refuse options that mean nothing for this objective or these shards, or lack what they need.

    Raises:
        UserError: there is one.
    """
    loss, objective = experiment.settings.loss, experiment.objective
    reward = experiment.settings.safeguards.validation_reward
    if reward is not None:
        if not experiment.image_prompts:
            raise UserError(f"--validation-reward {reward} scores validation images: give --image-prompts FILE")
        require_reward(reward)
    for flag, value in {"winner-preserving": loss.winner_preserving, "norm-guard": loss.norm_guard}.items():
        if value is not None and not objective.uses_reference:
            raise UserError(
                f"--{flag} {value:g}: --objective {objective.name} does not compare a pair with a reference; it is for "
                "those that do, such as smpo and dpo"
            )
    if loss.budget is not None and not objective.prefers:
        raise UserError(
            f"--budget {loss.budget:g}: --objective {objective.name} prefers no image, and a budget limits the error "
            "of the preferred one; leave it out"
        )
    if isinstance(loss.beta, AutoBeta):
        if not objective.has_sigmoid():
            raise UserError(
                f"--beta {loss.beta}: the loss of --objective {objective.name} has no sigmoid that margins could "
                "saturate; choose a number"
            )
        if loss.beta_decay:
            raise UserError(f"--beta {loss.beta}: beta follows the margins or --beta-decay, not both")
    if loss.norm_guard is not None and experiment.settings.compute.reference != "live":
        _require_norms(experiment, f"--norm-guard {loss.norm_guard:g}")


def _require_norms(experiment: Experiment, flag: str) -> None:
    """Refuse a flag if the shards do not have the norms of the run's reference.

    Raises:
        UserError: they do not.
    """
    quantize = experiment.settings.denoiser.quantize
    if quantize is not None:
        raise UserError(
            f"{flag}: norms in shards are those of the unquantized model; with --quantize {quantize}, give --reference "
            "live"
        )
    without = [s.name for s in experiment.shards.sources if not s.directory.manifest.has_ref_norm]
    if without:
        raise UserError(
            f"{flag}: --shards {without[0]} have no norms of the reference; make them again "
            "with `smpo-pipeline invert`, or give --reference live"
        )


def _percent(fractions: Iterable[float]) -> str:
    return ", ".join(f"{100 * fraction:g} %" for fraction in sorted(set(fractions)))


def _fingerprint(model: str, unet: Path) -> str:
    # Hash the weights, not the path: the folder may be moved, or its content replaced.
    denoiser = load_family(model, ("denoiser",), denoiser=unet).denoiser
    return fingerprint_module(denoiser) if denoiser else "none"


def _read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines are skipped.

    Raises:
        UserError: the file cannot be read or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--image-prompts {path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--image-prompts {path} has no prompt; write one per line")
    return prompts
