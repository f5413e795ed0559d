"""Choose the reference errors: those stored in the shards, or recomputed in this run's precision.

At step 0 the policy is the reference, so every margin should be 0. With the stored errors it is not exactly 0: they
were computed on other hardware, in another dtype or batch, and beta multiplies the difference. This rounding noise is
measured before the first step. If it is significant, one pass without gradients over the states of the run recomputes
the errors, in the run's precision and batches, without a second denoiser in memory.

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
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_schemas.manifest import autocast_arithmetic
from smpo_trainer.data.loader import Feed, StateBatch
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.denoising_error import reference_errors
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.objectives.base import PairBatch, implicit_margin
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.runtime.distributed import on_all, on_main
from smpo_trainer.safeguards.auto_beta import AutoBeta

MAX_MARGIN_NOISE = 0.1
"""Largest insignificant standard deviation of the margin's noise. Margins grow to about 1 during a run."""

MAX_LOSS_NOISE = 5e-3
"""Largest insignificant second-order contribution of the noise to the mean loss (half the curvature times its
variance). The first order has zero mean and averages out over the states."""

NUM_MEASURED_STATES = 512
"""Number of states on which the noise is measured, independent of the size of a step."""

_TENSOR, _STEPS = "ref_error", "steps"
_TITLE = "recomputing the reference errors once, in this run's precision"


@dataclass(frozen=True)
class ReferenceNoise:
    """Rounding noise of the stored reference errors, over the first states of the run.

    Attributes:
        std: root mean square of the margin h due to the noise alone (its true value is 0).
        max: largest absolute value of this margin.
        loss: contribution of the noise to the mean loss.
        even: its even part: the mean of the contributions of the noise and of its negative.
    """

    std: float
    max: float
    loss: float
    even: float

    @property
    def is_significant(self) -> bool:
        """Whether the noise is large enough to recompute the reference errors."""
        return self.std > MAX_MARGIN_NOISE or abs(self.even) > MAX_LOSS_NOISE

    def describe(self) -> str:
        """Describe the noise in one line."""
        return (
            f"rounding noise of the stored reference errors: margin std {self.std:.2g}, max {self.max:.2g}, "
            f"loss {self.loss:+.1g} (true values 0)"
        )


def prepare_reference_errors(
    experiment: Experiment,
    policy: Policy,
    feed: Feed,
    accelerator: Accelerator,
    output: OutputFolder,
    console: RunConsole,
    *,
    resuming: bool,
) -> Record:
    """Choose the reference errors that ``feed`` returns, and recompute them if necessary.

    A run that is ``resuming`` from a checkpoint keeps the choice made before its first step.

    Returns:
        The noise of the stored errors, to log with the first step. Empty in a resumed run, or if the reference is not
        in memory because training starts from other weights.

    Raises:
        UserError: recomputed errors cannot be written or read.
    """
    settings = experiment.settings
    if resuming:
        if on_main(accelerator, output.reference.is_file):
            error_S2, steps = on_all(accelerator, lambda: read_reference(output.reference))
            # A larger --max-steps may visit more states than were recomputed.
            if steps < settings.steps.max_steps:
                error_S2 = _recompute(_Pass(policy, feed, accelerator), settings.steps.max_steps, output, console)
            feed.dataset.ref_error_S2 = error_S2
        return {}
    if not (policy.starts_from_reference or policy.reference):
        return {}
    if not experiment.uses_reference and settings.compute.reference != "recomputed":
        return {}  # the loss does not depend on it
    if settings.compute.reference in {"auto", "stored"}:
        _compare_arithmetic(experiment, accelerator.device, console)
    reference = _Pass(policy, feed, accelerator)
    noise = reference.measure(_judging_loss(experiment, policy.family.noise_schedule))
    console.say(noise.describe())
    if settings.denoiser.quantize and settings.recomputes_reference:
        console.say(f"--quantize {settings.denoiser.quantize}: the reference errors are those of the quantized weights")
    if settings.recomputes_reference or (settings.compute.reference == "auto" and noise.is_significant):
        feed.dataset.ref_error_S2 = _recompute(reference, settings.steps.max_steps, output, console)
    elif settings.compute.reference == "stored" and noise.is_significant:
        console.say(
            "WARNING: margins grow to about 1 in training, so this noise hides part of the signal; use --reference "
            "auto, a wider --dtype, or a smaller --beta"
        )
    return {"reference_noise/std": noise.std, "reference_noise/max": noise.max, "reference_noise/loss": noise.loss}


def _judging_loss(experiment: Experiment, schedule: NoiseSchedule) -> PairLoss:
    """Return the loss by which noise is judged: with ``--beta auto``, which may rise, at the published beta or more."""
    loss = experiment.pair_loss(schedule)
    if not isinstance(experiment.settings.loss.beta, AutoBeta):
        return loss
    published = experiment.objective.betas.get(experiment.shards.model.kind, 0.0)
    return loss.with_beta(max(published, loss.objective.options.beta))


