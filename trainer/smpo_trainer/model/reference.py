"""Whose reference errors a run trains against: the shards', or the same computed anew in the run's own arithmetic.

At step 0 the model is the reference, so every margin should be 0. With the stored errors it is not quite: they were
computed on other hardware, in another dtype or batch, and beta multiplies the difference. This is measured before the
first step. Where it is loud, one pass without gradients over the states that the run will visit computes the errors
again, in the run's precision and in its own batches, with no second denoiser in memory.

Shape suffixes: B a micro-batch of states, S all states of a run, 2 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from smpo_common.errors import UserError
from smpo_common.files import atomic_path
from smpo_schemas.manifest import autocast_arithmetic
from smpo_trainer.data.loader import Feed, StateBatch
from smpo_trainer.distributed import on_main, together
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.denoising_error import condition, pair_errors
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.objectives.base import PairBatch, implicit_margin
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.output.run_folder import OutputFolder

LOUD_MARGIN = 0.1
"""Standard deviation of a margin that is too much noise: in the course of a run margins grow to about 1, and this is a
tenth of that, on every state, for the whole run."""

LOUD_LOSS = 5e-3
"""The same for what the noise adds to the mean loss whatever its sign (second order: half the curvature times its
variance). The first order is of zero mean: over n states it is left with 1 / sqrt(n) of itself."""

MEASURED_STATES = 512
"""States that the noise is measured on, however many a step has."""

_TENSOR, _STEPS = "ref_error", "steps"
_TITLE = "recomputing the reference's errors, once, in this run's own arithmetic"


@dataclass(frozen=True)
class ReferenceNoise:
    """How far the stored reference is from this run's arithmetic, over the first states of the run.

    Attributes:
        std: root mean square of the margin h that the noise alone makes (its true mean is 0).
        max: largest absolute value.
        loss: what the noise adds to the mean loss.
        even: the same, averaged over the noise and its opposite.
    """

    std: float
    max: float
    loss: float
    even: float

    @property
    def is_loud(self) -> bool:
        """Whether it is worth a warning, or a pass that mends it."""
        return self.std > LOUD_MARGIN or abs(self.even) > LOUD_LOSS

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"arithmetic noise of the stored reference: margin std {self.std:.2g}, max {self.max:.2g}, "
            f"loss {self.loss:+.1g} (true values 0)"
        )


def settle_reference(
    experiment: Experiment,
    policy: Policy,
    feed: Feed,
    accelerator: Accelerator,
    output: OutputFolder,
    report: RunConsole,
    *,
    going_on: bool,
) -> Record:
    """Decide before training whose reference errors ``feed`` gives, and make them where they are not there.

    In a run that is ``going_on`` from a checkpoint, what was decided before its first step holds. Where it has more
    steps than that run had, errors that were recomputed are so for the states of all of them.

    Returns:
        What is logged with the first step: the noise of the stored errors; nothing where it cannot be known, because
        training starts from other weights and the reference is not in memory, or in a run that goes on.

    Raises:
        UserError: recomputed errors cannot be written or read.
    """
    settings = experiment.settings
    if going_on:
        if on_main(accelerator, output.reference.is_file):
            error_S2, steps = together(accelerator, lambda: read_reference(output.reference))
            if steps < settings.steps.max_steps:
                error_S2 = _recompute(_Pass(policy, feed, accelerator), settings.steps.max_steps, output, report)
            feed.dataset.ref_error_S2 = error_S2
        return {}
    if not (policy.starts_from_reference or policy.reference):
        return {}
    if not experiment.uses_reference and settings.compute.reference != "recomputed":
        return {}  # no noise of it reaches the loss
    if settings.compute.reference in {"auto", "stored"}:
        _compare_arithmetic(experiment, accelerator.device, report)
    reference = _Pass(policy, feed, accelerator)
    noise = reference.measure(experiment.pair_loss(policy.family.process), settings.steps.max_steps)
    report.say(noise.describe())
    if settings.compute.reference == "recomputed" or (settings.compute.reference == "auto" and noise.is_loud):
        feed.dataset.ref_error_S2 = _recompute(reference, settings.steps.max_steps, output, report)
    elif settings.compute.reference == "stored" and noise.is_loud:
        report.say(
            "WARNING: margins grow to about 1 in training, so this drowns a part of the signal; use --reference auto, "
            "a wider --dtype, or a smaller --beta"
        )
    return {"reference_noise/std": noise.std, "reference_noise/max": noise.max, "reference_noise/loss": noise.loss}


def _compare_arithmetic(experiment: Experiment, device: torch.device, report: RunConsole) -> None:
    """Say where the stored errors were computed in other arithmetic than this run's."""
    own = autocast_arithmetic(experiment.settings.compute.chosen_dtype)
    if own == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        own = "fp32 with TF32 convolutions"
    for source in experiment.shards.sources:
        theirs = source.directory.manifest.ref_error_arithmetic
        if theirs != own:
            report.say(
                f"--shards {source.name}: their reference errors were computed in {theirs}, this run computes in "
                f"{own}: the difference is noise in its margins (--dtype here and of `invert`)"
            )