def _compare_arithmetic(experiment: Experiment, device: torch.device, console: RunConsole) -> None:
    """Print which shards have reference errors of another precision than this run's."""
    own = autocast_arithmetic(experiment.settings.compute.chosen_dtype)
    if own == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        own = "fp32 with TF32 convolutions"
    for source in experiment.shards.sources:
        stored = source.directory.manifest.ref_error_arithmetic
        if stored != own:
            console.say(
                f"--shards {source.name}: reference errors were computed in {stored}, this run computes in {own}: the "
                "difference adds noise to the margins (compare --dtype here and of `smpo-pipeline invert`)"
            )


class _Pass:
    """Forward passes of the reference alone, over the same batches as in training."""

    def __init__(self, policy: Policy, feed: Feed, accelerator: Accelerator) -> None:
        self._policy, self._feed, self._batching, self.accelerator = policy, feed, feed.batching, accelerator

    def measure(self, pair_loss: PairLoss) -> ReferenceNoise:
        """Compare stored errors with recomputed ones.

        Uses as many steps as give :data:`NUM_MEASURED_STATES` states, or all steps that visit new states. The length of
        the run plays no part: a finished run that is continued with a larger --max-steps must give the same result as a
        run that had this number from the start.
        """
        margins: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        evens: list[torch.Tensor] = []
        steps = -(-NUM_MEASURED_STATES // self._batching.states_per_step)
        for batch, error_B2 in self._batches(self.steps(steps)):
            noisy = PairBatch(error_B2, batch.ref_error_B2, batch.preference_B, batch.label_B, batch.timestep_B)
            exact = pair_loss(replace(noisy, ref_error_B2=error_B2), batch.weight_B)[0]
            opposite = replace(noisy, ref_error_B2=2 * error_B2 - batch.ref_error_B2)
            loss_B = pair_loss(noisy, batch.weight_B)[0] - exact
            evens.append((loss_B + pair_loss(opposite, batch.weight_B)[0] - exact) / 2)
            margin_B = implicit_margin(error_B2, batch.ref_error_B2, pair_loss.objective.options.beta)
            margins.append(margin_B * pair_loss.timestep_weight(batch.timestep_B, margin_B))
            losses.append(loss_B)
        # Collective: all processes measure the same noise, and so choose the same reference.
        own_B3 = torch.stack([torch.cat(values) for values in (margins, losses, evens)], dim=1)
        margin_B, loss_B, even_B = self.accelerator.gather(own_B3).double().unbind(1)
        return ReferenceNoise(
            std=float(margin_B.square().mean().sqrt()),
            max=float(margin_B.abs().max()),
            loss=float(loss_B.mean()),
            even=float(even_B.mean()),
        )

    def steps(self, max_steps: int) -> int:
        """Return how many of the first steps visit every state that the run ever visits."""
        return min(max_steps, -(-self._batching.order.positions_to_see_all() // self._batching.states_per_step))

    def recompute(self, max_steps: int, step_done: Callable[[], None]) -> torch.Tensor:
        """Compute the reference errors of every state that a run of ``max_steps`` visits.

        Returns:
            float32 [S, 2] on the CPU, the same in all processes; NaN for states that are not visited.

        Raises:
            UserError: an error is not finite.
        """
        error_S2 = torch.full((self._batching.num_states, 2), torch.nan)
        for number, (_, error_B2) in enumerate(self._batches(self.steps(max_steps))):
            step, accumulation = divmod(number, self._batching.grad_accum)
            # Collective, in the order of the ranks, like the positions below.
            gathered_G2 = self.accelerator.gather(error_B2).cpu()
            if not gathered_G2.isfinite().all():
                raise UserError("the reference errors are not finite in this run; use a wider --dtype")
            positions = [
                position
                for rank in range(self._batching.world_size)
                for position in self._batching.positions(step, accumulation, rank)
            ]
            error_S2[self._batching.states(positions)] = gathered_G2
            if accumulation == self._batching.grad_accum - 1:
                step_done()
        return error_S2

    def _batches(self, steps: int) -> Iterator[tuple[StateBatch, torch.Tensor]]:
        """Yield this process's micro-batches of the first steps, each with its reference errors [B, 2]."""
        for batch in self._feed.batches(0, steps):
            on_device = batch.to(self.accelerator.device)
            yield on_device, reference_errors(self._policy, on_device, self.accelerator)


def _recompute(reference: _Pass, max_steps: int, output: OutputFolder, console: RunConsole) -> torch.Tensor:
    """Recompute the reference errors, [S, 2], and save them for a resumed run."""
    with console.bar(_TITLE, reference.steps(max_steps)) as step_done:
        error_S2 = reference.recompute(max_steps, step_done)
    on_main(reference.accelerator, lambda: write_reference(output.reference, error_S2, max_steps))
    return error_S2


def write_reference(path: Path, error_S2: torch.Tensor, max_steps: int) -> None:
    """Save recomputed errors for a resumed run, whose model is no longer the reference.

    Args:
        path: the file.
        error_S2: errors of the states that ``max_steps`` steps visit.
        max_steps: number of steps of the run.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            safetensors.torch.save_file({_TENSOR: error_S2, _STEPS: torch.tensor(max_steps)}, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read_reference(path: Path) -> tuple[torch.Tensor, int]:
    """Read saved errors, float32 [S, 2], and the number of steps whose states they cover.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(path)
        return tensors[_TENSOR], int(tensors[_STEPS])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); start over with --overwrite") from error