class _Pass:
    """Forwards of the reference alone, in the batches that training will take."""

    def __init__(self, policy: Policy, feed: Feed, accelerator: Accelerator) -> None:
        self._policy, self._feed, self._plan, self.accelerator = policy, feed, feed.plan, accelerator

    def measure(self, pair_loss: PairLoss, max_steps: int) -> ReferenceNoise:
        """Compare stored errors with errors computed now.

        As many steps' states as make :data:`MEASURED_STATES`, or all that a run of ``max_steps`` visits.
        """
        margins: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        evens: list[torch.Tensor] = []
        steps = min(self.steps(max_steps), -(-MEASURED_STATES // self._plan.states_per_step))
        for batch, error_B2 in self._batches(steps):
            noisy = PairBatch(error_B2, batch.ref_error_B2, batch.preference_B, batch.label_B, batch.timestep_B)
            exact = pair_loss(replace(noisy, ref_error_B2=error_B2), batch.weight_B)[0]
            opposite = replace(noisy, ref_error_B2=2 * error_B2 - batch.ref_error_B2)
            loss_B = pair_loss(noisy, batch.weight_B)[0] - exact
            evens.append((loss_B + pair_loss(opposite, batch.weight_B)[0] - exact) / 2)
            margin_B = implicit_margin(error_B2, batch.ref_error_B2, pair_loss.objective.options.beta)
            margins.append(margin_B * pair_loss.timestep_weight(batch.timestep_B, margin_B))
            losses.append(loss_B)
        own_B3 = torch.stack([torch.cat(each) for each in (margins, losses, evens)], dim=1)
        margin_B, loss_B, even_B = self.accelerator.gather(own_B3).double().unbind(1)
        return ReferenceNoise(
            std=float(margin_B.square().mean().sqrt()),
            max=float(margin_B.abs().max()),
            loss=float(loss_B.mean()),
            even=float(even_B.mean()),
        )

    def steps(self, max_steps: int) -> int:
        """How many of a run's first steps visit every state that it ever visits."""
        return min(max_steps, -(-self._plan.order.positions_to_see_all() // self._plan.states_per_step))

    def recompute(self, max_steps: int, step_done: Callable[[], None]) -> torch.Tensor:
        """The reference's errors at every state that a run of ``max_steps`` visits.

        Returns:
            float32 [S, 2] on the CPU, the same in all processes; NaN at states that are not visited.

        Raises:
            UserError: an error is not finite.
        """
        error_S2 = torch.full((self._plan.num_states, 2), torch.nan)
        for number, (_, error_B2) in enumerate(self._batches(self.steps(max_steps))):
            step, accumulation = divmod(number, self._plan.grad_accum)
            gathered_G2 = self.accelerator.gather(error_B2).cpu()
            if not gathered_G2.isfinite().all():
                raise UserError("the reference's errors are not finite in this run; use a wider --dtype")
            positions = [
                position
                for rank in range(self._plan.world_size)
                for position in self._plan.positions(step, accumulation, rank)
            ]
            error_S2[self._plan.states(positions)] = gathered_G2
            if accumulation == self._plan.grad_accum - 1:
                step_done()
        return error_S2

    @torch.no_grad()
    def _batches(self, steps: int) -> Iterator[tuple[StateBatch, torch.Tensor]]:
        """This process's micro-batches of the first steps, each with the reference's errors [B, 2]."""
        family = self._policy.family
        reference = self._policy.reference or self._policy.denoiser
        for batch in self._feed.batches(0, steps):
            moved = batch.to(self.accelerator.device)
            conditioning = condition(self._policy, moved)  # as in training: the text encoders keep their own dtype
            with self.accelerator.autocast():
                error_B2 = pair_errors(family, reference, moved, conditioning)
            yield moved, error_B2


def _recompute(reference: _Pass, max_steps: int, output: OutputFolder, report: RunConsole) -> torch.Tensor:
    """The reference's errors in this run's arithmetic, [S, 2], also kept for a run that goes on."""
    with report.bar(_TITLE, reference.steps(max_steps)) as step_done:
        error_S2 = reference.recompute(max_steps, step_done)
    on_main(reference.accelerator, lambda: write_reference(output.reference, error_S2, max_steps))
    return error_S2


def write_reference(path: Path, error_S2: torch.Tensor, max_steps: int) -> None:
    """Keep recomputed errors for a run that goes on, when the model is no longer the reference.

    Args:
        path: the file.
        error_S2: of the states that ``max_steps`` steps visit.
        max_steps: of the run.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            safetensors.torch.save_file({_TENSOR: error_S2, _STEPS: torch.tensor(max_steps)}, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read_reference(path: Path) -> tuple[torch.Tensor, int]:
    """Read them back, float32 [S, 2], and the number of steps whose states they are of.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        return tensors[_TENSOR], int(tensors[_STEPS])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); start over with --overwrite") from error
